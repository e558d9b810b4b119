"""Which way of computing serves which size on a GPU: numbers as data, and the device they were measured on.

A size is the multiplications of the product, ``B * C * D``. ``TDE_CUDA_PLAN`` overrides how the CUDA backend computes
logits, where that can: ``small`` (one launch each way), ``tiled`` (one pass on tensor cores), ``hopper`` (the same with
that architecture's own instructions), ``product`` (cuBLAS between passes over its operands).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

MEASURED_ON = "no device yet; these are estimates"


class Crossover(NamedTuple):
    """``choice`` serves sizes below ``below``; None means all that are left."""

    below: int | None
    choice: str


# The backend tried first: float32 to the last bit, and what tensor cores multiply. A launch of Triton's costs more than
# a small product; on Hopper its matrix instruction is the faster one; the largest products are cuBLAS's.
FIRST: dict[str, dict[str, tuple[Crossover, ...]]] = {
    "logits": {
        "exact": (Crossover(None, "cuda"),),
        "tensor cores": (Crossover(2**26, "cuda"), Crossover(2**32, "triton"), Crossover(None, "cuda")),
    },
    # the products are cuBLAS's with either
    "cross_entropy": {"exact": (Crossover(None, "cuda"),), "tensor cores": (Crossover(None, "cuda"),)},
    # the CUDA backend stores the logits and sorts them; Triton's kernels do not
    "alpha_sweep": {"exact": (Crossover(None, "triton"),), "tensor cores": (Crossover(None, "triton"),)},
    "topk": {"exact": (Crossover(None, "triton"),), "tensor cores": (Crossover(None, "triton"),)},
}
# How the CUDA backend computes logits where its small kernels do not serve
LOGITS: dict[str, tuple[Crossover, ...]] = {
    "exact": (Crossover(None, "product"),),
    "tensor cores": (Crossover(2**32, "tiled"), Crossover(None, "product")),
}
# The instructions of the one pass, where both can serve: a warpgroup's tile is twice as wide, for fewer blocks
TILED = (Crossover(2**26, "tiled"), Crossover(None, "hopper"))
PLANS = ("table", "small", "tiled", "hopper", "product")
plan = os.environ.get("TDE_CUDA_PLAN", "table")
if plan not in PLANS:
    raise ValueError(f"TDE_CUDA_PLAN must be one of {', '.join(PLANS)}, got {plan!r}")


def arithmetic(dtype: torch.dtype) -> str:
    """The column of the tables: whether products of ``dtype`` go through tensor cores, torch's own flags asked."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "exact" if exact else "tensor cores"


def choose(table: tuple[Crossover, ...], size: int) -> str:
    """The choice for a size."""
    return next(c.choice for c in table if c.below is None or size < c.below)


def first_backend(op: str, dtype: torch.dtype, size: int) -> str:
    """The backend to try first for ``op`` on a CUDA device."""
    return choose(FIRST[op][arithmetic(dtype)], size) if op in FIRST else "cuda"


def report() -> list[str]:
    """The tables, a line each."""

    def line(name: str, column: str, table: tuple[Crossover, ...]) -> str:
        steps = [
            f"{c.choice} below 2^{c.below.bit_length() - 1}"
            if c.below
            else f"{c.choice} beyond"
            if len(table) > 1
            else c.choice
            for c in table
        ]
        return f"{name}, {column}: {', '.join(steps)}"

    lines = [f"crossovers by multiplications, measured on: {MEASURED_ON}"]
    lines += [
        line(f"first backend for {op}", column, table)
        for op, tables in FIRST.items()
        for column, table in tables.items()
    ]
    lines += [line("cuda logits that are not small", column, table) for column, table in LOGITS.items()]
    return [*lines, line("cuda logits that are tiled", "on Hopper", TILED)]
