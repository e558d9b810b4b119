"""What a cross entropy in pieces asks of a backend, beside its passes around a product."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tde_kernels.backends.around_product import Passes
from tde_kernels.backends.grouped import Intake, Loss, LossPass, Rows

SUMS = 6  # numbers that are kept of a row's softmax, as in csrc/include/tde/cross_entropy.h
ON_CPU = 24 << 20  # bytes; more leaves the cache before it is used again
ON_GPU = 256 << 20  # an estimate, not measured


class LossPasses(Passes, Protocol):
    """The passes of a backend, and its limits."""

    workspace: int  # bytes of logits at a time
    fewest_rows: int  # at a time: with fewer, adding up the weights' gradient costs more than a fourth product

    def scaled_features(self, rows: Rows, dtype: torch.dtype, intake: Intake) -> tuple[Tensor, Tensor | None, Tensor]:
        """The scaled rows, their norms as of :func:`scaled`, and the feature sum if it is to be taken."""
        ...

    def cross_entropy(self, z: Tensor, loss: Loss, classes: int, what: LossPass) -> None:
        """One pass over logits ``z [B, N]`` of some of the ``classes``."""
        ...


def scaled(passes: Passes, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The scaled rows and their norms; no norms and the input itself where nothing scales it."""
    if rows.untouched(dtype):
        return rows.a, None
    norms = rows.a.new_empty((rows.a.shape[0], rows.num_heads), dtype=torch.float32)
    return passes.normalize(rows, dtype, norms=norms), norms
