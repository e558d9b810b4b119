"""The matrix product of the CPU backend: by whichever of torch's own libraries is the faster on this CPU.

torch multiplies float32 with MKL, which is at its best on Intel's CPUs. oneDNN, which torch carries too, took half the
time on the AMD CPU where the two were compared (``docs/design.md``). ``TDE_CPU_PRODUCT=mkl|onednn`` overrides.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tde_kernels.backends import core

# Below this many multiplications oneDNN's preparation costs more than it saves
_WORTH_ONEDNN = 5_000_000


def _choose() -> str:
    asked = os.environ.get("TDE_CPU_PRODUCT")
    if asked not in (None, "mkl", "onednn"):
        raise ValueError(f"TDE_CPU_PRODUCT must be mkl or onednn, got {asked!r}")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "mkl"
    if asked is not None:
        return asked
    return "mkl" if core.missing is not None or core.compiled().build_info().intel_cpu else "onednn"


LIBRARY = _choose()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` of ``a [M, N]`` and ``b [P, N]``, any strides, in their common dtype."""
    worth = a.shape[0] * a.shape[1] * b.shape[0] > _WORTH_ONEDNN
    if LIBRARY == "onednn" and worth and a.dtype == torch.float32:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return result
    return torch.mm(a, b.t())
