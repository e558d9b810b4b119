"""Methods by name: how the classifier is built, trained and read."""

from __future__ import annotations

from tde_trainer.methods.base import Method
from tde_trainer.methods.cosine import Cosine
from tde_trainer.methods.deconfound import Deconfound
from tde_trainer.methods.linear import Linear

METHODS: dict[str, Method] = {"linear": Linear(), "cosine": Cosine(), "deconfound": Deconfound()}

__all__ = ["METHODS", "Method"]
