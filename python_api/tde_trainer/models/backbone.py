"""What a backbone is to the trainer."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Backbone(NamedTuple):
    """A module from images ``[B, channels, H, W]`` to features ``[B, D]``, and D."""

    module: nn.Module
    features: int
