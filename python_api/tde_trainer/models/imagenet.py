"""Networks for photographs: the paper's residual networks, and any of torchvision or timm, up to their classifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torchvision
from torch import nn
from torchvision.models import resnet

from tde_kernels import FusedTDEHead, replace_head
from tde_trainer.errors import UserError, unknown
from tde_trainer.fetch import published_weights
from tde_trainer.models.backbone import Backbone
from tde_trainer.schema import ModelConfig

# Blocks, blocks of each stage, groups and width of a group; torchvision has no ResNet-10 and no ResNeXt-101-32x4d.
_RESIDUAL: dict[str, tuple[type[resnet.BasicBlock | resnet.Bottleneck], list[int], int, int]] = {
    "resnet10": (resnet.BasicBlock, [1, 1, 1, 1], 1, 64),
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2], 1, 64),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3], 1, 64),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3], 1, 64),
    "resnet152": (resnet.Bottleneck, [3, 8, 36, 3], 1, 64),
    "resnext50_32x4d": (resnet.Bottleneck, [3, 4, 6, 3], 32, 4),
    "resnext101_32x4d": (resnet.Bottleneck, [3, 4, 23, 3], 32, 4),
}


def beheaded(model: nn.Module, name: str) -> Backbone:
    """A classifier without its last linear layer: features are what that layer was given.

    Raises:
        UserError: there is no linear layer.
    """
    try:
        # The rule for which layer is the classifier is that of the package.
        replace_head(model, num_heads=1)
    except ValueError as error:
        raise UserError(f"model.name={name}: {error}") from error
    place, head = next((place, part) for place, part in model.named_modules() if isinstance(part, FusedTDEHead))
    model.set_submodule(place, nn.Identity())
    return Backbone(model, head.in_features)


def _residual(name: str, config: ModelConfig, channels: int) -> Backbone:
    _three(name, channels)
    block, layers, groups, width = _RESIDUAL[name]
    return beheaded(resnet.ResNet(block, layers, groups=groups, width_per_group=width), name)


RESIDUAL: dict[str, Callable[[ModelConfig, int], Backbone]] = {name: partial(_residual, name) for name in _RESIDUAL}


def from_torchvision(name: str, config: ModelConfig, channels: int) -> Backbone:
    """``torchvision:NAME``: a classifier of ``torchvision.models``.

    Raises:
        UserError: there is none of that name, or it takes other images.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise unknown("network of torchvision", name, known)
    _three(f"torchvision:{name}", channels)
    if not config.pretrained:
        return beheaded(torchvision.models.get_model(name, weights=None), f"torchvision:{name}")
    with published_weights(name):
        model = torchvision.models.get_model(name, weights="DEFAULT")
    return beheaded(model, f"torchvision:{name}")


def from_timm(name: str, config: ModelConfig, channels: int) -> Backbone:
    """``timm:NAME``, for images of any number of channels.

    Raises:
        UserError: there is none of that name.
    """
    import timm  # takes seconds: only for whom it serves

    if not timm.is_model(name):
        raise unknown("network of timm", name, timm.list_models())
    if not config.pretrained:
        return beheaded(timm.create_model(name, in_chans=channels), f"timm:{name}")
    timm.models.set_pretrained_check_hash(True)
    with published_weights(name):
        model = timm.create_model(name, pretrained=True, in_chans=channels)
    return beheaded(model, f"timm:{name}")


def _three(name: str, channels: int) -> None:
    if channels != 3:
        raise UserError(f"model.name={name} is for images of 3 channels, got {channels}")
