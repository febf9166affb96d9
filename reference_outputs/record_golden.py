"""Record the golden files in `golden/`, and which mistakes each of them can show.

    python reference_outputs/record_golden.py

Everything is drawn from fixed seeds: another run writes the same files, up to the last digits
that another BLAS computes. The sizes of every designed model differ from each other, norm
weights are far from 1 and of both signs, and queries are large enough for sharp attention, so
that a wrong reshape, a missing weight or a wrong scale cannot hide.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama_np.checkpoint import expected_shapes
from llama_np.config import config_from_dict
from llama_np.mutation import mutation_scores
from llama_np.trace import Golden, load_golden, record
from llama_np.weights import save_tensors

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Design:
    """A model that is drawn, and what is recorded of it."""

    config: dict[str, Any]
    ids: list[Any]
    decode: int
    chunks: tuple[int, ...] | None = None
    seed: int = 0
    real_words: int | None = None  # rows of the vocabulary beyond are padding
    about: str = ""
    points: str = "all"
    extra: dict[str, str] = field(default_factory=dict)


BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def text(length: int, words: int, seed: int) -> list[int]:
    """Random ids behind a beginning-of-sequence token; none of them repeats by design."""
    return [1, *np.random.default_rng(seed).integers(3, words, length - 1).tolist()]


DESIGNS: dict[str, Design] = {
    "grouped": Design(
        BASE
        | {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 3,
           "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
           "rope_theta": 10000.0, "tie_word_embeddings": False},
        text(18, 101, 1), 6, (11, 7), seed=1,
        about="grouped queries, untied head, two prefill chunks; what transformers 4.37 can run",
    ),
    "biased": Design(
        BASE
        | {"vocab_size": 97, "hidden_size": 42, "intermediate_size": 68, "num_hidden_layers": 3,
           "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14,
           "rms_norm_eps": 1e-6, "rope_theta": 500.0, "tie_word_embeddings": True,
           "attention_bias": True, "mlp_bias": True},
        text(17, 97, 2), 5, seed=2,
        about="biases everywhere, tied head, head_dim other than hidden_size / heads",
    ),
    "llama3": Design(
        BASE
        | {"vocab_size": 113, "hidden_size": 56, "intermediate_size": 84, "num_hidden_layers": 3,
           "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
           "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
           "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
        text(26, 113, 3), 6, seed=3,
        about="llama3 scaling whose three bands all matter within 32 tokens",
    ),
    "padded": Design(
        BASE
        | {"vocab_size": 128, "hidden_size": 36, "intermediate_size": 92, "num_hidden_layers": 2,
           "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
           "rope_theta": 10000.0, "tie_word_embeddings": False, "pad_token_id": 0},
        [text(15, 117, 4), text(9, 117, 5)], 5, seed=4, real_words=117,
        about="a left-padded batch of two texts, a vocabulary with padding rows",
    ),
}  # fmt: skip
BUNDLED = Design({}, [1, *range(300, 319)], 8, points="blocks", about="the bundled model")


def draw(design: Design) -> dict[str, np.ndarray]:
    """Weights for a design: nastier than trained ones."""
    rng = np.random.default_rng(design.seed)
    config = config_from_dict(design.config)
    shapes = expected_shapes(config)
    shapes.pop("score.weight")
    arrays = {name: _draw(rng, name, shape) for name, shape in shapes.items()}
    if config.tie_word_embeddings:
        arrays.pop("lm_head.weight")
    if design.real_words is not None:  # untrained rows: small, so that their logits are near 0
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            arrays[name][design.real_words :] *= 0.01
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("norm.weight"):
        return rng.uniform(0.4, 2.0, shape) * rng.choice([-1, 1], shape, p=[0.2, 0.8])
    if name.endswith("bias"):
        return rng.normal(0, 0.3, shape)
    if name.endswith("embed_tokens.weight"):
        return rng.normal(0, 0.3, shape)
    spread = 2.0 if "q_proj" in name else 1.0
    return rng.normal(0, spread / shape[-1] ** 0.5, shape)


def record_design(name: str, design: Design) -> Golden:
    """Write checkpoint and golden file of one design."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(design.config, indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    save_tensors(folder / "model.safetensors", draw(design), overwrite=True)
    return _recorded(name, folder, design)


def _recorded(name: str, model: str | Path, design: Design) -> Golden:
    golden = record(
        model, design.ids, decode=design.decode, chunks=design.chunks, points=design.points,
        about={"model": name, "description": design.about},
    )  # fmt: skip
    (FOLDER / name).mkdir(parents=True, exist_ok=True)
    golden.save(FOLDER / name / "golden.safetensors", overwrite=True)
    return load_golden(FOLDER / name / "golden.safetensors")


def main() -> None:
    """Write everything."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help writes nothing
    scores = {}
    for name, design in DESIGNS.items():
        golden = record_design(name, design)
        scores[name] = mutation_scores(golden, FOLDER / name)
        print(name, {p: s["score"] for p, s in scores[name].items()})
    golden = _recorded("fairytales", "fairytales", BUNDLED)
    scores["fairytales"] = mutation_scores(golden, "fairytales")
    print("fairytales", {p: s["score"] for p, s in scores["fairytales"].items()})
    text = json.dumps(scores, indent=1) + "\n"
    (FOLDER / "mutation_scores.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
