"""The command `llama-np`.

Standard output carries the text, or with --json one JSON object; everything else goes to
standard error. Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from llama_np import __version__, cli_chat, cli_convert, cli_oracle
from llama_np.options import (
    UsageError,
    argument_text,
    closed,
    real,
    some_text,
    standard_input,
    whole,
)
from llama_np.terminal import Progress, note, visible, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if closed(sys.stderr):  # there is nobody to complain to
        sys.stderr = io.StringIO()
    if closed(sys.stdout):
        note("llama-np: error: standard output is closed")
        return 1
    _speak_utf8()
    args = build_parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `llama-np generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UsageError as problem:
        note(f"llama-np: error: {problem} (llama-np --help)")
        return 2
    except Exception as problem:
        if args.debug:
            raise
        replaceable = isinstance(problem, FileExistsError) and "overwrite" in args
        hint = " (--overwrite replaces it)" if replaceable else ""
        note(f"llama-np: error: {one_line(problem)}{hint}")
        return 1


def _speak_utf8() -> None:
    """Pipes and files carry exact UTF-8 text on every system; Windows would use a code page.

    A terminal keeps its encoding, and shows escapes for what that lacks.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # other bytes fail where they are used
        encoding = None if sys.stdin.isatty() else "utf-8"
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        if sys.stdout.isatty():
            sys.stdout.reconfigure(errors="backslashreplace")
        else:
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")


def one_line(problem: BaseException) -> str:
    """An exception as one line for people."""
    if isinstance(problem, OSError) and problem.strerror:
        name = f": {problem.filename!r}" if problem.filename is not None else ""
        return visible(f"{problem.strerror}{name}")
    text = " ".join(str(problem).split())
    return visible(text or type(problem).__name__)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    note(f"llama-np: warning: {visible(str(message))}")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="llama-np", description="LLaMA in plain NumPy: generate, chat, check, explain."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_tokenize(commands)
    _add_classify(commands)
    _add_score(commands)
    _add_inspect(commands)
    _add_explore(commands)
    _add_bench(commands)
    cli_chat.add_commands(commands, add_generation_options)
    cli_convert.add_commands(commands)
    cli_oracle.add_commands(commands)
    return parser


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that generates text."""
    add_loading_options(parser)
    add_sampling_options(parser)
    add_draft_options(parser)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that loads a model itself."""
    add_model_options(parser)
    add_thread_option(parser)
    parser.add_argument(
        "--no-mmap",
        dest="mmap",
        action="store_const",
        const=False,
        help="read the weights into memory, not from a mapped file (default: below 128 MiB)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that is about a model."""
    parser.add_argument(
        "-m",
        "--model",
        default="fairytales",
        help="folder, file or owner/name on the hub (default: the bundled fairytales)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16"],
        default="float32",
        help="of the weights in memory; bfloat16 computes in float32 (default: %(default)s)",
    )


def add_thread_option(parser: argparse.ArgumentParser) -> None:
    """The option of every command that multiplies matrices."""
    parser.add_argument(
        "-t", "--threads", type=whole(1), help="cores to use for matrix products (default: all)"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how tokens are chosen."""
    add = parser.add_argument
    add(
        "-n",
        "--max-tokens",
        type=whole(0),
        default=256,
        help="at most so many (default: %(default)s)",
    )
    add(
        "--temp",
        "--temperature",
        type=real(">= 0", lambda t: t >= 0),
        default=0.0,
        help="how adventurous the choice of tokens is; 0 takes the likeliest (default: 0)",
    )
    add(
        "--top-k", type=whole(0), default=0, help="draw from the K likeliest (default: 0, from all)"
    )
    add(
        "--top-p",
        type=real("above 0, at most 1", lambda p: 0 < p <= 1),
        default=1.0,
        help="draw from the likeliest that together have this probability (default: 1, all)",
    )
    add(
        "--min-p",
        type=real("from 0 to 1", lambda p: 0 <= p <= 1),
        default=0.0,
        help="draw from those at least this times as likely as the likeliest (default: 0, all)",
    )
    add(
        "--repeat-penalty",
        type=real("above 0", lambda penalty: penalty > 0),
        default=1.0,
        help="above 1 makes tokens that stand in the text less likely (default: 1)",
    )
    add("--seed", type=whole(0), help="of the random choice (default: drawn and reported)")


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Options that guess tokens, to be checked several at once."""
    guess = parser.add_mutually_exclusive_group()
    guess.add_argument(
        "--prompt-lookup",
        type=whole(1),
        metavar="N",
        help="guess up to N tokens from the text so far, and check them in one pass",
    )
    guess.add_argument(
        "--draft", metavar="MODEL", help="let a smaller model with the same vocabulary guess"
    )


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text. Standard output carries only what comes after the prompt.",
    )
    parser.add_argument("prompt", nargs="?", help="'-' or nothing: read standard input")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt in each line, empty ones left out; JSON lines come out ('-': from stdin)",
    )
    add_generation_options(parser)
    add_bulk_options(parser)
    add = parser.add_argument
    add(
        "--stop",
        action="append",
        type=some_text,
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    add("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    help = "with --json: the N likeliest tokens at each step"
    add("--logprobs", type=whole(0), metavar="N", help=help)
    add("--json", action="store_true", help="one JSON object: text, tokens, why it ended, seed")
    add("--no-stream", action="store_true", help="print the text when it is done")
    add("--save-cache", metavar="FILE", help="keep the computed prompt")
    add("--load-cache", metavar="FILE", help="begin with a computed prompt")
    add("-q", "--quiet", action="store_true", help="no statistics on standard error")
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """`llama-np generate`."""
    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs needs --json")
    if args.prompts is not None and args.prompt is not None:
        raise UsageError("give a prompt or --prompts FILE, not both")
    if args.prompts is not None and (args.save_cache or args.load_cache):
        raise UsageError("--save-cache and --load-cache need a single prompt")
    if args.prompts is not None and (args.prompt_lookup or args.draft):
        raise UsageError("--prompt-lookup and --draft need a single prompt")
    if args.prompts is None and (args.output or args.scheduler):
        raise UsageError("--output and --scheduler need --prompts FILE")
    if (args.output or args.scheduler) and (args.logprobs is not None or args.mmap is not None):
        raise UsageError("--output and --scheduler know no --logprobs and no --no-mmap")
    from llama_np.files import check_target
    from llama_np.workers import share_products

    if args.save_cache:
        check_target(args.save_cache)
    prompts = _read_prompts(args)
    if args.output or args.scheduler:
        return report_errors(run_bulk(args, generate_task(args), prompts))
    started = time.perf_counter()
    session = Session(args)
    with share_products(session.weights, args.threads):
        loaded = time.perf_counter() - started
        if args.prompts is not None:
            return session.run_batch(prompts)
        if sys.stdout.isatty() and sys.stderr.isatty() and not args.json:
            write(prompts[0], sys.stderr)
        return session.run_single(prompts[0], loaded)


def generate_task(args: argparse.Namespace) -> Any:
    """The options of `generate` for work in chunks."""
    from llama_np.bulk import GenerateTask, first_seed
    from llama_np.sampling import Sampling

    seed = first_seed(args.output) if args.seed is None else args.seed
    return GenerateTask(
        args.model,
        args.dtype,
        Sampling(args.temp, args.top_k, args.top_p, args.min_p, args.repeat_penalty),
        secrets.randbelow(2**31) if seed is None else seed,
        args.max_tokens,
        tuple(args.stop),
        args.ignore_eos,
    )


def _read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is not None:
        from llama_np.bulk import read_lines

        return read_lines(args.prompts)
    if args.prompt in (None, "-"):
        if args.prompt is None and not closed(sys.stdin) and sys.stdin.isatty():
            raise UsageError("no prompt: give one, or '-' to type it")
        return [standard_input().rstrip("\r\n")]
    return [argument_text(args.prompt)]


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The configuration and the weights that the options ask for."""
    from llama_np.checkpoint import load
    from llama_np.threads import limit_threads

    limit_threads(args.threads)
    return load(args.model, args.dtype, mmap=args.mmap)


class Session:
    """A loaded model and tokenizer with the options of `generate`."""

    def __init__(self, args: argparse.Namespace) -> None:
        from llama_np.checkpoint import load_tokenizer
        from llama_np.sampling import Sampling
        from llama_np.tokenizer import check_vocabulary

        self.args = args
        self.sampling = Sampling(args.temp, args.top_k, args.top_p, args.min_p, args.repeat_penalty)
        self.config, self.weights = load_model(args)
        self.tokenizer = load_tokenizer(args.model)
        check_vocabulary(self.tokenizer, self.config.vocab_size)
        self.draft = cli_chat.open_draft(args, self.config)
        self.seed = secrets.randbelow(2**31) if args.seed is None else args.seed

    def tokens(self, ids: list[list[int]], cache: Any = None) -> Iterator[Any]:
        """The tokens that the model continues the encoded prompts with."""
        from llama_np.generate import stream

        stops = {*self.config.eos_token_id, *self.tokenizer.eos_ids}
        return stream(
            ids,
            self.weights,
            self.config,
            max_new_tokens=self.args.max_tokens,
            sampling=self.sampling,
            seeds=[self.seed + i for i in range(len(ids))],
            stop_ids=[] if self.args.ignore_eos else sorted(stops),
            stop_strings=self.args.stop,
            tokenizer=self.tokenizer,
            logprobs=self.args.logprobs,
            cache=cache,
            draft=self.draft,
        )

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of every prompt."""
        return [self.tokenizer.encode(prompt) for prompt in prompts]

    def open_cache(self, ids: list[int]) -> Any:
        """The cache that the prompt starts with: loaded, new if it is to be saved, or none."""
        from llama_np.cache import KVCache
        from llama_np.generate import activation_dtype
        from llama_np.prompt_cache import keep_common_prefix, load_cache

        if self.args.load_cache:
            cache, cached = load_cache(self.args.load_cache, self.weights, self.config)
            known = keep_common_prefix(cache, cached, ids)
            note(f"{known} of {len(ids)} prompt tokens were computed before")
            return cache
        if self.args.save_cache:
            return KVCache(self.config, dtype=activation_dtype(self.weights))
        return None

    def save_cache(self, cache: Any, ids: list[int]) -> None:
        """Keep the computed prompt, if that is wanted."""
        import numpy as np

        from llama_np.generate import TextReader
        from llama_np.prompt_cache import save_cache

        if self.args.save_cache:
            if cache.length < len(ids):  # no token was wanted, which computes nothing
                TextReader(self.weights, self.config, cache).feed(np.array([ids[cache.length :]]))
            cache.crop(len(ids))
            save_cache(self.args.save_cache, cache, ids, self.weights, self.config)

    def run_single(self, prompt: str, loaded: float) -> int:
        """One prompt: show the text as it appears, or one JSON object."""
        from llama_np.bulk import no_room

        args = self.args
        (ids,) = self.encode([prompt])
        if problem := no_room(len(ids), self.config):
            raise ValueError(problem["error"])
        cache = self.open_cache(ids)
        result = new_result(ids, self.seed)
        clock = Clock(loaded)
        try:
            for token in self.tokens([ids], cache):
                clock.tick()
                add_to_result(result, token)
                if not (args.json or args.no_stream):
                    write(token.text)
        except KeyboardInterrupt:
            write("\n")
            raise
        self.save_cache(cache, ids)
        if self.draft is not None:
            result["guessed_tokens"] = self.draft.guessed
            result["accepted_tokens"] = self.draft.accepted
        result["timings"] = clock.timings(len(ids), len(result["token_ids"]))
        if args.json:
            write(json.dumps(result, ensure_ascii=False) + "\n")
        else:
            write((result["text"] if args.no_stream else "") + "\n")
        if not args.quiet:
            note(statistics(result, self.sampling.temperature))
        return 0

    def run_batch(self, prompts: list[str]) -> int:
        """Many prompts as one ragged batch: one JSON line each, in the order of the prompts."""
        from llama_np.bulk import no_room

        started = time.perf_counter()
        ids = self.encode(prompts)
        results = [
            {"prompt": prompt} | new_result(row, self.seed + i) | no_room(len(row), self.config)
            for i, (prompt, row) in enumerate(zip(prompts, ids, strict=True))
        ]
        progress = Progress("prompts", len(prompts), beside_results=True)
        printed = 0
        for token in self.tokens(ids):
            add_to_result(results[token.row], token)
            progress.advance(token.finish_reason is not None)
            while printed < len(results) and results[printed]["finish_reason"]:
                write(json.dumps(results[printed], ensure_ascii=False) + "\n")
                printed += 1
        seconds = time.perf_counter() - started
        count = sum(len(result["token_ids"]) for result in results)
        if not self.args.quiet:
            note(f"{len(prompts)} prompts, {count} tokens, {count / seconds:.1f} tokens/s")
        return report_errors(results)


def new_result(prompt_ids: list[int], seed: int) -> dict[str, Any]:
    """The JSON object of one prompt before its first token."""
    return {
        "text": "",
        "token_ids": [],
        "prompt_token_ids": prompt_ids,
        "finish_reason": None,
        "seed": seed,
    }


def add_to_result(result: dict[str, Any], token: Any) -> None:
    """Let a result grow by one token."""
    result["text"] += token.text
    result["finish_reason"] = token.finish_reason
    if token.id is not None:
        result["token_ids"].append(token.id)
    if token.logprob is not None:
        top = [{"id": i, "logprob": p} for i, p in token.top_logprobs]
        entry = {"id": token.id, "logprob": token.logprob, "top_logprobs": top}
        result.setdefault("logprobs", []).append(entry)


class Clock:
    """Measures loading, the prompt and the decoding apart."""

    def __init__(self, load_seconds: float) -> None:
        self.load_seconds = load_seconds
        self.start = time.perf_counter()
        self.first = self.last = self.start

    def tick(self) -> None:
        """A token has arrived."""
        self.last = time.perf_counter()
        if self.first == self.start:
            self.first = self.last

    def timings(self, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        """Seconds, and tokens per second; the first token belongs to the prompt."""
        prompt, decode = self.first - self.start, self.last - self.first
        return {
            "load_seconds": round(self.load_seconds, 4),
            "prompt_seconds": round(prompt, 4),
            "decode_seconds": round(decode, 4),
            "prompt_tokens_per_second": round(prompt_tokens / prompt, 2) if prompt else 0.0,
            "decode_tokens_per_second": round((new_tokens - 1) / decode, 2) if decode else 0.0,
        }


def statistics(result: dict[str, Any], temperature: float) -> str:
    """One line about a finished run."""
    timings = result["timings"]
    read, written = len(result["prompt_token_ids"]), len(result["token_ids"])
    parts = [
        f"prompt {read} tokens {timings['prompt_tokens_per_second']:.0f}/s",
        f"text {written} tokens {timings['decode_tokens_per_second']:.0f}/s",
        f"loaded in {timings['load_seconds']:.2f} s",
    ]
    if "guessed_tokens" in result:
        parts.append(f"{result['accepted_tokens']} of {result['guessed_tokens']} guesses accepted")
    if temperature:
        parts.append(f"seed {result['seed']}")
    return " | ".join([*parts, f"end: {result['finish_reason']}"])


def _add_tokenize(commands: Any) -> None:
    parser = commands.add_parser(
        "tokenize",
        help="show the tokens of a text",
        description="Show the tokens of a text: id and piece, one in each line.",
    )
    add = parser.add_argument
    add("text", help="'-': read standard input")
    add(
        "-m",
        "--model",
        default="fairytales",
        help="folder, file or owner/name (default: fairytales)",
    )
    add("--no-bos", action="store_true", help="without the begin-of-text token")
    add("--special", action="store_true", help="let <s> mean the token, not text")
    add("--json", action="store_true", help="one JSON object: ids and tokens")
    parser.set_defaults(run=run_tokenize)


def run_tokenize(args: argparse.Namespace) -> int:
    """`llama-np tokenize`."""
    from llama_np.checkpoint import load_tokenizer

    text = standard_input() if args.text == "-" else argument_text(args.text)
    tokenizer = load_tokenizer(args.model)
    ids = tokenizer.encode(text, bos=not args.no_bos, special=args.special)
    tokens = tokenizer.tokens(ids)
    if args.json:
        write(json.dumps({"ids": ids, "tokens": tokens}, ensure_ascii=False) + "\n")
    else:
        width = len(str(max(ids, default=0)))
        rows = zip(ids, tokens, strict=True)
        write("".join(f"{index:>{width}}  {token}\n" for index, token in rows))
    return 0


def _add_classify(commands: Any) -> None:
    parser = commands.add_parser(
        "classify",
        help="which class a text belongs to",
        description="Print the probability of every class that the model's second head knows.",
    )
    parser.add_argument("text", nargs="?", help="'-' or nothing: read standard input")
    add_loading_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run_classify)


def run_classify(args: argparse.Namespace) -> int:
    """`llama-np classify`."""
    import numpy as np

    from llama_np.checkpoint import load_tokenizer
    from llama_np.layers import softmax
    from llama_np.model import classify

    args.prompts, args.prompt = None, args.text
    (text,) = _read_prompts(args)
    config, weights = load_model(args)
    if "score.weight" not in weights:
        raise ValueError(f"{args.model!r} has no classification head (score.weight)")
    ids = load_tokenizer(args.model).encode(text)
    if len(ids) > (most := config.max_position_embeddings):
        note(f"llama-np: warning: the text has {len(ids)} tokens, the model was trained on {most}")
    (scores,) = classify(np.array([ids]), weights, config)
    chances = {config.id2label[i]: float(p) for i, p in enumerate(softmax(scores))}
    best = max(chances, key=lambda label: chances[label])
    if args.json:
        answer = {"label": best, "probabilities": chances, "token_ids": ids}
        write(json.dumps(answer, ensure_ascii=False) + "\n")
    else:
        ranked = sorted(chances.items(), key=lambda item: -item[1])
        write("".join(f"{chance:6.1%}  {label}\n" for label, chance in ranked))
    return 0


def _add_score(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="how likely the lines of a file are",
        description="Print the exact log-likelihood and perplexity of every line as a JSON line.",
    )
    parser.add_argument(
        "file", help="one text in each line, empty ones left out; '-': standard input"
    )
    add_model_options(parser)
    add_thread_option(parser)
    add_bulk_options(parser)
    parser.set_defaults(run=run_score)


def add_bulk_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that work through many lines."""
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", help="write JSON lines here; go on where it stopped")
    add("--scheduler", metavar="tcp://...", help="work on this dask cluster")


def run_score(args: argparse.Namespace) -> int:
    """`llama-np score`: one JSON line per line of text."""
    from llama_np.bulk import ScoreTask, read_lines

    found = run_bulk(args, ScoreTask(args.model, args.dtype), read_lines(args.file))
    fine = [result for result in found if "error" not in result]
    total = sum(result["log_likelihood"] for result in fine)
    count = sum(result["tokens"] for result in fine)
    if count:
        note(f"{len(fine)} lines, {count} tokens, perplexity {math.exp(-total / count):.3f}")
    return report_errors(found)


def report_errors(results: list[dict[str, Any]]) -> int:
    """Say which results are errors; returns the exit code."""
    wrong = [(number, r["error"]) for number, r in enumerate(results, 1) if "error" in r]
    for number, error in wrong:
        note(f"llama-np: error: result {number}: {error}")
    return int(bool(wrong))


def run_bulk(args: argparse.Namespace, task: Any, lines: list[str]) -> list[dict[str, Any]]:
    """Work through many lines; results go to the output file or to standard output."""
    from llama_np import bulk
    from llama_np.threads import limit_threads

    limit_threads(args.threads)
    found: list[dict[str, Any]] = []
    run = "" if args.output is None else bulk.identity(task, args.scheduler)
    if args.output is not None:
        found = bulk.resume(args.output, lines, run)
    if found:
        note(f"{len(found)} lines were done before")
    progress = Progress("lines", len(lines) - len(found), args.output is None)
    for results in bulk.run(task, lines, len(found), args.scheduler):
        if args.output is not None:
            bulk.append(args.output, results, run)
        else:
            write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results))
        found += results
        progress.advance(len(results))
    return found


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="sizes, dtypes and configuration of a checkpoint",
        description="Show sizes, dtypes, configuration and memory of a checkpoint.",
    )
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    add_model_options(parser)
    parser.set_defaults(model=None)
    parser.add_argument("--check", action="store_true", help="look for NaN and infinity")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """`llama-np inspect`."""
    from llama_np.checkpoint import load
    from llama_np.inspection import describe, table

    if args.model_argument and args.model:
        raise UsageError("give MODEL or --model, not both")
    model = args.model_argument or args.model or "fairytales"
    if args.check:
        load(model, args.dtype, check_finite=True)
    summary = describe(model, args.dtype)
    write((json.dumps(summary) if args.json else table(summary)) + "\n")
    return 0


def _add_explore(commands: Any) -> None:
    parser = commands.add_parser(
        "explore",
        help="see one forward pass in the browser",
        description="Write a page that walks through one forward pass; it needs no network.",
    )
    parser.add_argument("prompt", help="the text that goes through the model")
    parser.add_argument("-o", "--output", required=True, metavar="PAGE.html", help="the page")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    add_loading_options(parser)
    parser.set_defaults(run=run_explore)


def run_explore(args: argparse.Namespace) -> int:
    """`llama-np explore`."""
    from llama_np.checkpoint import load_tokenizer
    from llama_np.explore import page
    from llama_np.files import write_atomically

    config, weights = load_model(args)
    text = page(argument_text(args.prompt), weights, config, load_tokenizer(args.model))
    write_atomically(args.output, text.encode("utf-8"), args.overwrite)
    note(f"wrote {args.output}")
    return 0


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed, beside what this machine could do",
        description="Measure tokens per second beside the limits of this machine. --model also "
        "takes a shape: 15M, 135M or 1.1B, with random weights.",
    )
    add_model_options(parser)
    add_thread_option(parser)
    add, many = parser.add_argument, {"type": whole(1), "nargs": "+", "metavar": "N"}
    add("--batch", **many, default=[1, 4, 8], help="texts at once (default: 1 4 8)")
    add("--prompt-tokens", **many, default=[128], help="lengths of prompts (default: 128)")
    add("--context", type=whole(1), default=128, help="tokens before decoding (default: 128)")
    add("--compare", choices=["transformers"], help="measure this library, too")
    add("--profile", action="store_true", help="say where the time of a decoding step goes")
    add("--plot", metavar="FILE.png", help="draw the roofline")
    add("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """`llama-np bench`; --model also takes a shape (15M, 135M, 1.1B) with random weights."""
    from llama_np.bench import bench, plot, table
    from llama_np.threads import limit_threads

    limit_threads(args.threads)
    report = bench(
        args.model,
        args.dtype,
        args.batch,
        args.prompt_tokens,
        args.context,
        args.compare,
        args.threads,
        args.profile,
    )
    if args.plot:
        plot(report, args.plot)
    write((json.dumps(report) if args.json else table(report)) + "\n")
    return 0
