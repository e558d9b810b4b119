"""What is asked for on the command line, and the benchmarks that this makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from bench.works import SLOW, WORKS
from tde_kernels import backends

DTYPES = ("float32", "bfloat16", "float16")
PLANS = ("small", "tiled", "hopper", "product")  # how the CUDA backend can be held to compute logits
BUDGET, QUICK_BUDGET = 1.0, 0.2  # seconds to time each in


class Options(NamedTuple):
    """Of the command line; None where nothing was asked for. ``patience`` is the longest call, in seconds."""

    shapes: tuple[str, ...] | None
    dtypes: tuple[str, ...] | None
    backends: tuple[str, ...] | None
    device: str
    quick: bool
    patience: float

    @property
    def budget(self) -> float:
        return QUICK_BUDGET if self.quick else BUDGET


class Case(NamedTuple):
    """One benchmark."""

    work: str
    shape: str
    dtype: str
    rival: str
    device: str
    budget: float
    patience: float

    def __str__(self) -> str:
        return f"{self.work}-{self.shape}-{self.dtype}-{self.rival.replace(' ', '_')}"

    @property
    def group(self) -> str:
        return f"{self.work} {self.shape} {self.dtype}"

    @property
    def kind(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def at_hand(device: str) -> tuple[str, ...]:
    """The backends that can be measured there."""
    return tuple(name for name in backends.NAMES if backends.refusal(name, "logits", device, torch.float32) is None)


def rivals(work: str, dtype: str, options: Options) -> list[str]:
    """Who does ``work``: the limits, this package on each of its backends, and the others."""
    what, ours = WORKS[work], list[str]()
    for name in options.backends or at_hand(options.device):
        if name == "reference":
            ours += [name] if what.reference and not options.quick else []
        elif backends.refusal(name, what.op, options.device, getattr(torch, dtype)) is None:
            ours.append(f"tde_kernels {name}")
            ours += [f"tde_kernels {name} {plan}" for plan in PLANS if name == "cuda" and what.op == "logits"]
    others = [name for name in what.rivals if not (options.quick and name in SLOW)]
    limits = [name for name in what.limits if options.device == "cpu" or name != "bare_by_library"]
    return [*limits, *ours, *others]


def of(
    shapes: Iterable[str], dtypes: Iterable[str], wanted: Callable[[str, str, str], bool], options: Options
) -> list[Case]:
    """A case for each work, shape and dtype that is wanted; those of one problem follow each other."""
    return [
        Case(work, shape, dtype, rival, options.device, options.budget, options.patience)
        for shape in shapes
        for dtype in dtypes
        for work in WORKS
        if wanted(work, shape, dtype)
        for rival in rivals(work, dtype, options)
    ]
