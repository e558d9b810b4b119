"""Time and memory of the loss on a GPU, this package's backends beside its rivals, as a ratio to the bare products."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from bench.gpu_timing import device_ms
from bench.loss_rivals import LOSSES, Absent, Step, fused
from bench.memory import peak_bytes
from bench.rivals import GAMMA, HEADS, TAU, Problem, bare
from bench.shapes import SHAPES
from tde_kernels import backends, reference

MEASURED = ("cifar100", "imagenet_lt", "inat18", "lvis", "imagenet21k", "million")
BACKENDS = ("cuda", "triton")
DTYPES = (torch.bfloat16, torch.float32)
_CHECKED = 64  # rows of which the loss is held against the reference


def _expected(p: Problem) -> float:
    """The loss of the first rows in float64; the million's logits of more would not fit."""
    x, w = p.x.detach()[:_CHECKED].double(), p.w.detach().double()
    return reference.grouped_cross_entropy(x, w, p.target[:_CHECKED], num_heads=HEADS, tau=TAU, gamma=GAMMA).item()


def _few_rows(p: Problem) -> Problem:
    return Problem(p.x.detach()[:_CHECKED].clone().requires_grad_(), p.w, p.target[:_CHECKED], p.grad, p.ema)


def _step(rival: str, p: Problem) -> Step:
    name, _, backend = rival.partition(" ")
    return fused(p, backend) if backend else LOSSES[name](p)


def _row(rival: str, p: Problem, expected: float, products: Any, flush: Tensor) -> dict[str, Any]:
    error = abs(_step(rival, _few_rows(p))().item() / expected - 1)
    if not error < (2e-2 if p.x.dtype == torch.bfloat16 else 1e-4):
        return {"wrong": f"relative error {error:.1e}"}
    step = _step(rival, p)
    step()
    products()
    pairs = [(device_ms(step, flush), device_ms(products, flush)) for _ in range(7)]
    step.clear()
    gradients = p.x.nbytes + p.w.nbytes
    return {
        "error": error,
        "ms": statistics.median(ours for ours, _ in pairs),
        "ratio_to_bare": statistics.median(ours / theirs for ours, theirs in pairs),
        "peak_mib": (peak_bytes(step, "cuda") - gradients) / 2**20,
    }


def measure(deadline: float) -> list[dict[str, Any]]:
    """A row for each shape, dtype and rival; after ``deadline``, of the monotonic clock, one that says so."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows: list[dict[str, Any]] = []
    for name in MEASURED:
        for dtype in DTYPES:
            if name == "million" and dtype == torch.float32:
                continue  # its bare products alone take longer than all else
            p = Problem.draw(SHAPES[name], device="cuda", dtype=dtype)
            products, expected = bare(p)["step"], _expected(p)
            for rival in (*(f"tde_kernels {backend}" for backend in BACKENDS), *LOSSES):
                row = {"shape": name, "dtype": str(dtype).removeprefix("torch."), "work": "loss", "rival": rival}
                reason = backends.refusal(rival.split()[-1], "cross_entropy", "cuda", dtype) if " " in rival else None
                if time.monotonic() > deadline:
                    rows.append(row | {"not_measured": "out of time"})
                    continue
                if reason is not None:
                    rows.append(row | {"refused": reason})
                    continue
                try:
                    rows.append(row | _row(rival, p, expected, products, flush))
                except (Absent, torch.OutOfMemoryError) as why:
                    rows.append(row | {"not_measured": str(why).splitlines()[0]})
                torch.compiler.reset()
                print(rows[-1], flush=True)
            del p, products
    return rows
