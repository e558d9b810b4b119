"""Decoupled training: a second stage begins with a network trained on the data as they are (`from=RUN`)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from tde_kernels import FusedTDEHead
from tde_trainer.methods.linear import Linear
from tde_trainer.schema import Config, TrainConfig


class StageOne(Protocol):
    """The trained network of the first stage."""

    @property
    def weight(self) -> Tensor:
        """``[C, D]``, of its linear classifier."""

    def features(self, split: str) -> tuple[Tensor, Tensor]:
        """Features ``[N, D]`` and classes ``[N]`` of ``train`` (without augmentation) or ``val``."""


class SecondStage(Linear):
    """Takes the backbone of stage 1, leaves it as it is, batch norm included, and makes another classifier for it.

    Attributes:
        epochs: that it is trained for where the recipe does not say; 0: it follows from stage 1 without training.
        freezes_backbone: whether it stays as stage 1 left it.
    """

    epochs: int = 0
    freezes_backbone: bool = True

    @abstractmethod
    def begin(self, neck: nn.Module, head: FusedTDEHead, first: StageOne) -> dict[str, Any]:
        """Set what is known before training; returns what was chosen, for results.json."""

    def schedule(self, config: Config) -> TrainConfig:
        """See `Method.schedule`: cosine decay, each class as often."""
        epochs = self.epochs and (config.stage_two.epochs or self.epochs)
        return replace(
            config.train,
            epochs=epochs,
            lr=config.stage_two.lr,
            warmup_epochs=0,
            decay="cosine",
            sampler="class_aware",
        )

    def parameter_groups(self, backbone: nn.Module, neck: nn.Module, head: FusedTDEHead) -> list[dict[str, Any]]:
        """See `Method.parameter_groups`."""
        return [{"params": [*neck.parameters(), *head.parameters()], "lr_factor": 1.0}]
