"""Compiles every Triton kernel that the backend would launch, for a target that need not be there.

Run as a script, without the interpreter: ``python ahead_of_time.py cuda 90``. It calls the backend's ops with tensors
on the CPU, under a driver that knows nothing but its target, and with launches replaced by compilation; so that what is
compiled is what a device would run. Prints one JSON object for each kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tde_kernels.backends.grouped import Grouped, Intake, Loss, LossPass, Wants
from tde_kernels.backends.loss_passes import SUMS
from tde_kernels.backends.triton import configs, kernels, launch
from tde_kernels.normalizers import Classifier, resolve


class CompileOnly:
    """All of a driver that compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(compiled: Any, target: GPUTarget) -> tuple[int, int]:
    """A thread's registers, and its bytes of stack and local memory; on AMD, vector registers and those spilled.

    (Scalar ones spill to vector registers.)
    """
    if target.backend == "hip":
        used, spilt = (
            re.findall(rf"vgpr_{what}:\s+(\d+)", compiled.asm["amdgcn"]) for what in ("count", "spill_count")
        )
        return max(map(int, used)), sum(map(int, spilt))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return max(int(used) for used, _, _ in found), sum(int(stack) + int(local) for _, stack, local in found)


def instructions(compiled: Any) -> list[str]:
    """The matrix instructions in the compiled code."""
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return sorted({name for name in ("wgmma", "mma.sync", "tcgen05.mma", "v_mfma") if name in text})


class Recorder:
    """Compiles in place of launching, each specialisation once."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.seen: set[str] = set()
        self.case = ""

    def run(self, kernel: Any, programs: int, device: Any, arguments: dict[str, Any], config: dict[str, int]) -> None:
        compiled = kernel.warmup(
            **arguments, **config, **launch.compiler_options(self.target.backend), grid=(programs,)
        )
        if compiled.hash in self.seen:
            return
        self.seen.add(compiled.hash)
        registers, spilt = resources(compiled, self.target)
        report = {
            "kernel": kernel.__name__,
            "case": self.case,
            "config": config,
            "registers": registers,
            "spills": spilt,
            "shared": compiled.metadata.shared,
            "instructions": instructions(compiled),
            "dots": compiled.asm["ttir"].count("tt.dot"),
            "precision": str(arguments.get("PRECISION")),
            "operand": str(arguments.get("OPERAND")),
        }
        print(json.dumps(report), flush=True)

    def run_tuned(
        self, kernel: Any, programs: Any, device: Any, arguments: dict[str, Any], config: Any, others: Any, **_: Any
    ) -> None:
        self.run(kernel, programs(config), device, arguments, config)


def cases() -> Iterator[tuple[str, str, torch.dtype, bool, tuple[int, int, int, int]]]:
    """Normalizer, dtype, with a direction or not, and sizes: batch, dim, classes, heads."""
    inat18, lvis, cifar100 = (512, 2048, 8142, 2), (8192, 1024, 1231, 2), (512, 64, 100, 2)
    for sizes in (inat18, cifar100):
        for directed in (False, True):
            yield f"deconfound {sizes} {directed}", "deconfound", torch.bfloat16, directed, sizes
    yield "tau_norm", "tau_norm", torch.bfloat16, True, (512, 2048, 1000, 4)
    yield "lws", "lws", torch.bfloat16, True, lvis
    yield "linear", "linear", torch.bfloat16, False, inat18
    yield "float16", "cosine", torch.float16, True, lvis
    yield "float32", "deconfound", torch.float32, True, lvis
    yield "ragged", "capsule", torch.bfloat16, True, (129, 3 * 43, 1231, 3)


def unmultiplied(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """In place of a library's product, whose values no compilation asks for."""
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype)


def main(backend: str, arch: str) -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 64 if backend == "hip" else 32)
    triton.runtime.driver.set_active(CompileOnly(target))
    recorder = Recorder(target)
    launch.run, launch.run_tuned = recorder.run, recorder.run_tuned
    torch.mm = unmultiplied
    configs.plan = "single"
    for recorder.case, normalizer, dtype, directed, (batch, dim, classes, heads) in cases():
        compile_ops(recorder, normalizer, dtype, directed, batch, dim, classes, heads)


def compile_ops(
    recorder: Recorder,
    normalizer: str,
    dtype: torch.dtype,
    directed: bool,
    batch: int,
    dim: int,
    classes: int,
    heads: int,
) -> None:
    """Every op once, forward and backward, with and without the EMA."""
    classifier = Classifier(
        resolve(normalizer, gamma=1 / 32, exponent=0.7),
        heads,
        16.0,
        torch.ones(classes) if normalizer == "lws" else None,
    )
    x, w = torch.zeros(batch, dim, dtype=dtype), torch.zeros(classes, dim, dtype=dtype)
    p = Grouped.of(x, w, classifier, *((torch.zeros(dim), torch.tensor(3.0)) if directed else ()))
    ema, count, mask = torch.zeros(dim), torch.tensor(0), torch.ones(batch, dtype=torch.bool)
    for intake in (Intake(),) if directed else (Intake(), Intake(mask, ema, count, 0.9)):
        z, saved, _ = kernels.logits(p, intake, dtype)
    wants = Wants(True, True, p.class_scale is not None)
    kernels.logits_backward(p, z, saved, wants)
    target, each = torch.zeros(batch, dtype=torch.int64), torch.ones(classes)
    loss = Loss(target, torch.ones(batch), target, torch.ones(batch), each, each, each, 0.1, -100, 1.5)
    sums = torch.zeros(batch, SUMS)
    for what in (Loss(target, torch.ones(batch)), loss):
        kernels.PASSES.cross_entropy(z, what, classes, LossPass(losses=torch.ones(batch), gradient=True))
        kernels.PASSES.cross_entropy(z[:, :-1], what, classes, LossPass(1, sums=sums))
        kernels.PASSES.cross_entropy(z, what, classes, LossPass(take=False, sums=sums, gradient=True))
    if directed:
        kernels.background_exempt(p, background=0, log=True, dtype=dtype)
        kernels.alpha_sweep(p, torch.zeros(32))
        kernels.topk(p, k=5, dtype=dtype)
        kernels.update_ema_(ema, count, x, mask, momentum=0.9)
        kernels.feature_sum(x, None)
        kernels.fold_ema_(ema, count, torch.zeros(dim + 1), momentum=0.9)
        configs.plan = "library"
        try:
            kernels.logits(p, Intake(), dtype)
            kernels.logits_backward(p, z, saved, wants)
        finally:
            configs.plan = "single"


if __name__ == "__main__":
    main(*sys.argv[1:])
