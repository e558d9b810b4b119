"""The compiled core, where there is one, and how tensors are handed to it.

``TDE_CORE`` in the environment names another build of it to load; tests so run the CUDA kernels emulated on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Loss, LossPass, Rows

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
if os.environ.get("TDE_CPU_ISA", "baseline") not in INSTRUCTION_SETS:
    raise ValueError(f"TDE_CPU_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got {os.environ['TDE_CPU_ISA']!r}")

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _load() -> ModuleType:
    elsewhere = os.environ.get("TDE_CORE")
    if not elsewhere:
        return importlib.import_module("tde_kernels._C")
    spec = importlib.util.spec_from_file_location("tde_kernels._C", elsewhere)
    if spec is None or spec.loader is None:
        raise ImportError(f"TDE_CORE={elsewhere} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# torch comes first: its OpenMP is then already loaded, and the core shares its threads instead of starting its own.
_core: ModuleType | None = None
missing: str | None = None
try:
    _core = _load()
except ImportError as error:
    missing = f"the compiled core is missing ({error}); reinstall with a C++ compiler at hand"


def compiled() -> ModuleType:
    """The core's module; callers have asked for ``missing`` before."""
    if _core is None:
        raise RuntimeError(missing)
    return _core


class Saved(NamedTuple):
    """Shape and dtype of what the logits of a backend keep for its backward, ``(0,)`` where that is nothing.

    A backend's ``saves`` lists them in the order of the op's outputs, from shapes and dtypes alone.
    """

    shape: Sequence[int]
    dtype: torch.dtype = torch.float32


class Kept(NamedTuple):
    """Those tensors, handed to the backward; :func:`kept` tells the empty ones."""

    x_hat: Tensor
    w_hat: Tensor
    x_norms: Tensor
    w_norms: Tensor
    along_x: Tensor


def dense_rows(a: Tensor) -> Tensor:
    """``a [R, N]`` itself where the columns of a row lie side by side, else a copy in which they do."""
    return a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous()


def matrix(a: Tensor) -> object:
    """``a [R, N]``, as the core sees it. The caller keeps ``a`` alive."""
    core = compiled()
    return core.Matrix(a.data_ptr(), getattr(core.DType, DTYPES[a.dtype]), a.shape[0], a.shape[1], a.stride(0))


def row_transform(rows: Rows) -> object:
    """How ``rows`` are scaled, as the core sees it. The caller keeps them alive."""
    offset, power = rows.factor
    small = map(address, (rows.divisor, rows.direction, rows.alpha))
    return compiled().RowTransform(rows.num_heads, offset, power, rows.scale, *small)


def cross_entropy(loss: Loss, classes: int) -> object:
    """The options of ``loss``, as the core sees them. The caller keeps its tensors alive."""
    tensors = map(address, loss[:7])
    return compiled().CrossEntropy(*tensors, classes, loss.ignore_index, loss.label_smoothing, loss.focal_exponent)


def loss_pass(what: LossPass) -> object:
    """The same for what is to be done with logits."""
    return compiled().LossPass(what.first, what.take, address(what.sums), address(what.losses), what.gradient)


def kept(a: Tensor) -> Tensor | None:
    """One of an op's :class:`Saved` outputs, or None where it is empty."""
    return a if a.dim() == 2 else None


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def mark_written(*tensors: Tensor | None) -> None:
    """Tells autograd of a write through a bare address, which it cannot see."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def float_vector(a: Tensor | None) -> Tensor | None:
    """``a`` as contiguous float32, the form of every small operand of the core."""
    return None if a is None else a.detach().to(torch.float32).contiguous()
