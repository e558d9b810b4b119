"""The matrix product of the CPU backend: by whichever of torch's own libraries is the faster on this CPU.

torch multiplies float32 with MKL, which keeps its AVX-512 code for Intel's CPUs. On others that have AVX-512, oneDNN,
which torch carries too, took half the time (``docs/design.md``). ``TDE_CPU_PRODUCT=mkl|onednn`` overrides.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as nnf

from tde_kernels.backends import core

# Below this many multiplications oneDNN's preparation costs more than it saves
_WORTH_ONEDNN = 5_000_000
# MKL multiplies rows with rows at half its speed where there are thousands of them
_ROWS_AT_ONCE = 512


def _choose() -> str:
    asked = os.environ.get("TDE_CPU_PRODUCT")
    if asked not in (None, "mkl", "onednn"):
        raise ValueError(f"TDE_CPU_PRODUCT must be mkl or onednn, got {asked!r}")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "mkl"
    if asked is not None:
        return asked
    if torch.__version__ < "2.12":  # as versions are ordered
        return "mkl"  # of 2.11 a signal that comes while oneDNN multiplies corrupts memory, whatever its handler does
    held_back = "AVX512" in torch.backends.cpu.get_cpu_capability() and core.missing is None
    return "onednn" if held_back and not core.compiled().build_info().intel_cpu else "mkl"


LIBRARY = _choose()
# Without instructions for it torch's product of bfloat16 takes from 6 to 300 times as long as that of float32
MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

# oneDNN's kernel for AMX takes whole tiles. Where a row's length is no multiple of theirs they end in the next row, and
# what is no number there enters the product, times zero: uxlfoundation/oneDNN#5717, in torch 2.11 to 2.15
_ROWS_LEAK, _TILE = MULTIPLIES_BF16 and torch.cpu._is_amx_tile_supported(), 32


def multiplied_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which operands of a product in ``dtype`` are multiplied: that, or float32 where it is faster."""
    return torch.float32 if dtype == torch.bfloat16 and not MULTIPLIES_BF16 else dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` of ``a [M, N]`` and ``b [P, N]``, any strides, in their common dtype."""
    if a.dtype != torch.float32:
        if _ROWS_LEAK and a.stride(1) == 1 and a.shape[1] % _TILE:
            a, b = _whole_tiles(a), _whole_tiles(b)
        return torch.mm(a, b.t())
    if LIBRARY == "onednn" and a.shape[0] * a.shape[1] * b.shape[0] > _WORTH_ONEDNN:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return result
    if max(a.shape[0], b.shape[0]) > _ROWS_AT_ONCE and a.stride(1) == 1 and b.stride(1) == 1:
        return _by_rows(a, b)
    return torch.mm(a, b.t())


def _whole_tiles(a: Tensor) -> Tensor:
    """``a`` with as many columns of zeros as make whole tiles, its columns or its rows side by side as they were."""
    missing = -a.shape[1] % _TILE
    return nnf.pad(a, (0, missing)) if a.stride(1) == 1 else nnf.pad(a.t(), (0, 0, 0, missing)).t()


def _by_rows(a: Tensor, b: Tensor) -> Tensor:
    """The product, some rows of the longer operand at a time."""
    out = a.new_empty((a.shape[0], b.shape[0]))
    along_a = a.shape[0] >= b.shape[0]
    for begin in range(0, out.shape[0 if along_a else 1], _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        if along_a:
            torch.mm(a[rows], b.t(), out=out[rows])
        else:
            torch.mm(a, b[rows].t(), out=out[:, rows])
    return out
