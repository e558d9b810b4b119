"""What this installation is made of: versions, what was built, and which backend each op takes and why."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, field

import torch

from tde_kernels import backends
from tde_kernels._version import __version__
from tde_kernels.backends import core, crossovers
from tde_kernels.backends.loss_passes import ON_CPU, ON_GPU
from tde_kernels.backends.product import LIBRARY

# Public functions that are, as yet, plain torch around fused logits, everywhere or on the CPU
_COMPOSED = {
    "topk": "on the CPU and with CUDA the logits of some classes at a time, then torch's topk",
    "alpha_sweep": "with CUDA the logits of some rows at a time, then torch's argmax for each alpha",
    "alpha_segments": "on a GPU the logits of some rows at a time, then torch's operations along the envelope",
}


@dataclass(frozen=True)
class Choice:
    """The backend that serves an op on a device, and why those before it do not."""

    op: str
    device: str
    dtype: str
    backend: str
    passed_over: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Info:
    """See :func:`info`. ``str()`` is a report for people."""

    versions: dict[str, str]
    build: dict[str, str]
    choices: list[Choice]
    crossovers: list[str]

    def __str__(self) -> str:
        lines = ["versions  " + ", ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines += [f"{name:<9} {what}" for name, what in self.build.items()]
        lines += ["", f"{'op':<18} {'device':<7} {'dtype':<9} {'backend':<10} passed over"]
        for c in self.choices:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in c.passed_over.items())
            lines.append(f"{c.op:<18} {c.device:<7} {c.dtype:<9} {c.backend:<10} {reasons}")
        lines += ["", *self.crossovers, "", *(f"{op}: {how}" for op, how in _COMPOSED.items())]
        return "\n".join(lines)


def _versions() -> dict[str, str]:
    found = {"tde_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    return found


def _build() -> dict[str, str]:
    if core.missing is not None:
        return {"core": core.missing}
    built = core.compiled().build_info()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "core": f"{built.version}, {built.compiler}",
        "cpu": f"{built.instruction_set} kernels, {built.threading}, {torch.get_num_threads()} threads",
        "products": f"{LIBRARY} (float32 on the CPU)",
        "loss": f"at most {ON_CPU >> 20} MiB of logits at a time on the CPU, {ON_GPU >> 20} on a GPU",
        "cuda": built.cuda,
        "devices": ", ".join(devices) or "cpu alone",
    }


def _choice(op: str, device: str, dtype: torch.dtype) -> Choice:
    passed_over: dict[str, str] = {}
    for name in backends.preferred(op, device, dtype):
        reason = backends.refusal(name, op, device, dtype)
        if reason is None:
            break
        passed_over[name] = reason
    return Choice(op, device, str(dtype).removeprefix("torch."), name, passed_over)


def info() -> Info:
    """Versions, what was built, and which backend each op would take, and why, on the devices of this machine."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    choices = [
        _choice(op, device, dtype)
        for device in devices
        for op in backends.OPS
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    return Info(_versions(), _build(), choices, crossovers.report())
