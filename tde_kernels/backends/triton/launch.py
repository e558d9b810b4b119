"""How kernels are launched: on the tensor's device and its current stream, with a configuration from the tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from tde_kernels.backends.triton.arithmetic import INTERPRETED

_LANGUAGE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_autotune = os.environ.get("TDE_AUTOTUNE", "0") == "1"


def language_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return _LANGUAGE[dtype]


def precision() -> str:
    """How float32 tiles are multiplied: as torch's own flags ask for its products."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another than the tensor's."""
    if device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


def compiler_options(backend: str) -> dict[str, int]:
    """Options for Triton's ``backend``, cuda or hip.

    Without a limit of its own NVIDIA's assembler keeps scalars in local memory to fit more programs on a processor.
    """
    return {"maxnreg": 248} if backend == "cuda" else {}


_OPTIONS = compiler_options("cuda" if torch.version.hip is None else "hip")


def autotuning() -> bool:
    """Whether launches choose the fastest configuration by trial.

    Off unless ``TDE_AUTOTUNE=1``: another configuration sums in another order, so that a second run could give other
    bits. A graph under capture takes no timings, and the interpreter's would mean nothing.
    """
    if not _autotune or INTERPRETED.value or torch.are_deterministic_algorithms_enabled():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@cache
def _tuner(kernel: Any, configs: tuple[tuple[tuple[str, int], ...], ...], restored: tuple[str, ...]) -> Any:
    """``kernel`` under Triton's autotuner, which keeps its findings on disk, in Triton's own cache."""
    choices = [_config(dict(config)) for config in configs]
    return triton.autotune(choices, key=["bucket"], restore_value=restored, cache_results=True)(kernel)


def _config(config: dict[str, int]) -> Any:
    blocks = {name: value for name, value in config.items() if name.isupper()}
    return triton.Config(blocks, num_warps=config["num_warps"], num_stages=config["num_stages"])


def run(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: dict[str, Any],
    config: dict[str, int],
) -> None:
    """Launches ``programs`` programs of ``kernel``; none is no launch at all."""
    if programs == 0:
        return
    with _on(device):
        kernel[(programs,)](**arguments, **config, **_OPTIONS)


def run_tuned(
    kernel: Any,
    programs: Callable[[dict[str, Any]], int],
    device: torch.device,
    arguments: dict[str, Any],
    config: dict[str, int],
    others: Sequence[dict[str, int]],
    restored: tuple[str, ...] = (),
) -> None:
    """:func:`run` with ``config``, or under autotuning the fastest of it and ``others`` for this ``bucket``.

    Args:
        programs: their number for a configuration.
        restored: tensors among the arguments that the kernel changes; trials leave them as they were.
    """
    if not autotuning():
        run(kernel, programs(config), device, arguments, config)
        return
    choices = tuple(dict.fromkeys(tuple(sorted(c.items())) for c in (config, *others)))
    if programs(config) == 0:
        return
    with _on(device):
        _tuner(kernel, choices, restored)[lambda chosen: (programs(chosen),)](**arguments, **_OPTIONS)


def bucket(*sizes: int) -> int:
    """One number for all sizes that are tuned as one, each rounded up to a power of two."""
    result = 0
    for size in sizes:
        result = 64 * result + max(size - 1, 0).bit_length()
    return result
