"""Block sizes and plans, as data: small sets for the tuner, and what is launched where it is not asked.

No figure here has been measured on a device yet: they are those that compile without spills for every architecture,
at the sizes where a tile is not mostly padding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from tde_kernels.backends.triton.arithmetic import INTERPRETED
from tde_kernels.backends.triton.launch import precision

Config = dict[str, int]


def _blocks(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# Tiles of the products, largest first. 64 rows are the least that Hopper's matrix instruction takes.
_TILES_16: tuple[Config, ...] = (
    _blocks(64, 128, 32, 8, 4),
    _blocks(64, 64, 64, 8, 3),
    _blocks(64, 32, 32, 4, 3),
    _blocks(64, 16, 32, 4, 2),
)
_TILES_32: tuple[Config, ...] = (
    _blocks(64, 64, 16, 8, 2),
    _blocks(64, 32, 16, 8, 3),
)
# For the tuner alone: larger ones, that spill on some architectures
_TRIED = (_blocks(128, 128, 32, 8, 4), _blocks(128, 64, 64, 8, 3), _blocks(64, 128, 64, 8, 3))
# Rows that do not start on 16 bytes are read element by element, with an address in registers for each
_TILES_UNALIGNED: tuple[Config, ...] = (
    _blocks(64, 32, 16, 4, 2),
    _blocks(64, 16, 16, 4, 2),
)
# In the interpreter a step takes as long whatever its size: large ones, though several to a ragged problem
_TILES_INTERPRETED: tuple[Config, ...] = (_blocks(128, 128, 64, 8, 1),)
# Elements of a tile that registers hold three times over
_KEPT = 128 * 128 if INTERPRETED.value else 64 * 32
# Tiles enough to occupy a device; the interpreter runs one at a time
_OCCUPIED = 1 if INTERPRETED.value else 100


def aligned(a: Tensor) -> bool:
    """Whether every row is read 16 bytes at a time."""
    return a.stride(1) == 1 and a.stride(0) * a.element_size() % 16 == 0 and a.data_ptr() % 16 == 0


def tiles(m: int, n: int, inner: int, operands: Sequence[Tensor], *, columns: int = 1) -> list[Config]:
    """Blocks for ``columns`` products of ``m`` rows, ``n`` columns and a sum over ``inner``, the preferred first.

    That is the largest which makes tiles enough. Only the smallest may be twice the size of what it covers.
    """
    if INTERPRETED.value:
        table = _TILES_INTERPRETED
    elif not all(map(aligned, operands)):
        table = _TILES_UNALIGNED
    else:
        table = _TILES_32 if any(a.dtype == torch.float32 for a in operands) else _TILES_16
    deepest = max(16, triton.next_power_of_2(inner))
    fitting = [c for c in table[:-1] if c["BLOCK_M"] < 2 * m and c["BLOCK_N"] < 2 * n] + [table[-1]]
    choices = [{**c, "BLOCK_K": min(c["BLOCK_K"], deepest)} for c in fitting]

    def occupies(c: Config) -> bool:
        occupied: bool = triton.cdiv(m, c["BLOCK_M"]) * triton.cdiv(n, c["BLOCK_N"]) * columns >= _OCCUPIED
        return occupied

    preferred = next(filter(occupies, choices), choices[-1])
    return [preferred, *(c for c in choices if c is not preferred), *(_TRIED if table is _TILES_16 else ())]


def tiles_kept(m: int, n: int, inner: int, operands: Sequence[Tensor]) -> Config:
    """Blocks for a product whose tiles are worked on in registers, with more than one at once: of middling size."""
    choices = [c for c in tiles(m, n, inner, operands) if c["BLOCK_M"] * c["BLOCK_N"] <= _KEPT]
    largest = max(choices, key=lambda c: c["BLOCK_M"] * c["BLOCK_N"])
    return {**largest, "num_warps": 8}


def splits(tiles_m: int, tiles_n: int) -> int:
    """Into how many shares a loop over ``tiles_n`` column tiles is split, so that the programs occupy a device."""
    wanted: int = triton.cdiv(4 * _OCCUPIED, max(tiles_m, 1))
    return max(1, min(tiles_n, wanted))


def whole_rows(columns: int) -> Config:
    """Blocks for a pass over whole rows: through long ones step by step, over some short ones together."""
    elements, most = (2**14, 64) if INTERPRETED.value else (512, 4)  # with more a row's own numbers fill the registers
    width = max(16, min(1024, triton.next_power_of_2(columns)))
    together = max(1, min(elements // width, most))
    return {"BLOCK_ROWS": together, "BLOCK_COLUMNS": width, "num_warps": 4, "num_stages": 2}


def heads_of_rows(width: int, *, vectors: bool) -> Config:
    """Blocks for a pass over rows head by head, ``width`` columns each, of which ``vectors`` are read at a time."""
    elements = 2**14 if INTERPRETED.value else 2048 if vectors else 512
    columns = min(triton.next_power_of_2(width), elements)
    return {"BLOCK_ROWS": elements // columns, "BLOCK_COLUMNS": columns, "num_warps": 4, "num_stages": 2}


# Multiplications of a product above which a library's, between two passes over its operands, is taken to be faster.
# In float32 to the last bit Triton multiplies without tensor cores and far behind cuBLAS. In 16 bits the forward is one
# pass at any size; the backward is one where a tile spans a head, and two (product, projection) where it does not.
_LIBRARY_FROM = {
    ("forward", "exact"): 2**26,
    ("backward", "exact"): 2**26,
    ("forward", "tensor cores"): None,
    ("backward", "tensor cores"): None,
}
PLANS = ("table", "single", "library")
plan = os.environ.get("TDE_TRITON_PLAN", "table")
if plan not in PLANS:
    raise ValueError(f"TDE_TRITON_PLAN must be one of {', '.join(PLANS)}, got {plan!r}")


def around_library(direction: str, m: int, n: int, inner: int, dtype: torch.dtype) -> bool:
    """Whether a product of ``m`` rows, ``n`` columns and a sum over ``inner`` is left to a library."""
    if plan != "table":
        return plan == "library"
    exact = dtype == torch.float32 and precision() == "ieee"
    least = _LIBRARY_FROM[direction, "exact" if exact else "tensor cores"]
    return least is not None and m * n * inner >= least
