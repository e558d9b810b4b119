"""Time of the head on a GPU, every backend and way of computing, as a ratio to the bare products of the same run.

On the device: events, with the queue kept full by a kernel that idles, and the second-level cache emptied between
calls; variants take turns, and the figure is the median of their ratios. On the wall: the launches, that is what a
small problem costs without a graph. A result that is wrong is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.shapes import SCALING, SHAPES, Shape
from tde_kernels import backends, reference
from tde_kernels import functional as F
from tde_kernels.backends import crossovers

HEADS, TAU, GAMMA, ALPHA = 2, 16.0, 1 / 32, 1.5
FAMILY: dict[str, Any] = {"num_heads": HEADS, "tau": TAU, "gamma": GAMMA}
# The backend, and how the CUDA backend is told to compute
VARIANTS = (
    ("reference", "table"),
    ("triton", "table"),
    *(("cuda", plan) for plan in ("small", "tiled", "hopper", "product")),
)
WORKS = ("forward", "inference", "step")
DTYPES = (torch.bfloat16, torch.float32)
Run = Callable[[], Tensor]


@contextmanager
def _plan(name: str) -> Iterator[None]:
    before, crossovers.plan = crossovers.plan, name
    try:
        yield
    finally:
        crossovers.plan = before


class Problem:
    """Operands on the device, and the works to be timed on them."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", generator=generator).to(dtype)

        self.x = draw(shape.batch, shape.dim).requires_grad_()
        self.w = (draw(shape.classes, shape.dim) / shape.dim**0.5).requires_grad_()
        self.grad = draw(shape.batch, shape.classes)
        self.ema = torch.randn(shape.dim, device="cuda", generator=generator)
        self.count = torch.zeros((), dtype=torch.int64, device="cuda")
        self.direction = reference.head_direction(self.ema, num_heads=HEADS)

    def bare(self, work: str) -> Run:
        """Nothing but the products: one, or three for a step."""
        x, w = self.x.detach(), self.w.detach()

        def step() -> Tensor:
            torch.mm(self.grad, w)
            torch.mm(self.grad.t(), x)
            return torch.mm(x, w.t())

        return step if work == "step" else lambda: torch.mm(x, w.t())

    def run(self, work: str, backend: str) -> Run:
        def forward() -> Tensor:
            return F.grouped_logits_with_ema_(
                self.x, self.w, self.ema, self.count, momentum=0.9, mask=None, **FAMILY, backend=backend
            )

        def step() -> Tensor:
            z = forward()
            torch.autograd.grad(z, (self.x, self.w), self.grad)
            return z

        def inference() -> Tensor:
            return F.tde_logits(self.x, self.w, self.direction, alpha=ALPHA, **FAMILY, backend=backend)

        return {"forward": torch.no_grad()(forward), "step": step, "inference": torch.no_grad()(inference)}[work]

    def error(self, work: str, found: Tensor) -> float:
        """Relative to the reference, on a few of the rows and classes in float64."""
        x, w = self.x.detach()[:64].double(), self.w.detach()[:2048].double()
        direction = self.direction.double() if work == "inference" else None
        want = (
            reference.grouped_logits(x, w, **FAMILY)
            if direction is None
            else reference.tde_logits(x, w, direction, alpha=ALPHA, **FAMILY)
        )
        return float((found.detach()[:64, :2048].double() - want).norm() / want.norm())


def device_ms(run: Run, flush: Tensor) -> float:
    """Milliseconds of one call on the device, the second-level cache emptied before."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the launches queue up
    begin.record()
    run()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed


def _wall_us(run: Run, calls: int = 50) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / calls


def _row(p: Problem, work: str, backend: str, plan: str, flush: Tensor) -> dict[str, Any]:
    with _plan(plan):
        run, bare = p.run(work, backend), p.bare(work)
        error = p.error(work, run())
        allowed = 2e-2 if p.x.dtype == torch.bfloat16 else 1e-4
        if not error < allowed:
            return {"wrong": f"relative error {error:.1e}"}
        bare()
        pairs = [(device_ms(run, flush), device_ms(bare, flush)) for _ in range(11)]
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return {
            "error": error,
            "ms": statistics.median(ours for ours, _ in pairs),
            "ratio_to_bare": statistics.median(ours / theirs for ours, theirs in pairs),
            "wall_us": _wall_us(run),
            "peak_mib": (torch.cuda.max_memory_allocated() - held) / 2**20,
        }


def measure(deadline: float) -> list[dict[str, Any]]:
    """A row for each shape, dtype, work and variant; after ``deadline``, of the monotonic clock, one that says so."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        if (
            name in SCALING or name == "million"
        ):  # its logits alone are eight gigabytes: a loss that stores them is not what is wanted
            continue
        for dtype in DTYPES:
            p = Problem(shape, dtype)
            for work in WORKS:
                for backend, plan in VARIANTS:
                    row = {"shape": name, "dtype": str(dtype).removeprefix("torch."), "work": work}
                    row |= {"backend": backend, "plan": plan}
                    reason = backends.refusal(backend, "logits", "cuda", dtype)
                    if reason is not None:
                        rows.append(row | {"refused": reason})
                    elif time.monotonic() > deadline:
                        rows.append(row | {"not_measured": "out of time"})
                    else:
                        rows.append(row | _row(p, work, backend, plan, flush))
                        print(rows[-1], flush=True)
    return rows
