"""What the checks are made of. Each compares with one process that holds all classes and features."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle import Problem, problem
from torch import Tensor
from torch import distributed as dist

from tde_kernels import ClassParallelTDEHead, FusedTDEHead, backends

C, D, K, ROWS = 37, 12, 3, 7  # ROWS: of a rank
SOME = ("linear", "deconfound", "lws")
CHECKS: dict[str, Callable[[], None]] = {}
FAULTS: list[str] = []  # of the check that runs
DRAWS = torch.Generator()


def check(run: Callable[[], None]) -> Callable[[], None]:
    """Joins the checks under the function's name."""
    CHECKS[run.__name__] = run
    return run


@contextmanager
def noted(what: str) -> Iterator[None]:
    """A failure of this rank alone is reported in the end, so that ranks stay in step."""
    try:
        yield
    except AssertionError as fault:
        FAULTS.append(f"{what}: {fault}")


def faults_of(run: Callable[[], None]) -> str:
    """What is wrong on this rank."""
    torch.manual_seed(0)
    DRAWS.manual_seed(rank())
    FAULTS.clear()
    try:
        run()
    except Exception:
        FAULTS.append(traceback.format_exc())
    return "\n".join(FAULTS[:5])


def rank() -> int:
    return dist.get_rank()


def ranks() -> int:
    return dist.get_world_size()


def device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def fused() -> str:
    return "cuda" if device() == "cuda" else "cpu"


def own_rows(a: Tensor) -> Tensor:
    """This rank's rows of everybody's."""
    return a.unflatten(0, (ranks(), -1))[rank()]


def own_classes(part: ClassParallelTDEHead) -> slice:
    own = part.shards.of(part.ranks.rank)
    return slice(own.start, own.stop)


def in_place(part: ClassParallelTDEHead, value: Tensor, all_classes: Tensor) -> Tensor:
    """``all_classes``, with this rank's replaced by ``value``."""
    own = part.shards.of(part.ranks.rank)
    found = all_classes.to(value.dtype).clone()
    found[own.start : own.stop] = value
    return found


def heads(p: Problem, **options: Any) -> tuple[FusedTDEHead, ClassParallelTDEHead]:
    """One head with all classes and one with this rank's, on the same weights."""
    keywords = {name: getattr(p, name) for name in ("num_heads", "tau", "gamma", "normalizer", "exponent")}
    of_all = {name: value for name, value in options.items() if name not in ("sample_rate", "seed", "group")}
    whole = FusedTDEHead.from_weight(p.w.detach(), **keywords, **of_all)
    part = ClassParallelTDEHead.from_weight(p.w.detach(), **keywords, **options)
    if p.class_scale is not None:
        own = part.shards.of(part.ranks.rank)
        with torch.no_grad():
            whole.class_scale.copy_(p.class_scale)
            part.class_scale.copy_(p.class_scale[own.start : own.stop])
    return whole, part


def mild(normalizer: str, dtype: torch.dtype) -> Problem:
    """A problem of all ranks' rows whose logits are some tens at most."""
    bounded = normalizer in ("cosine", "capsule", "deconfound")
    return problem(ranks() * ROWS, D, C, K, normalizer, tau=16.0 if bounded else 1.0, dtype=dtype)


def options_of(batch: int, generator: torch.Generator) -> dict[str, dict[str, Any]]:
    """Every option of the loss, and all of them."""
    weight, margin = torch.rand(C, generator=generator) + 0.5, torch.rand(C, generator=generator)
    bias, other = torch.randn(C, generator=generator), torch.randint(C, (batch,), generator=generator)
    single = {
        "plain": {},
        "class_weight": {"class_weight": weight},
        "logit_bias": {"logit_bias": bias},
        "margin": {"margin": margin},
        "label_smoothing": {"label_smoothing": 0.1},
        "ignored class": {"ignore_index": 3},
        "mixup": {"target_b": other, "lam": 0.3},
        "focal": {"focal_exponent": 1.5},
        "lam of a tensor": {"target_b": other, "lam": torch.tensor(0.6)},
    }
    everything = {name: value for options in single.values() for name, value in options.items()}
    everything |= {"ignore_index": -100}
    reductions = {f"all, {reduction}": {**everything, "reduction": reduction} for reduction in ("mean", "sum", "none")}
    return {**single, "sum": {"reduction": "sum"}, "none": {"reduction": "none"}, **reductions}


def labels_of(batch: int, options: dict[str, Any], generator: torch.Generator) -> Tensor:
    target = torch.randint(C, (batch,), generator=generator)
    target[::5] = options.get("ignore_index", -100)
    return target


def step(head: FusedTDEHead, x: Tensor, upstream: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """Loss, and gradients of features, weights and, where there is one, class scale, for an upstream gradient."""
    x = x.clone().requires_grad_()
    loss = head.loss(x, *args, **options)
    leaves = [x, *head.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss))]


@contextmanager
def little_workspace() -> Iterator[None]:
    """The loss takes some classes at a time."""
    passes = type(backends.implementation(fused()).PASSES)
    before, passes.workspace, passes.fewest_rows = (passes.workspace, passes.fewest_rows), ROWS * 10 * 4, 1000
    try:
        yield
    finally:
        passes.workspace, passes.fewest_rows = before


def refused(call: Callable[[], Any], message: str, kind: type[Exception] = ValueError) -> None:
    """On every rank, with that message."""
    try:
        call()
    except kind as found:
        assert message in str(found), str(found)
        return
    raise AssertionError(f"nothing was refused, wanted {message!r}")
