"""Classes shared out over ranks."""

from tde_kernels.class_parallel.head import ClassParallelTDEHead

__all__ = ["ClassParallelTDEHead"]
