"""Conversations as text: LLaMA-2's and LLaMA-3's own formats, and Jinja templates.

`encode_chat` is the safe way from messages to ids: what a message says can never become a control
token, whatever it contains. A template is a program by the author of the checkpoint. The sandbox
keeps it from files and from Python's internals; it does not bound its running time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_np.errors import ChatTemplateError, require
from llama_np.tokenizer import Tokenizer

MAX_TEMPLATE = 1 << 20  # characters, of the source and of what it renders
MAX_REPEAT = 1 << 20  # characters that `*` and `%` may make, and bits that `**` may
ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."

# The default system prompt that Meta published with LLaMA-2.
LLAMA2_SYSTEM_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)

Messages = Sequence[Mapping[str, Any]]


def llama2_prompt(
    messages: Messages, bos: str = "<s>", eos: str = "</s>", default_system: str | None = None
) -> str:
    """LLaMA-2's chat format; a system message goes into the first user message.

    Messages are {"role": "system" | "user" | "assistant", "content": text}. `default_system` is
    used when the conversation brings none. Errors: ChatTemplateError.
    """
    turns = [_role_and_content(message) for message in messages]
    system = default_system if turns and "<<SYS>>" not in turns[0][1] else None
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    if not turns:
        raise ChatTemplateError("the conversation has no user message, which LLaMA-2 starts with")
    if system is not None:
        turns[0] = turns[0][0], f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0][1]}"
    return "".join(
        _llama2_turn(place, role, content.strip(), bos, eos)
        for place, (role, content) in enumerate(turns)
    )


def _llama2_turn(place: int, role: str, content: str, bos: str, eos: str) -> str:
    if (role == "user") != (place % 2 == 0):
        raise ChatTemplateError(ALTERNATE)
    if role == "user":
        return f"{bos}[INST] {content} [/INST]"
    if role == "assistant":
        return f" {content} {eos}"
    if role == "system":
        return f"<<SYS>>\n{content}\n<</SYS>>\n\n"
    raise ChatTemplateError(f"role {role!r}: LLaMA-2 knows system, user and assistant")


def llama3_prompt(
    messages: Messages, add_generation_prompt: bool = False, bos: str = "<|begin_of_text|>"
) -> str:
    """LLaMA-3's chat format; `add_generation_prompt` opens the assistant's answer.

    Errors: ChatTemplateError.
    """

    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    turns = [_role_and_content(message) for message in messages]
    text = bos + "".join(f"{header(role)}{content.strip()}<|eot_id|>" for role, content in turns)
    return text + (header("assistant") if add_generation_prompt else "")


def _role_and_content(message: Mapping[str, Any]) -> tuple[str, str]:
    try:
        role, content = message["role"], message["content"]
    except (KeyError, TypeError) as error:
        raise ChatTemplateError(
            f"a message needs a role and a content, found {message!r}"
        ) from error
    if not isinstance(role, str) or not isinstance(content, str):
        raise ChatTemplateError(f"role and content must be strings, found {message!r}")
    return role, content


def render(
    template: str, messages: Messages, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """Run a Jinja chat template in the sandbox (extra `hf`); `variables` are bos_token and so on.

    Errors: ChatTemplateError for anything that the template does wrong or refuses.
    """
    if not isinstance(template, str):
        raise ChatTemplateError(f"a template must be a string, found {type(template).__name__}")
    if len(template) > MAX_TEMPLATE:
        raise ChatTemplateError(
            f"a template of {len(template)} characters (at most {MAX_TEMPLATE})"
        )
    environment = _sandbox()
    parts, length = [], 0
    try:
        compiled = environment.from_string(template)
        for part in compiled.generate(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        ):
            parts.append(part)
            length += len(part)
            if length > MAX_TEMPLATE:
                raise ChatTemplateError(f"the template renders over {MAX_TEMPLATE} characters")
    except ChatTemplateError:
        raise
    except Exception as error:  # a template is a program: it can raise anything
        detail = str(error)[:500]
        raise ChatTemplateError(f"chat template: {type(error).__name__}: {detail}") from error
    return "".join(parts)


def _sandbox() -> Any:
    """Jinja's immutable sandbox, with a bound on operators that make much out of little."""
    sandbox = require("jinja2.sandbox", extra="hf")

    class Environment(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc,name-defined]
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _is_explosive(operator, left, right):
                raise ChatTemplateError(f"the template asks for too much with {operator!r}")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    return environment


def _is_explosive(operator: str, left: Any, right: Any) -> bool:
    if operator == "**":
        small = isinstance(right, int | float) and abs(right) <= 1024
        return not (small and isinstance(left, int | float) and abs(left) <= MAX_REPEAT)
    if operator == "%":
        digits = re.findall(r"\d+", left) if isinstance(left, str) else []
        return any(len(d) > 6 for d in digits) or (isinstance(left, str) and "*" in left)
    sizes = [len(x) for x in (left, right) if isinstance(x, Sequence)]
    counts = [x for x in (left, right) if isinstance(x, int)]
    return bool(sizes and counts and sizes[0] * counts[0] > MAX_REPEAT)


def _raise_exception(message: object) -> None:
    raise ChatTemplateError(str(message))


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def shield(messages: Messages, special_tokens: Iterable[str]) -> tuple[list[dict[str, Any]], str]:
    """Messages in which no control token can be found, and the mark that breaks them up.

    The mark is one character that the messages do not contain; take it out of the plain parts
    after cutting the rendered text at its control tokens.
    """
    everything = json.dumps(messages, ensure_ascii=False, default=str)
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in everything)
    names = [name for name in special_tokens if len(name) > 1]
    whole = "|".join(rf"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names)
    breaks = re.compile(whole or r"(?!)")
    # A message may also end with the first half of a token, and the text after it go on.
    halves = tuple({name[:length] for name in names for length in range(1, len(name))})

    def guard(value: Any) -> Any:
        if isinstance(value, str):
            text = breaks.sub(mark, value)
            body = text.rstrip()
            return body + mark + text[len(body) :] if body.endswith(halves) else text
        if isinstance(value, Mapping):
            return {key: guard(item) for key, item in value.items()}
        return [guard(item) for item in value] if isinstance(value, list | tuple) else value

    return [guard(message) for message in messages], mark


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> list[int]:
    """Token ids of a conversation; only the template makes control tokens, never a message.

    Uses `template`, else the checkpoint's own, else LLaMA-3's or LLaMA-2's format, whichever the
    vocabulary fits. Errors: ChatTemplateError.
    """
    shielded, mark = shield(messages, tokenizer.special_tokens)
    text = prompt_text(tokenizer, shielded, add_generation_prompt, template)
    parts = tokenizer.split(text)
    plain = [part.replace(mark, "") if isinstance(part, str) else part for part in parts]
    return tokenizer.encode_parts(plain)


def prompt_text(
    tokenizer: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> str:
    """The text of a conversation in the format of this tokenizer's checkpoint, to be looked at.

    Do not encode it with `special=True` when messages are not yours; use `encode_chat`.
    """
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    names = {name: tokenizer.tokens([i])[0] for name, i in ids.items() if i is not None}
    template = template if template is not None else tokenizer.chat_template
    if template is not None:
        return render(template, messages, add_generation_prompt, **names)
    if "<|start_header_id|>" in tokenizer.special_tokens:
        return llama3_prompt(messages, add_generation_prompt)
    if names.get("bos_token") == "<s>" and names.get("eos_token") == "</s>":
        return llama2_prompt(messages)
    raise ChatTemplateError(
        "this checkpoint has no chat template; give one, or do not chat with it"
    )
