"""What every test of the kernels stands on: poisoned memory, the backends there are, and GPU tests that say why not."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Before Triton is imported: without a GPU its kernels run in its interpreter, as one more backend of the CPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What torch.compile keeps on disk knows the ops by name alone, and would outlive a change of their outputs
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

from tde_kernels import backends
from tde_kernels.backends import cpu

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# (backend, device) of every fused implementation at hand: a new backend joins the tests by serving "logits"
FUSED = [
    (name, device)
    for device in DEVICES
    for name in backends.NAMES
    if name != "reference" and backends.refusal(name, "logits", device, torch.float32) is None
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage, of which trainings ask for many, looks through it again."""
    gc.collect()
    gc.freeze()


@cache
def builtins_of(module: Any) -> list[str]:
    """Names in Triton's language that its interpreter replaces."""
    return [name for name, member in inspect.getmembers(module) if triton.language.core.is_builtin(member)]


def replace_builtins(module: Any, builder: Any, scope: Any) -> None:
    """Triton's own, which looks for the names anew at every call of a function: half of the interpreter's time."""
    for name in builtins_of(module):
        if triton.language.core.is_builtin(member := getattr(module, name)):  # not where a caller has replaced it
            interpreter._patch_attr(module, name, member, builder, scope)


if importlib.util.find_spec("triton") is not None:
    import triton
    from triton.runtime import interpreter

    interpreter._patch_builtin = replace_builtins


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh buffers hold NaN, so that an element which a kernel forgets to write shows in the result."""
    if Path(__file__).parent / "trainer" in request.path.parents:  # the trainer's tests choose their own determinism
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Those, and the CPU's held to each of its ways
WAYS = [(*pair, "table") for pair in FUSED]
WAYS += [("cpu", "cpu", plan) for plan in ("unscaled", "product") if ("cpu", "cpu") in FUSED]


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(way).removesuffix("-table"))
def every_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Name and device of a fused backend, which for the test computes logits the way that is named."""
    *pair, plan = request.param
    monkeypatch.setattr(cpu, "plan", plan)
    return tuple(pair)


@pytest.fixture(params=FUSED, ids=lambda pair: "-".join(pair))
def fused(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Name and device of a fused backend."""
    pair: tuple[str, str] = request.param
    return pair


needs_core = pytest.mark.skipif(("cpu", "cpu") not in FUSED, reason="no compiled core")


@pytest.fixture(params=["reference", *(("small", "unscaled", "product") if ("cpu", "cpu") in FUSED else ())])
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a backend that compiles nothing: the reference, and the CPU's held to each of its ways."""
    if request.param == "reference":
        return "reference"
    monkeypatch.setattr(cpu, "plan", request.param)
    return "cpu"
