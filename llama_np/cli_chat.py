"""The command `llama-np chat`."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from llama_np.chat import FORMATS, Chat
from llama_np.checkpoint import load, load_tokenizer
from llama_np.config import Config
from llama_np.files import write_atomically
from llama_np.generate import TextReader, Token
from llama_np.options import argument_text, check_standard_input
from llama_np.sampling import Sampling
from llama_np.speculate import Draft, DraftModel, PromptLookup
from llama_np.terminal import note, write
from llama_np.threads import limit_threads
from llama_np.tokenizer import check_vocabulary
from llama_np.workers import share_products

HELP = """\
/help            this list
/clear           forget the conversation (the system message stays)
/regen           answer the latest message again
/set NAME VALUE  change temp, top_k, top_p, min_p, repeat_penalty, seed or max_tokens
/save FILE       write the conversation as JSON
/exit            leave; so does Ctrl-D
A message of several lines stands between two lines of three quotes (\"\"\").
Ctrl-C stops an answer, or forgets a line; the conversation stays."""

SAMPLING_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}


def run_chat(args: argparse.Namespace) -> int:
    """Talk until the input ends or /exit."""
    check_standard_input()
    chat = open_chat(args)
    if chat.effective_format == "plain":
        note("no chat template: the model continues your text (--format, if it knows one)")
    if sys.stdin.isatty():
        note("/help lists the commands")
    with share_products(chat.weights, args.threads):
        converse(chat)
    if chat.draft is not None:
        note(f"{chat.draft.accepted} of {chat.draft.guessed} guesses accepted")
    return 0


def converse(chat: Chat) -> None:
    """Obey commands and answer messages until the input ends or /exit."""
    for message in messages():
        try:
            if message.startswith("/"):
                if not obey(chat, message):
                    break
            else:
                show(chat, chat.answer(message))
        except UnicodeEncodeError:
            note("llama-np: error: the message is not UTF-8 text")
        except (ValueError, TypeError, LookupError, OSError) as problem:  # the talk goes on
            note(f"llama-np: error: {problem}")


def open_chat(args: argparse.Namespace) -> Chat:
    """The model, the tokenizer and an empty conversation, as the options say."""
    limit_threads(args.threads)
    sampling = Sampling(args.temp, args.top_k, args.top_p, args.min_p, args.repeat_penalty)
    config, weights = load(args.model, args.dtype, mmap=args.mmap)
    tokenizer = load_tokenizer(args.model)
    check_vocabulary(tokenizer, config.vocab_size)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    options = {"format": args.format, "draft": open_draft(args, config)}
    chat = Chat(config, weights, tokenizer, sampling, args.max_tokens, seed, **options)
    if args.system is not None:
        chat.messages.append({"role": "system", "content": argument_text(args.system)})
    return chat


def open_draft(args: argparse.Namespace, config: Config) -> Draft | None:
    """What guesses for a model of this configuration, as --prompt-lookup or --draft say."""
    if args.prompt_lookup is not None:
        return PromptLookup(args.prompt_lookup)
    if args.draft is None:
        return None
    smaller, weights = load(args.draft, args.dtype, mmap=args.mmap)
    if smaller.vocab_size != config.vocab_size:
        raise ValueError(
            f"--draft {args.draft!r} has a vocabulary of {smaller.vocab_size} tokens, the model "
            f"one of {config.vocab_size}: take a smaller model of the same family"
        )
    return DraftModel(TextReader(weights, smaller))


def messages() -> Iterator[str]:
    """What the user says, message by message; Ctrl-C at the prompt forgets what was typed."""
    while True:
        try:
            message = read_message()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            note("\n(/exit or Ctrl-D leaves)")
            continue
        if message is None:
            return
        if message.strip():
            yield message


def read_message() -> str | None:
    """One line, or those between triple quotes; None at the end of the input."""
    line = read_line("> ")
    if line is None or line.strip() != '"""':
        return line
    lines = []
    while (line := read_line(". ")) is not None and line.strip() != '"""':
        lines.append(line)
    return "\n".join(lines)


def read_line(prompt: str) -> str | None:
    """One line of input, or None at its end; the prompt is shown on a terminal only."""
    if sys.stdin.isatty():
        write(prompt, sys.stderr)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def show(chat: Chat, answer: Iterator[Token]) -> None:
    """Write an answer as it appears; Ctrl-C ends it."""
    if chat.forgotten:
        room = chat.config.max_position_embeddings
        note(f"(the context of {room} tokens is full: {chat.forgotten} messages are forgotten)")
    reason, count = None, 0
    try:
        for token in answer:
            write(token.text)
            reason, count = token.finish_reason, count + 1
    except KeyboardInterrupt:
        reason = "interrupted"
    write("\n")
    if reason == "length" and count < chat.max_tokens:
        reason = "the context is full"
    if reason != "stop":
        note(f"(the answer ended early: {reason})")


def obey(chat: Chat, line: str) -> bool:
    """Carry out a command; False means leave."""
    name, _, rest = line[1:].strip().partition(" ")
    commands: dict[str, Callable[[], Any]] = {
        "help": lambda: note(HELP),
        "clear": chat.clear,
        "regen": lambda: show(chat, chat.regenerate()),
        "set": lambda: change(chat, rest),
        "save": lambda: save(chat, rest.strip()),
    }
    if name in ("exit", "quit"):
        return False
    if name not in commands:
        raise ValueError(f"unknown command /{name}; /help lists them")
    commands[name]()
    return True


def change(chat: Chat, words: str) -> None:
    """`/set NAME VALUE`."""
    name, _, value = words.partition(" ")
    if name in SAMPLING_NAMES:
        kind = int if name == "top_k" else float
        changed: dict[str, Any] = {SAMPLING_NAMES[name]: kind(value)}
        chat.sampling = replace(chat.sampling, **changed)
    elif name in ("seed", "max_tokens"):
        setattr(chat, name, int(value))
    else:
        known = ", ".join([*SAMPLING_NAMES, "seed", "max_tokens"])
        raise ValueError(f"cannot set {name!r}; known: {known}")


def save(chat: Chat, path: str) -> None:
    """`/save FILE`: the messages as JSON."""
    if not path:
        raise ValueError("/save needs a file name")
    content = json.dumps(chat.messages, ensure_ascii=False, indent=2) + "\n"
    write_atomically(path, content.encode("utf-8"))
    note(f"saved {len(chat.messages)} messages")


def add_commands(commands: Any, model_options: Callable[[Any], None]) -> None:
    """Declare `chat` and its options."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model, message by message. /help lists the commands inside.",
    )
    model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="how messages are put (default: auto, by the checkpoint's own template)",
    )
    parser.set_defaults(run=run_chat)
