"""The commands record, verify, replay and explain. Nothing heavy is imported before one runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llama_np.options import argument_text, whole, whole_numbers
from llama_np.terminal import note, visible

PRECISION_NAMES = ("float32", "bfloat16", "float16")


def add_commands(commands: Any) -> None:
    """Add the four commands to the parser of `llama-np`."""
    _add_record(commands)
    _add_verify(commands)
    _add_replay(commands)
    _add_explain(commands)


def _add_model(parser: Any) -> None:
    parser.add_argument(
        "-m", "--model", default="fairytales", help="checkpoint (default: the bundled fairytales)"
    )


def _add_port(parser: Any) -> None:
    parser.add_argument("port", metavar="PORT", help=".safetensors, .npz, folder of .npy, or .json")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--precision", choices=PRECISION_NAMES, help="of the port (default: what the dump shows)"
    )


def _add_record(commands: Any) -> None:
    parser = commands.add_parser(
        "record",
        help="write what every array of a model should be",
        description="Write a golden file: every array of a forward pass in float64, and how far an "
        "honest run in float32, bfloat16 or float16 may stray from it.",
    )
    _add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="a text")
    what.add_argument(
        "--ids",
        action="append",
        type=whole_numbers(0),
        help="token ids, 1,2,3; given twice: a batch padded on the left",
    )
    parser.add_argument(
        "--decode", type=whole(0), default=0, metavar="K", help="greedy tokens to feed"
    )
    parser.add_argument(
        "--chunks", type=whole_numbers(1), help="lengths of the prefill's calls, such as 5,3"
    )
    parser.add_argument(
        "--points",
        choices=["all", "blocks", "logits"],
        default="all",
        help="which arrays (default: all)",
    )
    parser.add_argument(
        "--store",
        choices=["float32", "float64"],
        default="float32",
        help="how the float64 values are rounded for the file (default: float32)",
    )
    parser.add_argument(
        "--scalars", action="store_true", help="write text: one number per array and call"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the golden file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.set_defaults(run=run_record)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare a port's dump with a golden file",
        description="Compare a port's arrays with a golden file. Exit code 0: pass, 1: fail.",
    )
    parser.add_argument("golden", metavar="GOLDEN", help="what `llama-np record` wrote")
    _add_port(parser)
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page")
    parser.add_argument(
        "--scalars", action="store_true", help="PORT is a log with one number per array"
    )
    parser.set_defaults(run=run_verify)


def _add_replay(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="recompute every op from the port's own inputs",
        description="Recompute every operation from the port's own inputs, so that errors do not "
        "add up, and list all faulty ones. Exit code 0: none, 1: some.",
    )
    _add_port(parser)
    _add_model(parser)
    parser.add_argument("--golden", help="where tokens come from if the dump has none")
    parser.set_defaults(run=run_replay)


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="name the mistake behind a divergence",
        description="Run the model again with each known mistake in it, and name the one, or the "
        "pair, that explains every number. Exit code 0: clean or explained, 1: unexplained.",
    )
    parser.add_argument("golden", metavar="GOLDEN", help="what `llama-np record` wrote")
    _add_port(parser)
    _add_model(parser)
    parser.set_defaults(run=run_explain)


def run_record(args: Any) -> int:
    """Write a golden file. Returns 0."""
    from llama_np.files import write_atomically
    from llama_np.scalars import scalar_lines
    from llama_np.trace import record

    ids, about = _tokens(args)
    golden = record(
        args.model, ids, decode=args.decode, chunks=args.chunks, points=args.points,
        store=args.store, about=about, progress=_progress(),
    )  # fmt: skip
    if args.scalars:
        text = "\n".join(scalar_lines(golden)) + "\n"
        write_atomically(args.output, text.encode("utf-8"), args.overwrite)
    else:
        golden.save(args.output, args.overwrite)
    B, T = golden.tokens.shape
    if (most := golden.config.max_position_embeddings) < T:
        note(f"llama-np: warning: {T} tokens; the model was trained on {most}")
    note(f"{args.output}: {len(golden.tensors)} arrays, {B} x {T} tokens")
    return 0


def _tokens(args: Any) -> tuple[list[Any], dict[str, str]]:
    about = {"model": Path(args.model).name}
    if args.ids is not None:
        return (args.ids if len(args.ids) > 1 else args.ids[0]), about
    from llama_np.checkpoint import load_tokenizer

    prompt = argument_text(args.prompt)
    return list(load_tokenizer(args.model).encode(prompt)), about | {"prompt": prompt}


def _progress() -> Any:
    """A line that is rewritten, where somebody can see it."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: sys.stderr.write(f"\r\x1b[K{visible(text)}\r")


def _print(result: Any, as_json: bool) -> None:
    text = json.dumps(result.as_dict()) if as_json else visible(str(result))
    print(text)


def run_verify(args: Any) -> int:
    """Compare; returns 0 for pass and note, 1 for fail."""
    from llama_np.trace import load_golden
    from llama_np.verify import verify

    golden = load_golden(args.golden)
    if args.scalars:
        from llama_np.scalars import verify_scalars

        report = verify_scalars(golden, Path(args.port), args.precision or "float32")
    else:
        report = verify(golden, args.port, precision=args.precision, check=False)
    if args.html:
        from llama_np.files import write_atomically
        from llama_np.report import html_page

        page = html_page(report, golden, f"{Path(args.port).name} against {Path(args.golden).name}")
        write_atomically(args.html, page.encode("utf-8"), overwrite=True)
    _print(report, args.json)
    return int(report.verdict == "fail")


def run_replay(args: Any) -> int:
    """Recompute; returns 0 when nothing is faulty, else 1."""
    from llama_np.replay import replay

    result = replay(args.port, args.model, golden=args.golden, precision=args.precision)
    _print(result, args.json)
    return int(result.verdict == "fail")


def run_explain(args: Any) -> int:
    """Explain; returns 0 for clean and explained, else 1."""
    from llama_np.explain import explain

    result = explain(args.golden, args.port, args.model, precision=args.precision)
    _print(result, args.json)
    return int(result.verdict not in ("clean", "explained"))
