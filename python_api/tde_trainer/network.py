"""Backbone and head as one module, so that a data-parallel wrapper sees every parameter."""

from __future__ import annotations

from torch import Tensor, nn

from tde_kernels import FusedTDEHead
from tde_trainer.errors import UserError
from tde_trainer.methods import METHODS, Method
from tde_trainer.models import MODELS
from tde_trainer.schema import Config


class Network(nn.Module):
    """In training a call returns the method's loss; in evaluation, the features.

    The features are what evaluation needs: every alpha, with and without TDE, follows from them without another
    pass over the images.
    """

    def __init__(self, backbone: nn.Module, head: FusedTDEHead, method: Method) -> None:
        super().__init__()
        self.backbone, self.head, self.method = backbone, head, method

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Scalar loss in training mode, features ``[B, D]`` in evaluation mode."""
        features = self.backbone(images)
        return self.method.loss(self.head, features, target) if self.training else features


def build_network(config: Config, method: str, num_classes: int) -> Network:
    """An untrained network.

    Raises:
        UserError: the head refuses its options, for example a feature size that the heads do not divide.
    """
    try:
        head = METHODS[method].build_head(config.model.features, num_classes, config.head)
    except ValueError as error:
        raise UserError(f"head of method {method!r}: {error}") from error
    return Network(MODELS[config.model.name](config.model), head, METHODS[method])
