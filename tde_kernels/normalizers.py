"""The Eq. 10 family: every classifier of the paper is one choice of two norm factors.

    z_bi = tau/K * sum_k r(||x_b^k||) * s_i(||w_i^k||) * <x_b^k, w_i^k>

Both r and s have the form ``f(n) = (n + offset)^-power``; LWS divides by a learnt scale per class besides.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("linear", "cosine", "capsule", "deconfound", "tau_norm", "lws")


class NormFactor(NamedTuple):
    """``f(n) = (n + offset)^-power`` of a norm n; 0 where ``n + offset`` is 0: a zero group contributes 0."""

    offset: float = 0.0
    power: float = 0.0


@dataclass(frozen=True)
class Normalizer:
    """The two factors of a classifier: ``feature`` is r, ``weight`` is s."""

    feature: NormFactor
    weight: NormFactor
    learns_class_scale: bool = False


class Classifier(NamedTuple):
    """All that Eq. 10 needs beside features and weights, checked: what the layers below the public API pass on."""

    normalizer: Normalizer
    num_heads: int
    tau: float
    class_scale: Tensor | None

    @property
    def scale(self) -> float:
        """The constant ``tau / K``."""
        return self.tau / self.num_heads


def resolve(name: str, *, gamma: float = 0.0, exponent: float = 1.0) -> Normalizer:
    """The normalizer called ``name``. ``gamma`` is read by deconfound alone, ``exponent`` by tau_norm alone.

    Raises:
        ValueError: unknown name; gamma or exponent negative or not finite.
        TypeError: a name that is no string, numbers that are none.
    """
    for argument, value in (("gamma", gamma), ("exponent", exponent)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
        if not 0 <= value <= sys.float_info.max:
            raise ValueError(f"{argument} must be finite and not negative, got {value}")
    if not isinstance(name, str):
        raise TypeError(f"normalizer must be a string, got {type(name).__name__}")
    member = _member if torch.compiler.is_compiling() else _known
    return member(name, float(gamma), float(exponent))  # torch takes no whole number beyond int64


def _member(name: str, gamma: float, exponent: float) -> Normalizer:
    unit, none = NormFactor(power=1.0), NormFactor()
    match name:
        case "linear":
            return Normalizer(none, none)
        case "cosine":
            return Normalizer(unit, unit)
        case "capsule":
            return Normalizer(NormFactor(offset=1.0, power=1.0), unit)
        case "deconfound":
            return Normalizer(unit, NormFactor(offset=gamma, power=1.0))
        case "tau_norm":
            return Normalizer(none, NormFactor(power=exponent))
        case "lws":
            return Normalizer(none, none, learns_class_scale=True)
    nearest = difflib.get_close_matches(str(name), NAMES, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"normalizer must be one of {', '.join(NAMES)}, got {name!r}{hint}")


_known = lru_cache(maxsize=256)(_member)  # made anew it would be a tenth of what a call costs
