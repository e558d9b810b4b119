"""Checkpoints of the paper's published code: where the classifier's weight and the moving average lie in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# By the last part of a key: of its classifiers, of its detectors
WEIGHTS = ("weight", "fc_cls")
AVERAGES = ("embed", "causal_embed")


def _leaves(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _named(leaves: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of the leaves, which may be anything, whose key ends in one of ``names``."""
    return {key: torch.as_tensor(value) for key, value in leaves.items() if key.split(".")[-1] in names}


def _one(found: dict[str, Tensor], wanted: str, keys: list[str]) -> Tensor:
    if len(found) == 1:
        return next(iter(found.values()))
    what = f"{len(found)}: {', '.join(list(found)[:8])}" if found else f"none; its tensors are: {', '.join(keys[:8])}"
    raise ValueError(f"state must hold one {wanted}, got {what}")


def read(state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The classifier's weight ``[C, D]`` and the moving average ``[D]`` in float32.

    Where a whole network is in ``state``, the weight is the matrix of D columns under a key that names a classifier.

    Raises:
        TypeError: ``state`` is no mapping.
        ValueError: one of the two is missing, ambiguous or of another width.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping, got {type(state).__name__}")
    leaves = {key: value for key, value in _leaves(state) if isinstance(value, (Tensor, np.ndarray, list))}
    averages = {key: t.reshape(-1) for key, t in _named(leaves, AVERAGES).items()}
    ema = _one(averages, "moving average under 'embed'", list(leaves)).float()
    weights = {key: t for key, t in _named(leaves, WEIGHTS).items() if t.dim() == 2}
    if len(weights) > 1:
        named = {key: t for key, t in weights.items() if "classifier" in key or {"fc", "fc_cls"} & {*key.split(".")}}
        weights = {key: t for key, t in (named or weights).items() if t.shape[1] == ema.shape[0]}
    weight = _one(weights, "classifier weight [C, D] under a key that ends in 'weight'", list(leaves))
    if weight.shape[1] != ema.shape[0]:
        raise ValueError(f"embed must have shape ({weight.shape[1]},) as the weight's columns, got {tuple(ema.shape)}")
    return weight, ema
