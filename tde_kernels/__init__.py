"""Fused kernels for causal, normalised classifier heads on long-tailed data."""

from tde_kernels import functional, reference
from tde_kernels._info import info
from tde_kernels._version import __version__
from tde_kernels.backends import use_backend
from tde_kernels.class_parallel import ClassParallelTDEHead
from tde_kernels.distributed import no_sync
from tde_kernels.heads import FusedTDEHead, replace_head

__all__ = [
    "ClassParallelTDEHead",
    "FusedTDEHead",
    "__version__",
    "functional",
    "info",
    "no_sync",
    "reference",
    "replace_head",
    "use_backend",
]
