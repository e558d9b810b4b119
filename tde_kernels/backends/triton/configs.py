"""Block sizes and plans, as data: small sets for the tuner, and what is launched where it is not asked.

No figure here has been measured on a device yet: they are those that compile without spills for every architecture,
at the sizes where a tile is not mostly padding.
"""

from __future__ import annotations

import os

import torch
import triton

from tde_kernels.backends.triton.launch import precision

Config = dict[str, int]


def _blocks(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# Tiles of the products, largest first: for operands of 16 bits, and for float32
_TILES_16 = (
    _blocks(128, 128, 64, 8, 3),
    _blocks(64, 128, 64, 4, 3),
    _blocks(64, 64, 64, 4, 4),
    _blocks(32, 64, 64, 4, 4),
    _blocks(32, 32, 64, 4, 4),
    _blocks(16, 16, 64, 2, 4),
)
_TILES_32 = (
    _blocks(64, 64, 32, 4, 3),
    _blocks(64, 32, 32, 4, 3),
    _blocks(32, 32, 32, 4, 3),
    _blocks(16, 16, 32, 2, 3),
)
# Tiles enough to occupy a device of this many multiprocessors
_OCCUPIED = 100


def _tiles(dtypes: tuple[torch.dtype, ...]) -> tuple[Config, ...]:
    return _TILES_32 if torch.float32 in dtypes else _TILES_16


def tiles(m: int, n: int, inner: int, *dtypes: torch.dtype, columns: int = 1) -> list[Config]:
    """Blocks for ``columns`` products of ``m`` rows, ``n`` columns and a sum over ``inner``, the preferred first.

    That is the largest which makes tiles enough. No block is twice the size of what it covers.
    """
    fitting = [c for c in _tiles(dtypes) if c["BLOCK_M"] < 2 * max(m, 16) and c["BLOCK_N"] < 2 * max(n, 16)]
    deepest = max(16, triton.next_power_of_2(inner))
    choices = [{**c, "BLOCK_K": min(c["BLOCK_K"], deepest)} for c in fitting]

    def occupies(c: Config) -> bool:
        return triton.cdiv(m, c["BLOCK_M"]) * triton.cdiv(n, c["BLOCK_N"]) * columns >= _OCCUPIED

    preferred = next(filter(occupies, choices), choices[-1])
    return [preferred, *(c for c in choices if c is not preferred)]


def tiles_kept(m: int, n: int, inner: int, *dtypes: torch.dtype) -> Config:
    """Blocks for a product whose tiles are worked on in registers, with more than one at once: of middling size."""
    largest = 64 * 64
    choices = [c for c in tiles(m, n, inner, *dtypes) if c["BLOCK_M"] * c["BLOCK_N"] <= largest]
    return max(choices, key=lambda c: c["BLOCK_M"] * c["BLOCK_N"])


def splits(tiles_m: int, tiles_n: int) -> int:
    """Into how many shares a loop over ``tiles_n`` column tiles is split, so that the programs occupy a device."""
    return max(1, min(tiles_n, triton.cdiv(4 * _OCCUPIED, max(tiles_m, 1))))


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
