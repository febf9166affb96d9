"""What the tests of the oracle share: a tiny model, its golden file, and dumps of changed runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from models import tiny_model

from llama_np.experiment import FLOAT32, Precision, Run, evaluate
from llama_np.mistakes import BY_ID, variants
from llama_np.trace import Golden, record, run_of

SHIPPED = Path(__file__).parents[1] / "reference_outputs" / "golden"
IDS = [1, 17, 23, 8, 40, 31, 5, 12, 29, 36, 11, 19]


@cache
def tiny() -> tuple[Any, Any]:
    """(config, float32 weights) of the model that the golden file belongs to."""
    return tiny_model(np.float32, bos_token_id=1, max_position_embeddings=64)


@cache
def golden() -> Golden:
    """12 tokens in two calls, and 4 decode steps."""
    return record(tiny(), IDS, decode=4, chunks=(7, 5))


def plain() -> Run:
    """The run that the golden file recorded."""
    return run_of(golden(), tiny()[1])


def dump(run: Run, precision: Precision = FLOAT32) -> dict[str, np.ndarray]:
    """What a port that computes this run would write."""
    trace, tokens = evaluate(run, precision)
    rows = slice(None) if run.rows is None else run.rows
    return {"input_ids": tokens[:, rows], **trace}


def mistaken(name: str, form: int = 0, precision: Precision = FLOAT32) -> dict[str, np.ndarray]:
    """The dump of a model with a known mistake."""
    return dump(variants(BY_ID[name], plain())[form], precision)
