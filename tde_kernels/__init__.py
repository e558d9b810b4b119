"""Fused kernels for causal, normalised classifier heads on long-tailed data."""

from typing import TYPE_CHECKING, Any

from tde_kernels import functional, reference
from tde_kernels._info import info
from tde_kernels._version import __version__
from tde_kernels.backends import use_backend
from tde_kernels.distributed import no_sync
from tde_kernels.heads import FusedTDEHead, replace_head

if TYPE_CHECKING:
    from tde_kernels.class_parallel.head import ClassParallelTDEHead

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


def __getattr__(name: str) -> Any:
    """The class-parallel head when it is first asked for: what it needs of torch takes seconds to import."""
    if name != "ClassParallelTDEHead":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tde_kernels.class_parallel.head import ClassParallelTDEHead

    globals()[name] = ClassParallelTDEHead
    return ClassParallelTDEHead


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
