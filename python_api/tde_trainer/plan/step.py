"""How long a training step takes, and what limits it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tde_trainer.plan.model import (
    LAST,
    STAGES,
    Machine,
    Problem,
    Stage,
    classes_at_once,
    flops,
    memory,
    traffic,
    update_traffic,
    wire,
)


@dataclass(frozen=True)
class Plan:
    """All figures of one rank."""

    memory: dict[str, int]  # bytes held
    wire: dict[str, int]  # bytes sent in a step, by collective
    flops: int  # of a step's products
    traffic: int  # bytes between processor and memory in a step
    seconds: dict[str, float]  # of a step's parts, one after another
    alone: dict[str, float]  # seconds that each resource would take if the others cost nothing
    fits: bool  # in the device's memory

    @property
    def limit(self) -> str:
        """The resource that takes longest: products, memory or wire."""
        return max(self.alone, key=lambda resource: self.alone[resource])

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "limit": self.limit}


def plan_step(p: Problem, machine: Machine) -> Plan:
    """The model of a step: a stage takes what its products take, or its memory, whichever is longer.

    Collectives and stages follow one another, but the features' gradient is summed while that of the last classes'
    weights is computed.
    """

    def takes(stage: Stage, classes: int | None = None) -> float:
        return max(flops(p, stage, classes) / machine.flops, traffic(p, stage, classes) / machine.memory_bandwidth)

    held, sent = memory(p, machine), wire(p, machine)
    work = sum(flops(p, stage) for stage in STAGES.values())
    moved = sum(traffic(p, stage) for stage in STAGES.values()) + update_traffic(p)
    last = takes(LAST, classes_at_once(p, machine))
    on_wire = {name: value / machine.bandwidth for name, value in sent.items()}
    summed = on_wire.pop("reduce-scatter features' gradient")
    afterwards = sum(on_wire.pop(name) for name in list(on_wire) if name.startswith("all-reduce"))
    seconds = {
        "gather features and labels": on_wire["gather features"] + on_wire["gather labels"],
        "sums": takes(STAGES["sums"]),
        "gather sums": on_wire["gather sums"],
        "gradients": max(0.0, takes(STAGES["gradients"]) - last),
        "last weights' gradient beside the reduce-scatter": max(last, summed),
        "optimizer": update_traffic(p) / machine.memory_bandwidth,
    }
    if afterwards:
        seconds["all-reduce over groups"] = afterwards
    alone = {
        "products": work / machine.flops,
        "memory": moved / machine.memory_bandwidth,
        "wire": sum(sent.values()) / machine.bandwidth,
    }
    return Plan(held, sent, work, moved, seconds, alone, sum(held.values()) <= machine.memory)
