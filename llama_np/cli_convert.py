"""The command `llama-np convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llama_np.options import UsageError, real, whole
from llama_np.terminal import Progress, note

EXAMPLES = """
examples:
  llama-np convert Llama-2-7b/ llama-2-7b-hf/           Meta's consolidated.*.pth to safetensors
  llama-np convert old-model/ new-model/                pytorch_model.bin to safetensors
  llama-np convert model.gguf model-hf/ --dtype bfloat16
  llama-np convert stories15M.bin stories15M-hf/
  llama-np convert model-hf/ model.bin --to llama2c     and back
  llama-np convert model-hf/ model-meta/ --to meta --shards 4
"""


def add_commands(commands: Any) -> None:
    """Add `convert` to the subparsers of the command line."""
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint of any format",
        description="Convert a checkpoint, one tensor at a time; nothing in a pickle is executed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder, .gguf, .bin, .pth or .safetensors file, owner/name")
    parser.add_argument("out", help="the folder to make; with --to llama2c, the file")
    parser.add_argument(
        "--to",
        choices=["hf", "llama2c", "meta"],
        default="hf",
        help="the format to write (default: hf, a Hugging Face folder with safetensors)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="default: each tensor's own; quantized ones become float32",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    _add_target_options(parser)
    parser.set_defaults(run=run_convert)


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=whole(1),
        metavar="N",
        help="max_position_embeddings to write (default: the source's)",
    )
    parser.add_argument(
        "--shards", type=whole(1), metavar="N", help="files, with --to meta (default: 1)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=real("above 0", lambda size: size > 0),
        metavar="GB",
        help="of a file, with --to hf (default: 5)",
    )
    parser.add_argument(
        "--version",
        type=int,
        choices=[0, 1, 2],
        help="of llama2.c's format, with --to llama2c (default: 0; 2: int8)",
    )


ONLY_FOR = {
    "--shards": ("meta",),
    "--max-shard-size": ("hf",),
    "--version": ("llama2c",),
    "--dtype": ("hf", "meta"),
}


def _check_target_options(args: argparse.Namespace) -> None:
    for option, formats in ONLY_FOR.items():
        given = getattr(args, option[2:].replace("-", "_"))
        if given is not None and args.to not in formats:
            raise UsageError(f"{option} has no effect with --to {args.to}")


def run_convert(args: argparse.Namespace) -> int:
    """Convert, with a progress line on standard error if that is a terminal."""
    from llama_np.convert import convert

    _check_target_options(args)
    lines: list[Progress] = []

    def show(done: int, total: int) -> None:
        if not lines:
            lines.append(Progress("tensors", total))
        lines[0].advance()

    convert(
        args.source,
        args.out,
        args.to,
        dtype=args.dtype,
        overwrite=args.overwrite,
        shard_bytes=max(1, int((args.max_shard_size or 5) * 1e9)),
        shards=args.shards or 1,
        version=args.version or 0,
        context=args.context,
        progress=show,
    )
    note(f"wrote {Path(args.out)}")
    return 0
