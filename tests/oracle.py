"""The naive implementation: the paper's equations, head by head, in eager torch and the dtype of its input.

It shares no line with the package. In float64 it checks the reference; in a lower dtype its own error, against the
reference in float64, is the measure of what an honest computation loses, and so the bound for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tde_kernels import reference

NORMALIZERS = ("linear", "cosine", "capsule", "deconfound", "tau_norm", "lws")


@dataclass(frozen=True)
class Problem:
    """A classifier with its operands: what every test starts from."""

    x: Tensor
    w: Tensor
    direction: Tensor | None
    class_scale: Tensor | None
    num_heads: int
    normalizer: str
    tau: float = 16.0
    gamma: float = 1 / 32
    exponent: float = 0.7
    alpha: float = 1.5

    @property
    def family(self) -> dict[str, Any]:
        """Keyword arguments of the functional API."""
        return {
            "num_heads": self.num_heads,
            "tau": self.tau,
            "gamma": self.gamma,
            "normalizer": self.normalizer,
            "exponent": self.exponent,
            "class_scale": self.class_scale,
        }

    def cast(self, dtype: torch.dtype, device: str = "cpu", *, grad: bool = False) -> Problem:
        """The same numbers as fresh leaves of another dtype."""

        def leaf(a: Tensor | None, wants: bool) -> Tensor | None:
            return None if a is None else a.detach().to(device, dtype, copy=True).requires_grad_(wants)

        x, w = leaf(self.x, grad), leaf(self.w, grad)
        assert x is not None and w is not None
        scale = leaf(self.class_scale, grad)
        return replace(self, x=x, w=w, direction=leaf(self.direction, False), class_scale=scale)

    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are wanted for."""
        return (self.x, self.w) if self.class_scale is None else (self.x, self.w, self.class_scale)


def problem(
    batch: int | Sequence[int],
    dim: int,
    classes: int,
    num_heads: int,
    normalizer: str = "deconfound",
    *,
    tde: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Problem:
    """Random operands, representable in ``dtype``. Features have a common mean, as the features of a network do."""
    leading = (batch,) if isinstance(batch, int) else tuple(batch)
    common = torch.randn(dim)
    x = (torch.randn(*leading, dim) + common).to(dtype)
    w = (torch.randn(classes, dim) / dim**0.5).to(dtype)
    scale = (torch.rand(classes) + 0.5).to(dtype) if normalizer == "lws" else None
    direction = reference.head_direction(common + 0.3 * torch.randn(dim), num_heads=num_heads).to(dtype)
    return Problem(x, w, direction if tde else None, scale, num_heads, normalizer, **options)


def naive_logits(p: Problem) -> Tensor:
    """Eq. 10, and Eq. 8 where the problem has a direction: operands normalised head by head, then their product."""
    d = p.x.shape[-1] // p.num_heads
    features, weights = [], []
    for k in range(p.num_heads):
        head = slice(k * d, (k + 1) * d)
        x, w = p.x[..., head], p.w[:, head]
        n, m = x.norm(dim=-1, keepdim=True), w.norm(dim=-1, keepdim=True)
        r, s = {
            "linear": (1.0, 1.0),
            "cosine": (1 / n, 1 / m),
            "capsule": (1 / (n + 1), 1 / m),
            "deconfound": (1 / n, 1 / (m + p.gamma)),
            "tau_norm": (1.0, 1 / m**p.exponent),
            "lws": (1.0, 1.0 if p.class_scale is None else 1 / p.class_scale[:, None]),
        }[p.normalizer]
        if p.direction is not None:
            u = p.direction[head]
            x = x - p.alpha * (x * u).sum(-1, keepdim=True) * u
        features.append(x * r)
        weights.append(w * s * (p.tau / p.num_heads))
    return torch.cat(features, -1) @ torch.cat(weights, -1).T


def naive_exempt(p: Problem, background: int) -> Tensor:
    """Eq. 9 as it is written: two softmaxes and a quotient."""
    prob, share = naive_logits(replace(p, direction=None)).softmax(-1), naive_logits(p).softmax(-1)
    others = 1 - share[..., background : background + 1]
    result = (1 - prob[..., background : background + 1]) * share / others
    result[..., background] = prob[..., background]
    return result


def reference_logits(p: Problem) -> Tensor:
    if p.direction is None:
        return reference.grouped_logits(p.x, p.w, **p.family)
    return reference.tde_logits(p.x, p.w, p.direction, alpha=p.alpha, **p.family)


def error(got: Tensor, want: Tensor) -> float:
    """The largest error, each row measured by the largest value that it should hold; infinite where one is not finite.

    A row that should be zero, or of a few columns that may all be near it, is measured by the largest value of all.
    """
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"{tuple(got.shape)} for {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    size = want.abs().amax(-1, keepdim=True) if want.dim() and want.shape[-1] >= 8 else want.abs().max()
    size = torch.where(size < 1e-12 * want.abs().max(), want.abs().max(), size)
    size = torch.where(size == 0, 1.0, size)
    worst = ((got - want).abs() / size).max().item()
    return worst if worst == worst else float("inf")


def tiny(dtype: torch.dtype) -> float:
    """What a right result may be off where naive torch is right by luck: rounding to ``dtype``, a little of float32."""
    return torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps


def assert_within(got: Tensor, theirs: float, want: Tensor, what: str = "result") -> None:
    """``err(ours) <= 2 * err(naive torch in that dtype) + tiny`` against ``want``, which is in float64."""
    ours = error(got, want)
    assert theirs < 1, f"naive torch is no measure for {what}: its own error is {theirs:.2e}"
    bound = 2 * theirs + tiny(got.dtype)
    assert ours <= bound, f"{what}: error {ours:.2e}, naive torch has {theirs:.2e}, bound {bound:.2e}"


def assert_close(got: Tensor, naive: Tensor, want: Tensor, what: str = "result") -> None:
    """:func:`assert_within` of naive torch's result."""
    assert_within(got, error(naive, want), want, what)


def gradients(p: Problem, run: Callable[[Problem], Tensor], upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Result of ``run`` and the gradients of the problem's leaves for an upstream gradient."""
    out = run(p)
    grads = torch.autograd.grad(out, p.leaves(), upstream.to(out.device, out.dtype))
    return out, grads
