"""Files of tensors, our own or other people's: of them alone, so that reading one can run no code, and undamaged."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from tde_trainer.errors import UserError
from tde_trainer.files import write_atomic

_SUM = "check_sum"  # among a file's metadata


def read_tensors(path: Path) -> Any:
    """What a file of `torch.save` holds, on the CPU.

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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and texts, atomically, and a check sum of both: the format itself has none."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, serialized(content, {**metadata, _SUM: _sum(content, metadata)}))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a ``.safetensors`` file, ours or other people's, which have no sum to compare.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # the handle itself can't be iterated
            tensors, metadata = {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(one_line(error)) from error
    written = metadata.pop(_SUM, None)
    if written is not None and written != _sum(tensors, metadata):
        raise ValueError("its check sum is wrong")
    return tensors, metadata


def _sum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    found = zlib.crc32(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
