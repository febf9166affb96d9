"""Record what transformers computes, for every case of `cases.py`. See README.md.

    python reference_outputs/record.py             # transformers 4.37.2: almost everything
    python reference_outputs/record.py --newest    # the newest: llama3, yarn, longrope, head_dim, …
    python reference_outputs/record.py --only 'bundled-*' 'tokenizer-*'   # a new bundled model
    python reference_outputs/record.py --check     # record elsewhere and compare with what is here

Needs torch, transformers and safetensors, and nothing of llama_np but its checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import hashlib
import inspect
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import BUNDLED, Case, all_cases
from models import MODELS, Arrays, seed, weights
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from tokenizer_cases import TokenizerCase, tokenizer_cases
from transformers import (
    AddedToken,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlamaTokenizer,
    LlamaTokenizerFast,
)
from transformers.generation import logits_process

HERE = Path(__file__).resolve().parent
OLD = "4.37.2"
PACKAGES = "numpy safetensors sentencepiece tokenizers torch transformers".split()
CLASSES = {
    cls.__name__: cls for cls in (LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel)
}
NUDGE = 2.0**-24  # half a unit in the last place of float32: what rounding does to every weight


def build(case: Case, arrays: Arrays) -> Any:
    """The eager model of a case. Its rotary tables get the case's dtype, as when it is loaded."""
    config = LlamaConfig.from_dict(case.full_config(), attn_implementation="eager")
    torch.set_default_dtype(getattr(torch, case.dtype))
    model = CLASSES[case.class_name](config).eval()
    torch.set_default_dtype(torch.float32)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if case.class_name == "LlamaModel":
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    model.load_state_dict({name: state[name] for name in model.state_dict()}, strict=True)
    assert model.config._attn_implementation == "eager"
    return model


def weights_of(case: Case) -> Arrays:
    """The arrays behind a case; the bundled checkpoint's bfloat16 is widened, which is exact."""
    if case.model != "bundled":
        return weights(case.model)
    tensors = load_tensors(BUNDLED / "model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def tensors(case: Case) -> dict[str, Any]:
    """The inputs as the call takes them; `past_key_values.0.key` and so on become the tuple."""
    found: dict[str, Any] = {}
    past: dict[tuple[int, str], torch.Tensor] = {}
    for name, array in case.inputs.items():
        tensor = torch.from_numpy(array.copy())
        if name.startswith("past_key_values."):
            past[int(name.split(".")[1]), name.split(".")[2]] = tensor
        else:
            found[name] = tensor.to(model_dtype(case)) if name == "inputs_embeds" else tensor
    if past:
        pairs = range(len(past) // 2)
        found["past_key_values"] = tuple((past[i, "key"], past[i, "value"]) for i in pairs)
    return found


def model_dtype(case: Case) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, case.dtype)
    return dtype


def run_forward(case: Case, arrays: Arrays) -> Arrays:
    return flat(build(case, arrays)(**tensors(case), **case.arguments))


def run_chunks(case: Case, arrays: Arrays) -> Arrays:
    """Feed the columns piece by piece; the mask of a piece covers everything up to its end."""
    model, given, start, past = build(case, arrays), tensors(case), 0, None
    logits = []
    for size in case.chunks:
        end = start + size
        step = {k: v[:, start:end] for k, v in given.items() if k != "attention_mask"}
        if "attention_mask" in given:
            step["attention_mask"] = given["attention_mask"][:, :end]
        out = model(**step, past_key_values=past, **case.arguments)
        logits.append(out.logits)
        past, start = out.past_key_values, end
    return flat({"logits": torch.cat(logits, 1), "past_key_values": past})


def run_generate(case: Case, arrays: Arrays) -> Arrays:
    out = build(case, arrays).generate(**tensors(case), **case.arguments)
    found = {"sequences": out.sequences}
    if out.scores is not None:
        found["scores"] = torch.stack(out.scores)
    for name in ("sequences_scores", "beam_indices"):
        found[name] = getattr(out, name, None)
    return flat(found)


def run_first_scores(case: Case, arrays: Arrays) -> Arrays:
    """Everything before the draw is deterministic; the drawn id is not recorded."""
    torch.manual_seed(0)
    out = build(case, arrays).generate(**tensors(case), **case.arguments)
    return flat({"scores": out.scores[0]})


def run_processors(case: Case, arrays: Arrays) -> Arrays:
    """Each processor takes the scores that the one before it gave."""
    given = tensors(case)
    scores = given["scores"]
    for name, options in case.arguments["processors"]:
        scores = getattr(logits_process, name)(**options)(given["input_ids"], scores)
    return flat({"scores": scores})


RUN: dict[str, Callable[[Case, Arrays], Arrays]] = {
    "forward": run_forward,
    "chunks": run_chunks,
    "generate": run_generate,
    "first_scores": run_first_scores,
    "processors": run_processors,
}


def flat(output: Any) -> Arrays:
    """Name every tensor of an output: logits, hidden_states.0, past_key_values.0.key, …"""
    found: Arrays = {}
    for name, value in output.items():
        if name == "past_key_values":
            for i, pair in enumerate(value):
                found[f"{name}.{i}.key"], found[f"{name}.{i}.value"] = map(as_array, pair[:2])
        elif isinstance(value, tuple):
            found |= {f"{name}.{i}": as_array(part) for i, part in enumerate(value)}
        elif value is not None:
            found[name] = as_array(value)
    return found


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Contiguous; half-precision values are widened to float32, which is exact."""
    tensor = tensor.detach()
    wide = tensor.float() if tensor.is_floating_point() else tensor
    return np.array(wide.numpy(), order="C")


def nudged(arrays: Arrays) -> Arrays:
    """Weights moved by half a unit in the last place, up or down at random."""
    random = np.random.RandomState(7)
    signs = {k: random.choice([-NUDGE, NUDGE], v.shape) for k, v in arrays.items()}
    return {k: (v * (1.0 + signs[k])).astype(np.float32) for k, v in arrays.items()}


def sensitivity(outputs: Arrays, others: Arrays) -> float:
    """The largest relative L2 distance of a float output from the nudged run; ids must agree."""
    worst = 0.0
    for name, array in outputs.items():
        if array.dtype.kind != "f":
            if not np.array_equal(array, others[name]):
                raise SystemExit(f"{name} depends on rounding: choose other inputs")
            continue
        finite = np.isfinite(array)
        mine, other = (a[finite].astype(np.float64) for a in (array, others[name]))
        norm = float(np.linalg.norm(mine))
        worst = max(worst, float(np.linalg.norm(mine - other)) / norm if norm else 0.0)
    return worst


def record(case: Case, folder: Path) -> dict[str, Any]:
    """Run one case, write its folder, and return its entry of the manifest."""
    arrays = weights_of(case)
    with torch.inference_mode():
        outputs = RUN[case.call](case, arrays)
        moved = RUN[case.call](case, nudged(arrays))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", case.full_config())
    save(folder / "inputs.safetensors", case.inputs)
    save(folder / "outputs.safetensors", outputs)
    return entry(case, outputs) | {"sensitivity": float(f"{sensitivity(outputs, moved):.1e}")}


def entry(case: Case, outputs: Arrays) -> dict[str, Any]:
    described: dict[str, Any] = {
        "shows": case.shows,
        "environment": case.environment,
        "implementation": f"transformers {transformers.__version__}, eager",
        "dtype": case.dtype,
        "class": case.class_name,
        "call": case.call,
        "arguments": case.arguments,
        "weights": weights_folder(case),
        "rows": case.rows,
        "compare": case.compare,
        "inputs": {name: describe(array) for name, array in case.inputs.items()},
        "outputs": {name: describe(array) for name, array in outputs.items()},
    }
    return described | ({"chunks": list(case.chunks)} if case.chunks else {})


def weights_folder(case: Case) -> str:
    """The weights' folder as seen from the case's folder."""
    if case.model == "bundled":
        return "../../../" + BUNDLED.relative_to(HERE.parent).as_posix()
    return f"../_models/{case.model}"


def describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def save(path: Path, arrays: Arrays) -> None:
    """Write copies in C order (strided arrays would be stored wrongly); "pt" is what
    transformers insists on."""
    whole = {name: np.array(array, order="C") for name, array in arrays.items()}
    save_file(whole, path, metadata={"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


# --- tokenizers ------------------------------------------------------------------------------

TOKENIZERS = {cls.__name__: cls for cls in (LlamaTokenizer, LlamaTokenizerFast)}


def record_tokenizer(case: TokenizerCase, folder: Path) -> dict[str, Any]:
    """Build the tokenizer, ask it everything, write the answers."""
    model = BUNDLED / "tokenizer.model"
    tokenizer = TOKENIZERS[case.class_name](str(model), **case.arguments)
    for method, positional, keywords in case.setup:
        tokens = [[AddedToken(**token) for token in positional[0]]]
        getattr(tokenizer, method)(*tokens, **keywords)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "calls.json", [answered(tokenizer, call) for call in case.calls])
    return {
        "shows": case.shows,
        "environment": OLD,
        "implementation": f"transformers {transformers.__version__}",
        "class": case.class_name,
        "call": "tokenizer",
        "arguments": case.arguments,
        "setup": case.setup,
        "tokenizer": "../../../" + model.relative_to(HERE.parent).as_posix(),
        "compare": case.compare,
    }


def answered(tokenizer: Any, call: list[Any]) -> dict[str, Any]:
    """The call with what it returned, or the name of what it raised."""
    method, positional, keywords = call
    asked = {"method": method, "arguments": positional, "keywords": keywords}
    own = copy.deepcopy(positional)  # decode changes the list that it is given
    try:
        return asked | {"result": plain(getattr(tokenizer, method)(*own, **keywords))}
    except Exception as error:  # noqa: BLE001 - whatever it is, transformers does it
        return asked | {"raises": type(error).__name__}


def plain(value: Any) -> Any:
    """The answer as JSON: arrays become lists."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """A JSON list, one element per line."""
    lines = ",\n".join(json.dumps(value, ensure_ascii=True) for value in values)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


# --- the whole -------------------------------------------------------------------------------


def write_models(root: Path) -> dict[str, Any]:
    """Write every model folder; 4.37.2 reads those without head_dim and mlp_bias unchanged."""
    described = {}
    for name, config in MODELS.items():
        folder, arrays = root / "cases" / "_models" / name, weights(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
        save(folder / "model.safetensors", arrays)
        count = sum(array.size for array in arrays.values())
        described[name] = {"seed": seed(name), "parameters": count}
    return described


def environment(arguments: list[str]) -> dict[str, Any]:
    """What made the files: versions, kernels, command."""
    return {
        "command": " ".join(["python", "reference_outputs/record.py", *arguments]),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
    }


def files(root: Path) -> Iterator[Path]:
    """Everything recorded, in a fixed order."""
    yield from sorted(path for path in (root / "cases").rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bundled_files() -> list[Path]:
    """What the bundled-* and tokenizer-* cases were computed from."""
    return [BUNDLED / name for name in ("config.json", "model.safetensors", "tokenizer.model")]


def read_manifest(root: Path) -> dict[str, Any]:
    path = root / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record_all(root: Path, newest: bool, only: list[str]) -> None:
    """Record the cases of this environment below `root` and bring its manifest up to date."""
    here, old = "newest" if newest else OLD, read_manifest(root)
    wanted = {case.name: case for case in [*all_cases(), *tokenizer_cases()]}
    entries = {k: v for k, v in old.get("cases", {}).items() if k in wanted}
    for name, case in wanted.items():
        if case.environment == here and any(fnmatch.fnmatch(name, each) for each in only):
            one = record if isinstance(case, Case) else record_tokenizer
            entries[name] = one(case, root / "cases" / name)
            print(f"{name:36} sensitivity {entries[name].get('sensitivity', 0):.1e}")
    remove_strangers(root, set(wanted))
    manifest = {
        "format": 1,
        "environments": old.get("environments", {})
        | {here: environment(["--newest"] if newest else [])},
        "models": write_models(root),
        "bundled": {path.name: sha256(path) for path in bundled_files()},
        "cases": {name: entries[name] for name in wanted if name in entries},
        "files": {str(p.relative_to(root).as_posix()): sha256(p) for p in files(root)},
    }
    write_json(root / "manifest.json", manifest)


def remove_strangers(root: Path, known: set[str]) -> None:
    """A case that no longer exists leaves no folder behind."""
    for folder in (root / "cases").iterdir():
        if folder.is_dir() and folder.name != "_models" and folder.name not in known:
            shutil.rmtree(folder)


def check(newest: bool, only: list[str]) -> int:
    """Record into a scratch folder and report each file that differs, with the distance."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        record_all(fresh, newest, only)
        different = [p for p in files(fresh) if sha256(p) != sha256(HERE / p.relative_to(fresh))]
        for path in different:
            name = path.relative_to(fresh)
            print(f"differs: {name} {distance(path, HERE / name)}")
        print(f"{len(list(files(fresh)))} files recorded again, {len(different)} differ")
    return bool(different)


def distance(path: Path, other: Path) -> str:
    if path.suffix != ".safetensors":
        return "(text)"
    return f"relative {sensitivity(load_file(path), load_file(other)):.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or ""))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--newest", action="store_true", help="the cases that 4.37.2 cannot run")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="patterns of names"
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    if (transformers.__version__ == OLD) == arguments.newest:
        raise SystemExit(f"this is transformers {transformers.__version__}: see --newest")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if arguments.check:
        return check(arguments.newest, arguments.only)
    record_all(HERE, arguments.newest, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
