"""Records the numbers of a release: ``python tests/golden/record.py``, once, before it is tagged.

Into ``tests/golden/<version>/`` go the operands and float64 results of every op, what each backend at hand makes of
them in each dtype, checkpoints with what they predict, and a run of the trainer. ``SHA256SUMS`` lists them: what is
recorded never changes.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
sys.path.append(str(Path(__file__).resolve().parents[1]))

import cases
import torch
from checkpoints import write_checkpoints
from safetensors.torch import save_file
from torch import Tensor

import tde_kernels
from tde_kernels import backends

HERE = Path(__file__).resolve().parent
SUMS = HERE / "SHA256SUMS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_ops(folder: Path) -> None:
    """``ops.safetensors``, the record in float64, and a file of each backend's own results."""
    record: dict[str, Tensor] = {}
    own: dict[str, dict[str, Tensor]] = {}
    for normalizer in cases.NORMALIZERS:
        p = cases.problem(normalizer)
        operands = {"x": p.x, "w": p.w, "direction": p.direction, "class_scale": p.class_scale}
        record |= {f"{normalizer}/{key}": value for key, value in operands.items() if value is not None}
        record |= {f"{normalizer}/{key}": value for key, value in cases.exact(p).items()}
        for backend in backends.NAMES:
            for dtype in DTYPES:
                if backend != "reference" and backends.refusal(backend, "logits", "cpu", dtype) is None:
                    found = cases.results(p.cast(dtype), backend)
                    mine = own.setdefault(backend, {})
                    mine |= {f"{name_of(dtype)}/{normalizer}/{key}": value for key, value in found.items()}
    for name, tensors in {"ops": record, **own}.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")


def main() -> int:
    folder = HERE / tde_kernels.__version__
    if folder.exists():
        print(f"{folder} is on record already; what is recorded never changes: raise the version first")
        return 1
    folder.mkdir()
    write_ops(folder)
    write_checkpoints(folder, trainer_run=True)
    listed = SUMS.read_text() if SUMS.exists() else ""
    files = sorted(path for path in HERE.glob("*/**/*") if path.is_file() and path.suffix != ".pyc")
    new = [path for path in files if f"  {path.relative_to(HERE)}\n" not in listed]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(HERE)}\n" for path in new]
    SUMS.write_text(listed + "".join(lines))
    print(f"{folder}: {len(new)} files, {sum(path.stat().st_size for path in new)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
