"""Which implementation serves an op, and why.

A backend asked for in code (``backend=...`` or :func:`use_backend`) serves or raises. Without one, ``TDE_BACKEND`` in
the environment is tried first, then the device's own order of preference; the reference serves what is left.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tde_kernels import checks
from tde_kernels.backends import cpu, crossovers, cuda, triton

NAMES = ("reference", "cpu", "cuda", "triton")
OPS = (
    "logits",
    "cross_entropy",
    "update_ema_",
    "feature_sum",
    "fold_ema_",
    "head_direction",
    "background_exempt",
    "alpha_sweep",
    "alpha_segments",
    "topk",
)
_MODULES: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}


def check_name(name: str, argument: str = "backend") -> str:
    """``name`` if there is such a backend, else a ``ValueError`` that says which there are."""
    if not isinstance(name, str) or name not in NAMES:
        nearest = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}, got {name!r}{hint}")
    return name


_environment = check_name(os.environ["TDE_BACKEND"], "TDE_BACKEND") if os.environ.get("TDE_BACKEND") else None


@dataclass(frozen=True, eq=False)
class _Choice:
    """One entry into :func:`use_backend`, no two of which are the same."""

    backend: str


_choices: list[_Choice] = []  # that are in force, of all threads; the last one counts


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every op runs on the backend ``name``, or raises where that cannot serve it.

    The choice belongs to the process, as torch's own precision flags do: autograd's threads make it too. Where several
    threads are within contexts of their own, that of the last one to enter holds for all; ``backend=`` is of one call.
    """
    choice = _Choice(check_name(name))
    _choices.append(choice)
    try:
        yield
    finally:
        _choices.remove(choice)


def implementation(name: str) -> ModuleType:
    """The module that implements the ops of a fused backend; a GPU's is imported here, when it is first wanted."""
    if name == "cpu":
        return cpu
    return importlib.import_module(f"tde_kernels.backends.{name}.kernels")


def refusal(name: str, op: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the backend cannot serve ``op`` on ``device``, or None where it can; ``"cuda"`` is the current one."""
    if name == "reference":
        return None
    if isinstance(device, str):
        device = torch.device(device)
    reason: str | None = _MODULES[name].refusal(op, device, dtype)
    return reason


def preferred(op: str, device_type: str, dtype: torch.dtype, size: int = 0) -> tuple[str, ...]:
    """The order in which backends are tried for ``op`` on a device; ``size`` is the product's multiplications."""
    order: tuple[str, ...] = ()
    if device_type == "cpu":
        order = ("cpu",)
    elif device_type == "cuda":
        first = crossovers.first_backend(op, dtype, size)
        order = (first, "triton" if first == "cuda" else "cuda")
    if _environment is not None:
        order = (_environment, *(name for name in order if name != _environment))
    return (*order, "reference")


def _refusal_of_any(
    name: str, op: str, device: torch.device, dtype: torch.dtype, operands: Sequence[Tensor]
) -> str | None:
    """The same where operands have dtypes of their own."""
    dtypes = [dtype, *(a.dtype for a in operands if a.dtype != dtype)]
    return next((reason for each in dtypes if (reason := refusal(name, op, device, each)) is not None), None)


def select(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    asked: str | None,
    only_reference: str | None = None,
    *,
    operands: Sequence[Tensor] = (),
    size: int = 0,
) -> str:
    """The backend that serves ``op``.

    Args:
        operands: under autocast their dtypes may be others than the product's ``dtype``.
        size: multiplications of its product, where it has one.
        asked: the backend asked for by argument.
        only_reference: why this call is beyond every fused backend, if it is.

    Raises:
        ValueError: the backend asked for in code is unknown or cannot serve the op.
    """
    if asked is None:
        latest = _choices[-1:]  # in one step: another thread may leave its context meanwhile
        asked = latest[0].backend if latest else None
    if only_reference is None and checks.transformed():
        only_reference = "torch.func and forward-mode differentiation follow the reference alone"
    if asked is None:
        if only_reference is not None:
            return "reference"
        order = preferred(op, device.type, dtype, size)
        return next(name for name in order if _refusal_of_any(name, op, device, dtype, operands) is None)
    reason = _refusal_of_any(check_name(asked), op, device, dtype, operands)
    if reason is None and asked != "reference":
        reason = only_reference
    if reason is not None:
        raise ValueError(f"backend={asked!r} cannot serve {op}: {reason}")
    return asked
