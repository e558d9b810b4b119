"""The cost of a training step of ``ClassParallelTDEHead``, on its rank with the most classes.

Symbols: C classes, D channels, B the batch of all ranks, P ranks that share the classes out, R = N / P groups of ranks
(data x class), s bytes of a number in the head's dtype. Of its group's ``B/R`` rows a rank brings ``b = B/N`` itself;
it holds ``c = ceil(C/P)`` classes and looks at ``n`` of them, all unless they are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tde_kernels.backends.loss_passes import ON_CPU, ON_GPU, SUMS
from tde_kernels.backends.product import LIBRARY
from tde_kernels.class_parallel.shards import Shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATES = {"sgd": 1, "adam": 2}  # of an optimizer, each as large as the weights: momentum; two moments
FLOAT, LABEL = 4, 8  # bytes of float32 and int64


class Stage(NamedTuple):
    """A part of a step between two collectives: how often it multiplies, and passes over all logits and weights."""

    products: int
    logits: int
    weights: int


# Logits are written and read; for gradients they are multiplied anew, and their gradient takes their place.
STAGES = {"sums": Stage(1, 2, 1), "gradients": Stage(3, 5, 2)}
LAST = Stage(1, 1, 1)  # of the gradients, the weights' of the last classes, while the features' is summed


@dataclass(frozen=True)
class Problem:
    """What is trained, over how many ranks.

    Raises:
        ValueError: sizes that do not divide, or more ranks than classes.
    """

    classes: int
    dim: int
    batch: int  # of all ranks together
    ranks: int
    data_parallel: int = 1  # R, how often the classes are held
    heads: int = 2
    dtype: str = "float32"
    sample_rate: float = 1.0
    targets: int = 1  # label columns; mixup has 2
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        for whole, part in (("batch", "ranks"), ("ranks", "data_parallel"), ("dim", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} must be a multiple of {part}, got {self._said(whole)} and {self._said(part)}"
                )
        if min(self.shards.sizes) == 0:
            raise ValueError(f"classes must leave no rank without one, got {self.classes:,} for {self.shards.ranks:,}")

    def _said(self, name: str) -> str:
        return f"{getattr(self, name):,}"

    @property
    def shards(self) -> Shards:
        """The classes over P ranks."""
        return Shards(self.classes, self.ranks // self.data_parallel)

    @property
    def element(self) -> int:
        """s, in bytes."""
        return DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> int:
        """B/R, features of the group."""
        return self.batch // self.data_parallel

    @property
    def own_rows(self) -> int:
        """b, features of a rank."""
        return self.batch // self.ranks

    @property
    def held(self) -> int:
        """c, classes of the rank."""
        return self.shards.sizes[0]

    @property
    def looked_at(self) -> int:
        """n, classes that a step looks at."""
        if self.sample_rate == 1:
            return self.held
        return min(self.held, max(self.rows * self.targets, round(self.sample_rate * self.held)))


@dataclass(frozen=True)
class Machine:
    """A rank's device and its way to the others."""

    backend: str = "nccl"  # or gloo, on CPUs
    bandwidth: float = 50e9  # bytes/s that a rank sends
    memory_bandwidth: float = 3350e9  # bytes/s
    flops: float = 989e12  # 1/s, of products in the head's dtype
    memory: float = 80e9  # bytes

    @property
    def workspace(self) -> int:
        """Bytes of logits and scaled weights at a time."""
        return ON_GPU if self.backend == "nccl" else ON_CPU


def memory(p: Problem, machine: Machine) -> dict[str, int]:
    """Bytes that the rank holds when it holds the most.

    That is while the gradients are computed, or after it, when the gradient of sampled weights finds its place
    among all or is averaged over groups; or, of very many ranks, when their sums become one. The optimizer is one that
    needs no memory but its states, such as torch's with ``fused=True``; the network before the head is not counted.
    """
    held, looked_at = p.held * p.dim * p.element, p.looked_at * p.dim * p.element
    always = {
        "weights": held,
        "optimizer": STATES[p.optimizer] * held,
        "features": (p.own_rows + p.rows) * p.dim * p.element,
    }
    product = {
        "labels": 2 * p.rows * p.targets * LABEL,  # as they come, and by column
        "sums": p.rows * SUMS * FLOAT,
        "features' gradient": (p.rows + p.own_rows) * p.dim * FLOAT,
        "workspace": workspace(p, machine),
    }
    if p.element < FLOAT:
        product["features in float32"] = p.rows * p.dim * FLOAT
    # With what they are made one with
    moments: list[dict[str, int]] = [{"sums of all ranks": p.shards.ranks * p.rows * (SUMS + 5) * FLOAT}]
    if p.sample_rate < 1:
        moments += [{"sampled weights, their gradient": 2 * looked_at, **product}]
        moments += [{"weights' gradient": held, "sampled weights' gradient": looked_at}]
    else:
        moments += [{"weights' gradient": held, **product}]
    if p.data_parallel > 1:
        moments += [{"weights' gradient, its average": 2 * held}]
    most: dict[str, int] = max(moments, key=_in_all)
    return {**always, **most}


def _in_all(parts: dict[str, int]) -> int:
    return sum(parts.values())


def workspace(p: Problem, machine: Machine) -> int:
    """Bytes of the fused loss: scaled features; then scaled weights, logits and gradients of some classes at a time.

    Half of the backend's workspace is for scaled weights and logits. The last classes' logits and gradient are still
    there while the next logits are computed; oneDNN, if this CPU takes it for float32, copies those that it transposes.
    """
    features = p.rows * (p.dim * p.element + p.heads * FLOAT)
    logits, scaled = p.rows * p.element, p.dim * p.element
    copied = machine.backend == "gloo" and p.dtype == "float32" and LIBRARY == "onednn"
    at_once = classes_at_once(p, machine)
    if at_once == p.looked_at:
        return features + p.looked_at * ((2 if copied else 1) * logits + scaled)
    gradient = p.dim * (FLOAT if machine.backend == "nccl" else p.element)  # CPUs' libraries round to the dtype
    return features + at_once * (2 * logits + scaled + (2 if copied else 1) * gradient)


def classes_at_once(p: Problem, machine: Machine) -> int:
    """How many classes' logits are there together."""
    if p.looked_at * p.rows * p.element <= machine.workspace:
        return p.looked_at
    return min(p.looked_at, max(1, machine.workspace // 2 // ((p.rows + p.dim) * p.element)))


def wire(p: Problem, machine: Machine) -> dict[str, int]:
    """Bytes that the rank sends, by collective, in rings.

    To gather a part of ``m`` bytes from each of P ranks, each sends ``(P - 1) m``; to sum ``m`` bytes and leave each
    with its part ``(P - 1)/P m``, to leave all with the whole twice that. gloo has no reduce-scatter of its own: it
    sums the whole.
    """
    ranks, others = p.shards.ranks, p.shards.ranks - 1
    summed = p.rows * p.dim * FLOAT * others // ranks
    parts = {
        "gather features": others * p.own_rows * p.dim * p.element,
        "gather labels": others * p.own_rows * p.targets * LABEL,
        "gather sums": others * p.rows * SUMS * FLOAT,
        "reduce-scatter features' gradient": summed * (2 if machine.backend == "gloo" else 1),
    }
    if p.data_parallel > 1:
        along = 2 * (p.data_parallel - 1) / p.data_parallel
        parts["all-reduce weights' gradient"] = round(along * p.held * p.dim * p.element)
        parts["all-reduce moving average"] = round(along * (p.dim + 1) * FLOAT)
    return parts


def flops(p: Problem, stage: Stage, classes: int | None = None) -> int:
    """Floating-point operations of a stage's matrix products, of ``classes`` or all that are looked at."""
    return stage.products * 2 * p.rows * (classes or p.looked_at) * p.dim


def traffic(p: Problem, stage: Stage, classes: int | None = None) -> int:
    """Bytes between processor and memory in a stage, where neither weights nor a workspace of logits fit the cache."""
    return (classes or p.looked_at) * (stage.logits * p.rows + stage.weights * p.dim) * p.element


def update_traffic(p: Problem) -> int:
    """The same of the optimizer, and of taking sampled weights out of all and their gradient back among them."""
    states = STATES[p.optimizer]
    found = (3 + 2 * states) * p.held  # reads weights, gradient and states; writes weights and states
    if p.sample_rate < 1:
        found += p.held + 4 * p.looked_at  # clears the gradient; two copies
    return found * p.dim * p.element
