"""Backbone, neck and head as one module, so that a data-parallel wrapper sees every parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tde_kernels import FusedTDEHead
from tde_trainer.errors import UserError
from tde_trainer.methods import METHODS, Batch, Method, SecondStage, Stage
from tde_trainer.models import builder
from tde_trainer.schema import Config


class Network(nn.Module):
    """Called with a batch and a stage it returns the method's loss; with images alone, the features for the head.

    They are what evaluation needs: every alpha, with and without TDE, follows from them without another
    pass over the images.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module, head: FusedTDEHead, method: Method) -> None:
        super().__init__()
        self.backbone, self.neck, self.head, self.method = backbone, neck, head, method
        self.frozen = isinstance(method, SecondStage) and method.freezes_backbone
        trained = {id(p) for group in self.parameter_groups() for p in group["params"]}
        for parameter in self.parameters():
            # A data-parallel wrapper waits for the gradient of everything that is said to want one.
            parameter.requires_grad_(id(parameter) in trained)

    def train(self, mode: bool = True) -> Network:
        """A frozen backbone stays in evaluation mode: its batch norm learns nothing either."""
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Method.parameter_groups`."""
        return self.method.parameter_groups(self.backbone, self.neck, self.head)

    def forward(self, batch: Batch | Tensor, stage: Stage | None = None) -> Tensor:
        """Scalar loss of a `Batch` at a stage, or features ``[B, D]`` of images."""
        if isinstance(batch, Tensor):
            features: Tensor = self.neck(self.backbone(batch))
            return features
        assert stage is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(batch.images)
        return self.method.loss(self.neck, self.head, features, batch, stage)


def build_network(config: Config, method: str, channels: int, num_classes: int) -> Network:
    """An untrained network for images of that many channels.

    Raises:
        UserError: the head refuses its options, for example a feature size that the heads do not divide.
    """
    chosen = METHODS[method]
    module, features = builder(config.model.name)(chosen.model(config.model), channels)
    try:
        neck = chosen.build_neck(features, num_classes)
        head = chosen.build_head(neck.features, num_classes, config.head, config.loss)
    except ValueError as error:
        raise UserError(f"head of method {method!r}: {error}") from error
    return Network(module, neck.module, head, chosen)
