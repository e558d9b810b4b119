"""What is drawn: operands of any shape, dtype, layout and size, of numbers and of what are none.

``HYPOTHESIS_PROFILE=long`` draws fifteen times as many examples, others at every run, and prints how to repeat a
failure; otherwise they are the same at every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import layouts
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from oracle import NORMALIZERS, Problem
from torch import Tensor

from tde_kernels import reference
from tde_kernels.backends import cpu, refusal
from tde_kernels.normalizers import resolve

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def examples(number: int) -> settings:
    """``number`` examples, of 200 in all."""
    return settings(
        max_examples=15 * number if _LONG else number,
        derandomize=not _LONG,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def _one_hot(a: Tensor) -> Tensor:
    place = torch.randint(a.shape[-1], (*a.shape[:-1], 1))
    return torch.zeros_like(a).scatter_(-1, place, 1.0)


def _some_zero_rows(a: Tensor) -> Tensor:
    return a * (torch.rand(*a.shape[:-1], 1) > 0.4)


def _half_zero(a: Tensor) -> Tensor:
    """With two heads, or more, whole groups."""
    return torch.where(torch.arange(a.shape[-1]) < (a.shape[-1] + 1) // 2, 0.0, a)


# Of random numbers [..., D]
PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda a: a,
    "positive": torch.abs,
    "signs": torch.sign,
    "constant": torch.ones_like,
    "one hot": _one_hot,
    "zeros": torch.zeros_like,
    "zero rows": _some_zero_rows,
    "half zero": _half_zero,
}


def _to_size(a: Tensor, size: float) -> Tensor:
    largest = a.abs().max() if a.numel() else a.new_ones(())
    return a * (size / torch.where(largest > 0, largest, 1.0))


def _huge(a: Tensor, limits: torch.finfo) -> Tensor:
    return _to_size(a, min(limits.max / 2, 1e37))


def _largest(a: Tensor, limits: torch.finfo) -> Tensor:
    """Norms may leave float32."""
    return _to_size(a, min(limits.max / 2, 1e38))


def _tiny(a: Tensor, limits: torch.finfo) -> Tensor:
    return _to_size(a, max(4 * limits.tiny, 1e-30))


def _denormal(a: Tensor, limits: torch.finfo) -> Tensor:
    return _to_size(a, limits.tiny / 32)


def _mixed(a: Tensor, limits: torch.finfo) -> Tensor:
    """Each row of a size of its own."""
    exponents = torch.linspace(-1, 1, a.shape[:-1].numel()).reshape(*a.shape[:-1], 1)
    return a * 10.0 ** (exponents * (2 if limits.max < 1e30 else 12))


def _put(value: float) -> Callable[[Tensor, torch.finfo], Tensor]:
    def put(a: Tensor, _: torch.finfo) -> Tensor:
        some = torch.rand(a.shape) < 1 / max(1, a.shape[-1]) / 3
        return torch.where(some, value * a.sign(), a)

    return put


# Of the pattern, in float64, within the limits of the dtype that it will have
SCALES: dict[str, Callable[[Tensor, torch.finfo], Tensor]] = {
    "about one": lambda a, _: a * (1 + torch.rand(())),
    "huge": _huge,
    "largest": _largest,
    "tiny": _tiny,
    "denormal": _denormal,
    "mixed": _mixed,
    "NaN": _put(torch.nan),
    "infinite": _put(torch.inf),
}


LAYOUTS = {**layouts.KEEPING, **layouts.SHARING}


@dataclass(frozen=True)
class Kind:
    """How an operand is made."""

    pattern: str
    scale: str
    layout: str

    def of(self, *shape: int, dtype: torch.dtype) -> Tensor:
        a = PATTERNS[self.pattern](torch.randn(*shape, dtype=torch.float64) + 0.3 * torch.randn(shape[-1]))
        return LAYOUTS[self.layout](SCALES[self.scale](a, torch.finfo(dtype)).to(dtype))


KINDS = st.builds(
    Kind,
    st.sampled_from(sorted(PATTERNS)),
    st.sampled_from(sorted(SCALES)),
    st.sampled_from(sorted(LAYOUTS)),
)
VECTORS = st.sampled_from(["contiguous", "strided columns", "shifted", "negated"])


@dataclass(frozen=True)
class Recipe:
    """All that was drawn of a problem; numbers follow from the seed."""

    seed: int
    dtype: torch.dtype
    leading: tuple[int, ...]
    width: int
    classes: int
    num_heads: int
    normalizer: str
    features: Kind
    weights: Kind
    vectors: str
    tde: bool
    zero_direction: bool
    tau: float
    gamma: float
    exponent: float
    alpha: float

    @property
    def dim(self) -> int:
        return self.width * self.num_heads

    def benign(self, pattern: str) -> Recipe:
        """The same of ordinary numbers, which round in another way at every call."""
        kind = Kind(pattern, "about one", "contiguous")
        return replace(self, features=kind, weights=kind, vectors="contiguous", zero_direction=False)

    def problem(self) -> Problem:
        """Drawn anew at every call, after :func:`torch.manual_seed` the same."""
        dtype, vector = self.dtype, LAYOUTS[self.vectors]
        x = self.features.of(*self.leading, self.dim, dtype=dtype)
        w = self.weights.of(self.classes, self.dim, dtype=dtype)
        scale = (torch.rand(self.classes) + 0.5).to(dtype) if self.normalizer == "lws" else None
        direction = reference.head_direction(torch.randn(self.dim) + 0.5, num_heads=self.num_heads)
        if self.zero_direction:
            direction = _half_zero(direction)
        return Problem(
            x,
            w,
            vector(direction.to(dtype)) if self.tde else None,
            None if scale is None else vector(scale),
            self.num_heads,
            self.normalizer,
            tau=self.tau,
            gamma=self.gamma,
            exponent=self.exponent,
            alpha=self.alpha,
        )


LEADING = st.one_of(
    st.lists(st.integers(0, 6), max_size=3).map(tuple), st.integers(1, 40).map(lambda n: (n,)), st.just((129,))
)


def recipes(
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    kinds: st.SearchStrategy[Kind] = KINDS,
    tde: st.SearchStrategy[bool] | None = None,
    leading: st.SearchStrategy[tuple[int, ...]] = LEADING,
    normalizers: tuple[str, ...] = NORMALIZERS,
) -> st.SearchStrategy[Recipe]:
    return st.builds(
        Recipe,
        seed=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(dtypes),
        leading=leading,
        width=st.integers(1, 24),
        classes=st.one_of(st.integers(1, 40), st.just(127)),
        num_heads=st.sampled_from([1, 2, 3, 4, 8]),
        normalizer=st.sampled_from(normalizers),
        features=kinds,
        weights=kinds,
        vectors=VECTORS,
        tde=st.booleans() if tde is None else tde,
        zero_direction=st.booleans(),
        tau=st.sampled_from([16.0, 1.0, 0.0, -2.5, 30.0]),
        gamma=st.sampled_from([1 / 32, 0.0, 1.0]),
        exponent=st.sampled_from([0.7, 1.0, 0.0, 2.0]),
        alpha=st.sampled_from([1.5, 0.0, -1.0, 3.0]),
    )


def exactly(p: Problem) -> Problem:
    """The problem in float64. Groups of no norm that float32 knows count as zero, as where there is no norm at all."""
    family = resolve(p.normalizer, gamma=p.gamma, exponent=p.exponent)
    smallest = torch.finfo(torch.float64 if p.x.dtype == torch.float64 else torch.float32).tiny
    operands = []
    for a, factor in ((p.x, family.feature), (p.w, family.weight)):
        groups = a.double().unflatten(-1, (p.num_heads, -1))
        if factor.power and not factor.offset:
            groups = torch.where(groups.norm(dim=-1, keepdim=True) < smallest, 0.0, groups)
        operands.append(groups.flatten(-2))
    return replace(p.cast(torch.float64), x=operands[0], w=operands[1])


# A backend, and the way that it is held to
Way = tuple[str, str]


def ways(dtype: torch.dtype, op: str = "logits") -> list[Way]:
    """All on the CPU but those that are interpreted or emulated."""
    found = [("reference", "table")]
    if refusal("cpu", op, "cpu", dtype) is None:
        found += [("cpu", plan) for plan in cpu.PLANS]
    return found


@contextmanager
def held_to(plan: str) -> Iterator[None]:
    before, cpu.plan = cpu.plan, plan
    try:
        yield
    finally:
        cpu.plan = before


class Untouched:
    """All memory under some tensors, to see that none of it was written to."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors = [a.detach() for a in tensors if a is not None]
        self._before = [self._bytes(a) for a in self._tensors]

    @staticmethod
    def _bytes(a: Tensor) -> Tensor:
        storage = a.untyped_storage()
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).clone()

    def check(self) -> None:
        for a, before in zip(self._tensors, self._before, strict=True):
            assert torch.equal(self._bytes(a), before), "an input was written to"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(c.reshape(-1).view(torch.uint8) for c in (a, b)))
