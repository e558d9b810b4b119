"""The compiled core, where there is one, and how tensors are handed to it.

``TDE_CORE`` in the environment names another build of it to load; tests so run the CUDA kernels emulated on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tde_kernels.backends.grouped import Grouped, Loss, LossPass, Rows
from tde_kernels.normalizers import NormFactor

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
    """Those tensors, None where there is nothing to keep."""

    x_hat: Tensor | None = None
    w_hat: Tensor | None = None
    x_norms: Tensor | None = None
    w_norms: Tensor | None = None
    along_x: Tensor | None = None

    @classmethod
    def unless_empty(cls, *tensors: Tensor | None) -> Kept:
        """Of an op's outputs, where an empty tensor stands for nothing."""
        return cls(*(a if a is not None and a.dim() == 2 else None for a in tensors))


def allocated(like: Tensor, saves: Sequence[Saved]) -> Kept:
    """Fresh tensors for what is to be kept."""
    return Kept(*(like.new_empty(shape, dtype=kind) if len(shape) == 2 else None for shape, kind in saves))


def dense_rows(a: Tensor) -> Tensor:
    """``a [R, N]`` itself where the columns of a row lie side by side, else a copy in which they do."""
    return a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous()


@cache
def _dtype(dtype: torch.dtype) -> object:
    return getattr(compiled().DType, DTYPES[dtype])


@cache
def _factor(factor: NormFactor) -> object:
    return compiled().NormFactor(*factor)


def operands(p: Grouped, x: Tensor, w: Tensor) -> object:
    """Those of ``p``, made dense, as the core sees them. The caller keeps them alive."""
    (batch, dim), classes = x.shape, w.shape[0]
    return compiled().Operands(
        x.data_ptr(),
        x.stride(0),
        w.data_ptr(),
        w.stride(0),
        _dtype(x.dtype),
        batch,
        dim,
        classes,
        p.heads,
        p.scale,
        _factor(p.feature_factor),
        _factor(p.weight_factor),
        address(p.class_scale),
        address(p.direction),
        address(p.alpha),
    )


def matrix(a: Tensor) -> object:
    """``a [R, N]``, as the core sees it. The caller keeps ``a`` alive."""
    return compiled().Matrix(a.data_ptr(), _dtype(a.dtype), *a.shape, a.stride(0))


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


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def mark_written(*tensors: Tensor | None) -> None:
    """Tells autograd of a write through a bare address, which it cannot see.

    Called before it is made: an interrupt that came in between would leave it unseen.
    """
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def float_vector(a: Tensor | None) -> Tensor | None:
    """``a`` as contiguous float32, the form of every small operand of the core."""
    if a is None or (a.dtype == torch.float32 and a.is_contiguous() and not a.requires_grad and not a.is_neg()):
        return a
    return a.detach().to(torch.float32).contiguous().resolve_neg()


def float_vectors(loss: Loss) -> Loss:
    """``loss`` with :func:`float_vector` of what it has of each class."""
    return loss._replace(
        class_weight=float_vector(loss.class_weight),
        logit_bias=float_vector(loss.logit_bias),
        margin=float_vector(loss.margin),
    )
