"""The ``tde`` namespace of ``torch.library``: ops are defined by schema, implemented by the backends.

``define`` + ``impl`` + ``register_fake`` cost a call far less than ``torch.library.custom_op``; where nobody but the
kernel would see a call, the dispatcher is left out, which takes as long as the kernels of a small problem. No op knows
autograd: gradients are autograd Functions around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tde_kernels.backends import core, implementation
from tde_kernels.backends.grouped import Grouped
from tde_kernels.normalizers import NormFactor

_LIBRARY = torch.library.Library("tde", "DEF")
_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))
_OPERANDS = "Tensor x, Tensor w, Tensor? class_scale, Tensor? direction, Tensor? alpha"
_FAMILY = "int num_heads, float scale, float[] feature_factor, float[] weight_factor"


def nobody_looks(*tensors: Tensor | None) -> bool:
    """Whether a call on these may go past torch's dispatcher: no tracing, mode, transform, profiler or subclass."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return _PLAIN.issuperset(map(type, tensors))


def batched(*tensors: Tensor | None) -> bool:
    """Whether one stands for many: of torch's older vmap (``is_grads_batched=True``) no stack of transforms knows.

    An upstream gradient alone can be such a one; so forwards need not ask.
    """
    return any(a is not None and torch._C._functorch.is_legacy_batchedtensor(a) for a in tensors)


def define(schema: str, *, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``tde::<schema>``, run by the function of that name in the module that its ``backend`` argument names.

    Args:
        schema: with a last argument ``str backend``, which the implementations do not take.
        fake: the op on shapes alone.

    Returns:
        What calls it.
    """
    name = schema[: schema.index("(")]

    def run(*args: Any, backend: str, **kwargs: Any) -> Any:
        return _without_autocast(getattr(implementation(backend), name), args[0].device.type, *args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (run if nobody_looks(*args) else getattr(torch.ops.tde, name))(*args, **kwargs)

    _register(name, schema, run, fake)
    return call


def define_grouped(
    name: str,
    arguments: str,
    options: str,
    results: str,
    *,
    fake: Callable[..., Any],
    values: Callable[..., tuple[Any, ...]] | None = None,
    flat: Callable[..., tuple[Tensor, ...]] | None = None,
    nested: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """:func:`define` for an op on grouped logits: its implementations, ``fake`` and the call take a :class:`Grouped`.

    Args:
        arguments: of the schema, beside those of the problem, each with a comma before it.
        options: the same for the keyword-only ones.
        results: what the schema returns.
        values: makes of these arguments and options what implementations take beside the problem, if that is fewer.
        flat, nested: make of what they return the tensors of the schema, knowing problem and options, and back.
    """

    def run(problem: Grouped, *args: Any, backend: str, **kwargs: Any) -> Any:
        if values is not None:
            args, kwargs = values(*args, **kwargs), {}
        return launch(name, backend, problem, *args, **kwargs)

    def run_flat(*args: Any, **kwargs: Any) -> Any:
        problem, args, kwargs = _problem(args, kwargs)
        found = run(problem, *args, **kwargs)
        return found if flat is None else flat(problem, found, **kwargs)

    def call(problem: Grouped, *args: Any, **kwargs: Any) -> Any:
        if nobody_looks(*problem.tensors, *args) and not batched(*args):
            return run(problem, *args, **kwargs)
        found = getattr(torch.ops.tde, name)(*problem.tensors, *args, **problem.family, **kwargs)
        return found if nested is None else nested(*found)

    def run_fake(*args: Any, **kwargs: Any) -> Any:
        problem, args, kwargs = _problem(args, kwargs)
        return fake(problem, *args, **kwargs)

    schema = f"{name}({_OPERANDS}{arguments}, *, {_FAMILY}{options}, str backend) -> {results}"
    _register(name, schema, run_flat, run_fake)
    return call


def launch(name: str, backend: str, problem: Grouped, *args: Any, **kwargs: Any) -> Any:
    """Runs a backend's implementation of an op on grouped logits: what the dispatcher comes to in the end."""
    class_scale, direction = core.float_vector(problem.class_scale), core.float_vector(problem.direction)
    if class_scale is not problem.class_scale or direction is not problem.direction:
        problem = problem._replace(class_scale=class_scale, direction=direction)
    return _without_autocast(getattr(implementation(backend), name), problem.x.device.type, problem, *args, **kwargs)


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
