"""Backbone and head as one module, so that a data-parallel wrapper sees every parameter."""

from __future__ import annotations

from torch import Tensor, nn

from tde_kernels import FusedTDEHead
from tde_trainer.errors import UserError
from tde_trainer.methods import METHODS, Batch, Method, Stage
from tde_trainer.models import builder
from tde_trainer.schema import Config


class Network(nn.Module):
    """Called with a batch and a stage it returns the method's loss; with images alone, their features.

    The features are what evaluation needs: every alpha, with and without TDE, follows from them without another
    pass over the images.
    """

    def __init__(self, backbone: nn.Module, head: FusedTDEHead, method: Method) -> None:
        super().__init__()
        self.backbone, self.head, self.method = backbone, head, method

    def forward(self, batch: Batch | Tensor, stage: Stage | None = None) -> Tensor:
        """Scalar loss of a `Batch` at a stage, or features ``[B, D]`` of images."""
        if isinstance(batch, Tensor):
            features: Tensor = self.backbone(batch)
            return features
        assert stage is not None
        return self.method.loss(self.head, self.backbone(batch.images), batch, stage)


def build_network(config: Config, method: str, channels: int, num_classes: int) -> Network:
    """An untrained network for images of that many channels.

    Raises:
        UserError: the head refuses its options, for example a feature size that the heads do not divide.
    """
    chosen = METHODS[method]
    module, features = builder(config.model.name)(chosen.model(config.model), channels)
    try:
        head = chosen.build_head(features, num_classes, config.head, config.loss)
    except ValueError as error:
        raise UserError(f"head of method {method!r}: {error}") from error
    return Network(module, head, chosen)
