"""Files of `torch.save`, our own or other people's: tensors alone, so that reading one can run no code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from tde_trainer.errors import UserError


def read_tensors(path: Path) -> Any:
    """What the file holds, on the CPU.

    Raises:
        UserError: it is missing, damaged, or more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle it can be any
        raise UserError(f"cannot read {path}: it is corrupt: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Torch follows its first sentence with pages of advice; an EOFError has no text at all."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_sums(path: Path) -> None:
    """Torch itself writes the sums of all parts, but does not look at them when it reads."""
    if not zipfile.is_zipfile(path):
        return  # as torch saved before 1.6, without sums
    with zipfile.ZipFile(path) as parts:
        damaged = parts.testzip()
    if damaged is not None:
        raise ValueError(f"the check sum of {damaged} is wrong")
