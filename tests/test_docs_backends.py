"""What docs/backends.md says of the backends is what the code says: ops, dtypes, bounds, variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tde_kernels import backends
from tde_kernels.backends import crossovers, loss_passes

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
# A row of the table, and the ops that it speaks of
ROWS = {
    "logits, Eq. 7, 8, 10": {"logits"},
    "their gradients": {"logits"},
    "moving average of the features": {"update_ema_", "feature_sum", "fold_ema_", "head_direction"},
    "background-exempted inference, Eq. 9": {"background_exempt"},
    "alpha sweep": {"alpha_sweep"},
    "every alpha, exactly": {"alpha_segments"},
    "top-k": {"topk"},
    "cross entropy": {"cross_entropy"},
}


def table() -> list[list[str]]:
    lines = PAGE.partition("## What is fused where\n\n")[2].partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_every_op_has_a_row() -> None:
    assert [row[0] for row in table()[1:]] == list(ROWS)
    assert set().union(*ROWS.values()) == set(backends.OPS)
    assert all(row[-1] == "reference" for row in table()[1:])


@pytest.mark.parametrize(("column", "name"), [(1, "cpu"), (2, "cuda"), (3, "triton")])
def test_the_head_of_a_column_names_the_dtypes_it_serves(column: int, name: str) -> None:
    said = set(re.findall(r"b?float\d+", table()[0][column]))
    device = "cpu" if name == "cpu" else "cuda"
    for op in backends.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            reason = backends.refusal(name, op, device, dtype) or ""
            if "core" in reason:
                pytest.skip(reason)
            assert (str(dtype).removeprefix("torch.") not in said) == reason.startswith("it serves float32"), reason


def test_bounds() -> None:
    for where, size in (("in {} MiB", loss_passes.ON_CPU), ("the same in {} MiB", loss_passes.ON_GPU)):
        assert f"{where.format(size >> 20)}" in PAGE
    if backends.refusal("triton", "topk", "cuda", torch.float32) != "Triton is not installed":
        from tde_kernels.backends.triton import topk

        assert f"up to k = {topk._LONGEST}," in PAGE


def test_it_says_whether_a_gpu_was_there() -> None:
    assert ("have run on a GPU yet" in PAGE) == ("no device yet" in crossovers.MEASURED_ON)


def test_every_variable_is_listed() -> None:
    source = "".join(path.read_text() for path in Path(backends.__file__).parents[1].rglob("*.py"))
    read = set(re.findall(r'environ(?:\.get\(|\[)"((?:TDE|TRITON)_\w+)"', source))
    assert read == set(re.findall(r"^\| `(\w+)", PAGE.partition("## Environment")[2], re.MULTILINE))


def test_why_cuda_was_left_out_is_quoted_as_the_build_says_it() -> None:
    build = (ROOT / "CMakeLists.txt").read_text()
    reasons = {
        re.sub(r"\$\{\w+\}", "...", said) for said in re.findall(r'set\(cuda_status "(left out: [^"]+)"\)', build)
    }
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert reasons == set(re.findall(r"^\| `(left out: [^`]+)`", page, re.MULTILINE))
