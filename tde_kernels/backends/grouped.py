"""What the ops hand to a backend: the operands of a grouped product, and how the rows of each are scaled.

    z = x_hat @ w_hat^T,     a_hat^k = c f(||a^k||) (a^k - alpha <a^k, d^k> d^k)

The features have the direction and alpha; the weights have ``c = scale / class_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tde_kernels.normalizers import Classifier, NormFactor


def plain(a: Tensor) -> Tensor:
    """``a``, its values in memory: torch may keep their negative there, and of nothing but zeros nothing."""
    if not torch.compiler.is_compiling() and (a.is_neg() or a._is_zerotensor()):
        return a.clone(memory_format=torch.contiguous_format).resolve_neg()
    return a


@dataclass(frozen=True)
class Rows:
    """One operand ``a [R, D]``, and the scaled rows ``a_hat [R, D]`` that it stands for."""

    a: Tensor
    num_heads: int
    factor: NormFactor
    scale: float = 1.0
    divisor: Tensor | None = None
    direction: Tensor | None = None
    alpha: Tensor | None = None

    def untouched(self, dtype: torch.dtype) -> bool:
        """Whether ``a`` is ``a_hat`` in ``dtype``, so that no pass over it is needed."""
        return self.a.dtype == dtype and not self.factor.power and self._constant and self.direction is None

    @property
    def _constant(self) -> bool:
        return self.scale == 1 and self.divisor is None

    def towards(self, direction: Tensor | None) -> Rows:
        """The rows with another direction: projected on, and not subtracted."""
        return replace(self, direction=direction, alpha=None)


class Intake(NamedTuple):
    """What becomes of the features ``[B, D]`` in the same pass: they enter an EMA, or their sum is wanted, or both."""

    mask: Tensor | None = None  # [B] bool: the rows taken in; None means all
    ema: Tensor | None = None  # [D] float32, in place
    num_updates: Tensor | None = None  # one more where a row was taken in
    momentum: float = 0.0
    take_sum: bool = False

    @property
    def asked(self) -> bool:
        """Whether there is anything to do."""
        return self.ema is not None or self.take_sum


NO_INTAKE = Intake()


class Wants(NamedTuple):
    """The gradients that are asked for."""

    x: bool
    w: bool
    class_scale: bool


NOTHING = Wants(False, False, False)


class Loss(NamedTuple):
    """What becomes of the logits in a cross entropy: ``sum_t share_t[b] CE(z_b, target_t[b])`` for every row.

    Options are those of :func:`tde_kernels.reference.cross_entropy`; vectors are float32. Labels and vectors are of all
    C classes, also where the weights are of some of them alone, a shard.
    """

    target: Tensor  # [B] int64
    share: Tensor  # [B]: what the row counts for
    target_b: Tensor | None = None
    share_b: Tensor | None = None
    class_weight: Tensor | None = None  # [C] each
    logit_bias: Tensor | None = None
    margin: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    focal_exponent: float = 0.0
    first: int = 0  # the class of the first weight
    classes: int = 0  # C; 0: as many as there are weights

    def of_all(self, held: int) -> int:
        """C, where the weights are of ``held`` classes."""
        return self.classes or held


class LossPass(NamedTuple):
    """What to do with logits ``[B, N]`` of the classes from ``first`` on."""

    first: int = 0
    take: bool = True  # take them into the sums, which begin anew with the first class; else sums are complete
    sums: Tensor | None = None  # [B, SUMS]; None where logits are of all classes and nobody asks
    losses: Tensor | None = None  # [B]: filled
    gradient: bool = False  # that of the losses' sum takes the logits' place


class Grouped(NamedTuple):
    """The arguments that every op on grouped logits begins with, in the order of its schema."""

    x: Tensor
    w: Tensor
    class_scale: Tensor | None
    direction: Tensor | None
    alpha: Tensor | None
    num_heads: int
    scale: float
    feature_factor: NormFactor
    weight_factor: NormFactor

    @classmethod
    def of(
        cls, x: Tensor, w: Tensor, classifier: Classifier, direction: Tensor | None = None, alpha: Tensor | None = None
    ) -> Grouped:
        """The problem of ``x [B, D]`` and ``w [C, D]``; ``direction [D]`` and ``alpha []`` are float32."""
        normalizer = classifier.normalizer
        return cls(
            plain(x),
            plain(w),
            classifier.class_scale,
            direction,
            alpha,
            classifier.num_heads,
            classifier.scale,
            normalizer.feature,
            normalizer.weight,
        )

    def detached(self) -> Grouped:
        """The same, unknown to autograd."""

        def constant(a: Tensor | None) -> Tensor | None:
            return None if a is None else a.detach()

        return Grouped(
            self.x.detach(),
            self.w.detach(),
            constant(self.class_scale),
            constant(self.direction),
            constant(self.alpha),
            self.num_heads,
            self.scale,
            self.feature_factor,
            self.weight_factor,
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    @property
    def family(self) -> dict[str, Any]:
        return dict(zip(self._fields[5:], self[5:], strict=True))

    @property
    def features(self) -> Rows:
        return Rows(self.x, self.heads, self.feature_factor, direction=self.direction, alpha=self.alpha)

    @property
    def weights(self) -> Rows:
        return Rows(self.w, self.heads, self.weight_factor, self.scale, self.class_scale)

    @property
    def heads(self) -> int:
        """The number of heads that matter: without norms and direction all channels are one."""
        apart = self.direction is not None or self.feature_factor.power or self.weight_factor.power
        return self.num_heads if apart else 1
