"""What a call costs before the kernel starts, layer by layer, where the kernel itself takes almost nothing.

The problem is tiny. Each layer is called with what the one above handed to it, recorded from one call of the module.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

from bench import ours
from bench.problem import Problem
from bench.shapes import Shape
from tde_kernels import functional, ops
from tde_kernels.backends import core, cpu

SHAPE = Shape(1, 8, 4)
ROUNDS, CALLS = 60, 50
Call = Callable[[], object]


def _seams(function: str) -> dict[str, tuple[Any, str]]:
    """Where the layers below the module are entered: an object, and its attribute."""
    return {"functional": (functional, function), "op": (ops, "logits"), "backend": (cpu, "logits")}


def _replayed(seams: dict[str, tuple[Any, str]], call: Call) -> dict[str, Call]:
    """Each seam's function on the arguments that ``call`` reaches it with."""
    found: dict[str, Call] = {}
    for layer, (owner, name) in seams.items():
        function = getattr(owner, name)
        with mock.patch.object(owner, name, wraps=function) as spy:
            call()
        args, kwargs = spy.call_args
        found[layer] = lambda function=function, args=args, kwargs=kwargs: function(*args, **kwargs)  # type: ignore[misc]
    return found


def _dispatched(op: str, call: Call) -> dict[str, Call]:
    """The op as torch's dispatcher runs it, which is left out where nobody looks."""
    modules = [importlib.import_module(f"tde_kernels.ops.{name}") for name in ("library", "logits")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "nobody_looks", return_value=False))
        return _replayed({"op, dispatched": (torch.ops.tde, op)}, call)


def _core_alone(p: Problem) -> Call:
    """One call of the compiled core: Python into C++ and back."""
    total, ema = torch.ones(p.shape.dim + 1), p.ema.clone()
    fold, arguments = core.compiled().fold_ema, (ema.data_ptr(), 0, total.data_ptr(), len(ema), 0.9)
    return lambda: (fold(*arguments), ema, total)


@cache
def layers(work: str) -> dict[str, Call]:
    """From the outermost to the core."""
    p = Problem.draw(SHAPE)
    head = ours.head(p)
    if work == "inference":
        x = p.x.detach()
        head.eval().requires_grad_(False)
        call: Call = lambda: head(x)  # noqa: E731
        below = _replayed(_seams("tde_logits"), call) | _dispatched("logits", call)
        return {"module": call, **below, "core": _core_alone(p)}
    if work == "training":
        train: Call = lambda: head(p.x)  # noqa: E731
        return {"module": train, **_replayed(_seams("grouped_logits_with_ema_"), train), **_dispatched("logits", train)}
    z = head(p.x)
    backward: Call = lambda: torch.autograd.grad(z, (p.x, p.w), p.grad, retain_graph=True)  # noqa: E731
    below = _replayed({"backend": (cpu, "logits_backward")}, backward) | _dispatched("logits_backward", backward)
    return {"autograd": backward, **below}


WORKS = {
    "inference": ("module", "functional", "op, dispatched", "op", "backend", "core"),
    "training": ("module", "functional", "op, dispatched", "op", "backend"),
    "backward": ("autograd", "op, dispatched", "backend"),
}


@pytest.mark.skipif(core.missing is not None, reason="needs the compiled core")
@pytest.mark.parametrize(("work", "layer"), [(work, layer) for work, names in WORKS.items() for layer in names])
def test_overhead(benchmark: Any, work: str, layer: str) -> None:
    benchmark.group = f"overhead {work}"
    benchmark.pedantic(layers(work)[layer], rounds=ROUNDS, iterations=CALLS, warmup_rounds=1)
    if not benchmark.disabled:
        microseconds = 1e6 * statistics.median(benchmark.stats.stats.data)
        benchmark.extra_info.update(work=work, layer=layer, microseconds=microseconds)
