"""The ``tde`` namespace of ``torch.library``: ops are defined by schema, implemented by the backends.

``define`` + ``impl`` + ``register_fake`` cost a call far less than ``torch.library.custom_op``. No op knows autograd:
gradients are autograd Functions around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tde_kernels.backends import core, implementation
from tde_kernels.backends.grouped import Grouped
from tde_kernels.normalizers import NormFactor

_LIBRARY = torch.library.Library("tde", "DEF")
_OPERANDS = "Tensor x, Tensor w, Tensor? class_scale, Tensor? direction, Tensor? alpha"
_FAMILY = "int num_heads, float scale, float[] feature_factor, float[] weight_factor"


def define(schema: str, *, fake: Callable[..., Any]) -> None:
    """Defines ``tde::<schema>``, run by the function of that name in the module that its ``backend`` argument names.

    Args:
        schema: with a last argument ``str backend``, which the implementations do not take.
        fake: the op on shapes alone.
    """
    name = schema[: schema.index("(")]

    def run(*args: Any, backend: str, **kwargs: Any) -> Any:
        return _without_autocast(getattr(implementation(backend), name), args[0].device.type, *args, **kwargs)

    _register(name, schema, run, fake)


def define_grouped(
    name: str,
    arguments: str,
    options: str,
    results: str,
    *,
    fake: Callable[..., Any],
    values: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """:func:`define` for an op on grouped logits: its implementations, and ``fake``, take a :class:`Grouped` first.

    Args:
        arguments: of the schema, beside those of the problem, each with a comma before it.
        options: the same for the keyword-only ones.
        results: what the schema returns.
        values: makes of these arguments and options what implementations take beside the problem, if that is fewer.
    """

    def run(*args: Any, backend: str, **kwargs: Any) -> Any:
        problem, args, kwargs = _problem(args, kwargs)
        problem = problem._replace(
            class_scale=core.float_vector(problem.class_scale), direction=core.float_vector(problem.direction)
        )
        op = getattr(implementation(backend), name)
        if values is not None:
            args, kwargs = values(*args, **kwargs), {}
        return _without_autocast(op, problem.x.device.type, problem, *args, **kwargs)

    def run_fake(*args: Any, **kwargs: Any) -> Any:
        problem, args, kwargs = _problem(args, kwargs)
        return fake(problem, *args, **kwargs)

    schema = f"{name}({_OPERANDS}{arguments}, *, {_FAMILY}{options}, str backend) -> {results}"
    _register(name, schema, run, run_fake)


def _problem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Grouped, tuple[Any, ...], dict[str, Any]]:
    """The problem that an op's arguments begin with, and the rest of them."""
    family = [kwargs.pop(name) for name in Grouped._fields[5:]]
    family[2:] = (NormFactor(*factor) for factor in family[2:])
    return Grouped(*args[:5], *family), args[5:], kwargs


def _without_autocast(op: Callable[..., Any], device: str, *args: Any, **kwargs: Any) -> Any:
    """Dtypes were settled above the ops: products inside keep theirs."""
    if not torch.is_autocast_enabled(device):
        return op(*args, **kwargs)
    with torch.autocast(device, enabled=False):
        return op(*args, **kwargs)


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tde::{name}", fake, lib=_LIBRARY)
