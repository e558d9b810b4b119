"""Every work of the head at the shapes of its users: a group is one work, shape and dtype, its rivals side by side."""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Case, Options, of
from bench.measure import measure
from bench.shapes import SHAPES
from bench.works import WORKS
from tde_kernels.backends.product import MULTIPLIES_BF16

QUICK = {"cpu": ("cifar100", "imagenet_lt"), "cuda": ("cifar100", "imagenet_lt", "inat18", "lvis")}


def cases(options: Options) -> list[Case]:
    """Those asked for, or what each work lists as its own."""

    def wanted(work: str, shape: str, dtype: str) -> bool:
        few = options.quick or getattr(torch, dtype) in slow
        usual = shape in WORKS[work].shapes and (shape in QUICK[options.device] or not few)
        return (
            (usual if options.shapes is None else shape in options.shapes)
            and (dtype in WORKS[work].dtypes or options.dtypes is not None)
            and (shape != "million" or (options.device == "cuda" and dtype != "float32"))  # hours, or beyond memory
        )

    slow = (torch.bfloat16,) if options.device == "cpu" and not MULTIPLIES_BF16 else ()  # minutes a step in torch
    quick_on_cpu = options.quick and options.device == "cpu"
    dtypes = options.dtypes or (("float32",) if quick_on_cpu else ("float32", "bfloat16"))
    return of(SHAPES, dtypes, wanted, options)


def test_work(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
