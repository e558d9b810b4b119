"""A classifier's weight out of the checkpoint of any network."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tde_trainer.errors import UserError
from tde_trainer.tensor_file import read_safetensors, read_tensors

log = logging.getLogger(__name__)

# What an array of numpy is rebuilt with: the paper's published code keeps its moving average as one.
_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]
_ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),  # as numpy 1 calls it, of whose day that code is
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    *{type(np.dtype(kind)) for kind in "fd"},
]


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """What a ``.safetensors`` file, or one of ``torch.save``, holds; runs no code of it.

    Raises:
        UserError: it is missing, corrupt, or more than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return read_safetensors(path)[0]
        except ValueError as error:
            raise UserError(f"cannot read {path}: {error}") from error
    with torch.serialization.safe_globals(_ARRAYS):
        content = read_tensors(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a mapping of names to tensors, got {type(content).__name__}")
    return content


def tensors_of(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors and arrays of nested mappings under their names, joined by dots."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from tensors_of(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor | np.ndarray):
            yield f"{prefix}{key}", torch.as_tensor(value)


def is_published(content: Mapping[str, Any]) -> bool:
    """Whether the paper's published code wrote it: then it has a moving average, by either of two names."""
    return any(name.split(".")[-1] in ("embed", "causal_embed") for name, _ in tensors_of(content))


def classifier_weight(content: Mapping[str, Any], key: str | None, width: int, num_classes: int) -> Tensor:
    """The weight ``[num_classes, width]``; a bias beside it is left out, with a warning if it is not zero.

    Args:
        content: see `read_checkpoint`.
        key: its name; None: the only one of that shape.
        width: of the features, D.
        num_classes: C.

    Raises:
        UserError: there is none, more than one, or it has another shape.
    """
    tensors = dict(tensors_of(content))
    wanted = (num_classes, width)
    fitting = [name for name, t in tensors.items() if tuple(t.shape) == wanted and t.is_floating_point()]
    if key is not None:
        if key not in tensors:
            raise UserError(f"--key {key}: no such tensor; of shape {list(wanted)} there are: {_list(fitting)}")
        if key not in fitting:
            raise UserError(f"--key {key} has shape {list(tensors[key].shape)}, wanted is {list(wanted)}")
    elif len(fitting) != 1:
        raise UserError(f"{len(fitting)} tensors have the shape {list(wanted)} ({_list(fitting)}); --key names one")
    name = key or fitting[0]
    bias = tensors.get(f"{name.removesuffix('weight')}bias")
    if bias is not None and bool(bias.any()):
        log.warning("the bias beside %s is left out: a normalised head has none", name)
    return tensors[name].float()


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) or "none"
