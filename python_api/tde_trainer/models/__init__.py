"""Backbones by name: functions of the model's config and the images' channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tde_trainer.errors import unknown
from tde_trainer.models.backbone import Backbone
from tde_trainer.models.imagenet import RESIDUAL, from_timm, from_torchvision
from tde_trainer.models.resnet_cifar import resnet32
from tde_trainer.models.small_conv import small_conv
from tde_trainer.schema import ModelConfig

Builder = Callable[[ModelConfig, int], Backbone]

MODELS: dict[str, Builder] = {"resnet32": resnet32, "small_conv": small_conv, **RESIDUAL}
COLLECTIONS: dict[str, Callable[[str, ModelConfig, int], Backbone]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
}


def builder(name: str) -> Builder:
    """The function that builds the backbone ``name``: one of `MODELS`, or ``timm:NAME`` or ``torchvision:NAME``.

    Raises:
        UserError: there is none of that name; the names within a collection are looked up when it builds.
    """
    collection, colon, model = name.partition(":")
    if colon and collection in COLLECTIONS:
        return partial(COLLECTIONS[collection], model)
    if name not in MODELS:
        raise unknown("model.name", name, [*MODELS, *(f"{known}:NAME" for known in COLLECTIONS)])
    return MODELS[name]


__all__ = ["MODELS", "Backbone", "builder"]
