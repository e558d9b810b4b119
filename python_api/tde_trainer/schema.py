"""What a recipe may say: the dataclasses are the schema, their defaults the defaults, their metadata the bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def _bounded(default: float, low: float, high: float = math.inf) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class DataConfig:
    """Which data, and how long its tail is."""

    name: str = "digits_lt"
    ratio: float = _bounded(50.0, 1)  # images of the first class over images of the last
    val_per_class: int = _bounded(20, 1)
    test_per_class: int = _bounded(40, 1)


@dataclass
class ModelConfig:
    """The backbone."""

    name: str = "small_conv"
    width: int = _bounded(32, 1)  # channels of the first convolution
    features: int = _bounded(64, 1)  # D, the size of the feature vector


@dataclass
class HeadConfig:
    """The classifier of Eq. 7 and 8. A method may override what defines it, as `linear` does tau."""

    num_heads: int = _bounded(2, 1)
    tau: float = _bounded(16.0, 0)
    gamma: float = _bounded(1 / 32, 0)
    momentum: float = _bounded(0.9, 0, 1)
    alpha: float | None = field(default=None, metadata={"low": 0, "high": 1e6})  # None: chosen on validation data
    alpha_max: float = _bounded(3.0, 0, 1e6)  # the sweep covers 0 .. alpha_max
    alpha_steps: int = _bounded(31, 2)


@dataclass
class TrainConfig:
    """SGD with momentum, linear warm-up, cosine decay to zero."""

    epochs: int = _bounded(60, 1)
    batch_size: int = _bounded(64, 1)
    lr: float = _bounded(0.1, 0)
    momentum: float = _bounded(0.9, 0, 1)
    weight_decay: float = _bounded(5e-4, 0)
    warmup_epochs: int = _bounded(5, 0)
    threads: int = _bounded(0, 0)  # CPU threads; 0: as many as torch takes


@dataclass
class Config:
    """A whole recipe."""

    methods: list[str] = field(default_factory=lambda: ["linear", "cosine", "deconfound"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: str = "fp32"
    out: str = ""  # run directory; empty: runs/<recipe>
    resume: bool = False
    overwrite: bool = False
