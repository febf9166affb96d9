"""Read the cases of `reference_outputs/`, what transformers computed, as NumPy arrays.

    for case in recorded("forward", class_name="LlamaForCausalLM"):
        out = LlamaForCausalLM.from_pretrained(...)(**case.call_inputs(), **case.arguments)
        case.assert_close("logits", out.logits)

`reference_outputs/README.md` explains every field.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).resolve().parents[1] / "reference_outputs"

# What two float32 programs may differ by: the recorded runs move by up to 2e-6 when every weight
# moves by half a unit in the last place, and both programs round thousands of times.
TOLERANCE = 2e-5

# Names whose query axis is not the second one: attentions are (B, N, T, S), keys (B, K, S, H).
ROW_AXIS = {"attentions": 2, "past_key_values": 2}


@cache
def manifest() -> dict[str, Any]:
    """The manifest: environments, models, cases, tokenizers and the SHA-256 of every file."""
    return dict(json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Recorded:
    """One case: its entry of the manifest, its folder, and its arrays."""

    name: str
    entry: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        return FOLDER / "cases" / self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that are no arrays."""
        return dict(self.entry["arguments"])

    @property
    def config(self) -> dict[str, Any]:
        """The case's own config.json: the model's, with what the case changes."""
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))

    @property
    def weights_folder(self) -> Path:
        """A Hugging Face folder with the weights; its config.json is not the case's."""
        return (self.folder / self.entry["weights"]).resolve()

    def weights(self) -> dict[str, np.ndarray]:
        """The weights as float32; the bundled checkpoint's bfloat16 is widened exactly."""
        return widened((self.weights_folder / "model.safetensors").read_bytes())

    def inputs(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "inputs.safetensors")

    def outputs(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "outputs.safetensors")

    def calls(self) -> list[dict[str, Any]]:
        """What a tokenizer was asked, and what it returned or raised."""
        return list(json.loads((self.folder / "calls.json").read_text(encoding="utf-8")))

    @property
    def tokenizer_file(self) -> Path:
        """The SentencePiece model of a tokenizer case."""
        return (self.folder / self.entry["tokenizer"]).resolve()

    def call_inputs(self) -> dict[str, Any]:
        """The inputs as keyword arguments; past keys and values as the tuple of pairs."""
        given: dict[str, Any] = self.inputs()
        layers = sum(name.startswith("past_key_values.") for name in given) // 2
        names = [f"past_key_values.{i}." for i in range(layers)]
        pairs = tuple((given.pop(name + "key"), given.pop(name + "value")) for name in names)
        return given | ({"past_key_values": pairs} if pairs else {})

    def rows(self) -> np.ndarray | None:
        """Which tokens count, bool (B, T), or None when all do. Padded ones see nothing."""
        if self.entry["rows"] == "all":
            return None
        return np.asarray(self.inputs()["attention_mask"] == 1)

    def counted(self, name: str, array: np.ndarray) -> np.ndarray:
        """The part of an output that counts, token rows first."""
        rows, whole = self.rows(), np.asarray(array)
        if rows is None or whole.ndim < 3:
            return whole
        axis = ROW_AXIS.get(name.partition(".")[0], 1)
        return np.asarray(np.moveaxis(whole, axis, 1)[rows])

    def error(self, name: str, array: Any) -> float:
        """Relative L2 distance from the recorded output; infinite if inf, NaN or shape differ."""
        mine, truth = np.asarray(array), self.outputs()[name]
        if mine.shape != truth.shape:
            return float("inf")
        mine, truth = self.counted(name, mine), self.counted(name, truth)
        finite = np.isfinite(truth)
        if not np.array_equal(mine[~finite], truth[~finite], equal_nan=True):
            return float("inf")
        mine, truth = (each[finite].astype(np.float64) for each in (mine, truth))
        norm = float(np.linalg.norm(truth))
        distance = float(np.linalg.norm(mine - truth)) / (norm or 1.0)
        return distance if np.isfinite(distance) else float("inf")

    def assert_close(self, name: str, array: Any, tolerance: float = TOLERANCE) -> None:
        """Integers must be equal, floats within the tolerance."""
        truth = self.outputs()[name]
        if truth.dtype.kind in "iu":
            np.testing.assert_array_equal(np.asarray(array), truth, err_msg=f"{self.name}: {name}")
        else:
            error = self.error(name, array)
            assert error <= tolerance, f"{self.name}: {name} is off by {error:.1e}"


def widened(file: bytes) -> dict[str, np.ndarray]:
    """The float32 and bfloat16 tensors of a safetensors file, all as float32."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, tensor in header.items():
        begin, end = (start + offset for offset in tensor["data_offsets"])
        kind = np.uint16 if tensor["dtype"] == "BF16" else np.float32
        raw = np.frombuffer(file[begin:end], kind)
        wide = (raw.astype(np.uint32) << 16).view(np.float32) if kind is np.uint16 else raw
        arrays[name] = wide.reshape(tensor["shape"])
    return arrays


def recorded(call: str | None = None, **fields: Any) -> list[Recorded]:
    """The cases whose manifest entry has these values; `class_name` stands for "class".

    Information-only cases (low precision and 4.37.2's accidents) come with compare="information".
    """
    wanted = {"compare": "binding"} | fields | ({"call": call} if call else {})
    wanted = {name.removesuffix("_name"): value for name, value in wanted.items()}
    cases = [Recorded(name, entry) for name, entry in manifest()["cases"].items()]
    return [case for case in cases if all(case.entry.get(k) == v for k, v in wanted.items())]


def one(name: str) -> Recorded:
    """The case of that name."""
    return Recorded(name, manifest()["cases"][name])


def ids(cases: Sequence[Recorded]) -> list[str]:
    """Test ids for `pytest.mark.parametrize`."""
    return [case.name for case in cases]
