"""Backbones by name. A backbone maps images to features ``[B, D]`` with ``D = config.features``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tde_trainer.models.small_conv import small_conv
from tde_trainer.schema import ModelConfig

MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {"small_conv": small_conv}

__all__ = ["MODELS"]
