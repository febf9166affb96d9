"""The losses that the documented models compute when they are given labels.

All are means, as scalars in the dtype of the logits. Labels of -100 do not count.
"""

from __future__ import annotations

import numpy as np

from llama_np.errors import ConfigError
from llama_np.sampling import log_softmax

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


def next_token_loss(logits: np.ndarray, labels: np.ndarray) -> np.floating:
    """Cross-entropy of every token given those before it: (B, T, V), (B, T) -> scalar.

    The logits at t are compared with the label at t + 1. NaN when no label counts.
    Errors: ValueError for shapes that differ, IndexError for a label outside the vocabulary.
    """
    labels = np.asarray(labels)
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels have shape {labels.shape}, expected {logits.shape[:2]}")
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.floating:
    """Mean of -log(probability of the label): (..., V), (...) -> scalar. Errors: IndexError."""
    V = logits.shape[-1]
    rows, targets = logits.reshape(-1, V), _whole(labels).reshape(-1)
    counted = targets != IGNORED
    rows, targets = rows[counted], targets[counted]
    wrong = targets[(targets < 0) | (targets >= V)]
    if wrong.size:
        raise IndexError(f"label {wrong[0]} is outside 0 ... {V - 1}")
    if not targets.size:
        return logits.dtype.type(np.nan)
    return -log_softmax(rows)[np.arange(len(rows)), targets].mean()


def _whole(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels are {labels.dtype}, expected integers")
    return labels.astype(np.int64, copy=False)


def mean_squared_error(predicted: np.ndarray, targets: np.ndarray) -> np.floating:
    """Mean of (predicted - targets)^2 over arrays of one shape. Errors: ValueError."""
    targets = np.asarray(targets).astype(predicted.dtype, copy=False)
    if targets.shape != predicted.shape:
        raise ValueError(f"labels have shape {targets.shape}, expected {predicted.shape}")
    return np.square(predicted - targets).mean()


def binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.floating:
    """Mean of -y log s(x) - (1 - y) log(1 - s(x)), s the sigmoid, without overflow.

    Both arrays have the shape (B, C). Errors: ValueError.
    """
    targets = np.asarray(targets).astype(logits.dtype, copy=False)
    if targets.shape != logits.shape:
        raise ValueError(f"labels have shape {targets.shape}, expected {logits.shape}")
    softplus = np.log1p(np.exp(-np.abs(logits)))
    return (np.maximum(logits, 0) - logits * targets + softplus).mean()


def infer_problem_type(labels: np.ndarray, num_labels: int) -> str:
    """What kind of labels these are, when the configuration does not say.

    Whole numbers of shape (B, C) are several labels per text, also where 4.37.2 takes them for
    one label per text and fails.
    """
    labels = np.asarray(labels)
    if num_labels == 1:
        return "regression"
    several = labels.ndim == 2 and labels.shape[1] == num_labels
    if np.issubdtype(labels.dtype, np.integer) and not several:
        return "single_label_classification"
    return "multi_label_classification"


def classification_loss(logits: np.ndarray, labels: np.ndarray, problem_type: str) -> np.floating:
    """The loss of a classifier: (B, C) and labels that fit `problem_type` -> scalar.

    "regression" (mean squared error; a single output is squeezed), "single_label_classification"
    (class numbers (B) or (B, 1)) or "multi_label_classification" (0 or 1 for each class, (B, C)).
    Errors: ValueError for shapes that do not fit, IndexError for an unknown class, ConfigError.
    """
    labels = np.asarray(labels)
    if problem_type == "regression":
        if logits.shape[-1] == 1:
            return mean_squared_error(logits.squeeze(), labels.squeeze())
        return mean_squared_error(logits, labels)
    if problem_type == "multi_label_classification":
        return binary_cross_entropy(logits, labels)
    if problem_type != "single_label_classification":
        raise ConfigError(f"problem_type = {problem_type!r} is not known")
    if labels.size != len(logits):
        raise ValueError(f"labels have shape {labels.shape}, expected ({len(logits)},)")
    return cross_entropy(logits, labels)
