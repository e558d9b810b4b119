"""What a recipe of `task: scaling` may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tde_trainer.errors import UserError, unknown
from tde_trainer.schema import ClassifierConfig, RunConfig, ScheduleConfig, bounded


@dataclass
class ScalingDataConfig:
    """Samples that are drawn as they are needed; see `scaling.data`."""

    name: str = "million_lt"
    classes: int = bounded(1_000_000, 2)
    channels: int = bounded(64, 1)  # of a sample
    noise: float = bounded(0.3, 0)  # standard deviation about a class's mean, whose channels are 1 or -1
    train_samples: int = bounded(1280, 1)
    test_samples: int = bounded(512, 1)


@dataclass
class ScalingModelConfig:
    """Two layers."""

    hidden: int = bounded(128, 1)
    features: int = bounded(64, 1)  # D


@dataclass
class ScalingHeadConfig(ClassifierConfig):
    """The classifier of Eq. 7, its classes shared out over all processes."""

    sample_rate: float = bounded(0.1, 1e-9, 1)  # of the method `sampled`


@dataclass
class ScalingConfig(RunConfig):
    """A whole recipe."""

    task: str = "scaling"
    methods: list[str] = field(default_factory=lambda: [*METHODS])
    seeds: list[int] = field(default_factory=lambda: [0])
    data: ScalingDataConfig = field(default_factory=ScalingDataConfig)
    model: ScalingModelConfig = field(default_factory=ScalingModelConfig)
    head: ScalingHeadConfig = field(default_factory=ScalingHeadConfig)
    train: ScheduleConfig = field(default_factory=ScheduleConfig)


# What a method's steps look at, as a share of the classes
METHODS: dict[str, Callable[[ScalingHeadConfig], float]] = {
    "all_classes": lambda head: 1.0,
    "sampled": lambda head: head.sample_rate,
}


def check_scaling(config: ScalingConfig) -> None:
    """Whether all names are known, and sizes divide.

    Raises:
        UserError: they don't.
    """
    named: list[tuple[str, str, Any]] = [("method", method, METHODS) for method in config.methods]
    for what, given, known in [*named, ("data.name", config.data.name, ["million_lt"])]:
        if given not in known:
            raise unknown(what, given, known)
    _divides("data.train_samples", config.data.train_samples, "train.batch_size", config.train.batch_size)
    _divides("model.features", config.model.features, "head.num_heads", config.head.num_heads)


def _divides(whole: str, number: int, part: str, by: int) -> None:
    if number % by:
        raise UserError(f"{whole}={number} must be a multiple of {part}={by}")
