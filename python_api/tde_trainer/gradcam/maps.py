"""Activation maps by Grad-CAM, whose gradient comes through the head as it is read: with TDE or without."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tde_trainer.errors import UserError
from tde_trainer.network import Network


class Classifier(nn.Module):
    """A trained network from images to logits ``[B, C]``, at one strength of TDE; 0: without.

    It computes in evaluation mode, so that the gradient is that of Eq. 8.
    """

    def __init__(self, network: Network, alpha: float) -> None:
        super().__init__()
        self.network, self.alpha = network.eval(), alpha

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network.head(self.network(images), alpha=self.alpha)
        return logits


class ActivationMaps(NamedTuple):
    """Where a classifier looks."""

    maps: NDArray[np.float32]  # [B, H, W], each in 0 .. 1
    predicted: list[int]  # [B], the classes that the maps are for


def activation_maps(classifier: Classifier, images: Tensor) -> ActivationMaps:
    """The map of every image ``[B, channels, H, W]`` for the class that the classifier takes it for.

    Raises:
        UserError: the backbone has no map, or grad-cam does not load.
    """
    layer = last_map(classifier.network.backbone, images)
    try:
        from pytorch_grad_cam import GradCAM  # takes seconds: only for whom it serves
    except ImportError as error:  # also that of a library of the system, which OpenCV may lack
        raise UserError(f'grad-cam does not load: {error}; pip install "tde_kernels[train]"') from error
    # A backbone whose weights are frozen passes a gradient on where its input wants one.
    images = images.detach().requires_grad_()
    with GradCAM(classifier, [layer]) as cam:
        maps = cam(images, targets=None)
        return ActivationMaps(maps, cam.outputs.argmax(-1).tolist())


@torch.no_grad()
def last_map(backbone: nn.Module, images: Tensor) -> nn.Module:
    """The last module that puts out a map ``[B, channels, h, w]`` of more than one pixel, such as the last stage.

    Raises:
        UserError: there is none, or the network goes on to tokens, as a transformer does.
    """
    found: list[nn.Module] = []
    height, width = images.shape[2:]

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if output.dim() == 3:
            found.clear()
        # Attention matrices and channels-last maps have four dimensions too, but not the proportions of an image.
        elif output.dim() == 4 and len(output) == len(images):
            h, w = output.shape[2:]
            if h * w > 1 and h <= height and w <= width and abs(h * width - w * height) < max(height, width):
                found.append(module)

    handles = [module.register_forward_hook(look) for module in backbone.modules()]
    try:
        backbone.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UserError(
            "activation maps need a convolutional backbone, which puts out maps to the last, not tokens; "
            f"got a {type(backbone).__name__}"
        )
    return found[-1]
