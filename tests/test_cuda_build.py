"""The CUDA kernels as they were compiled, read back from the binary: architectures, registers, no spills."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tde_kernels.backends import core as backend_core

if backend_core.missing is not None:
    pytest.skip(backend_core.missing, allow_module_level=True)
core = backend_core.compiled()
BUILT = core.build_info()
pytestmark = pytest.mark.skipif(
    not BUILT.has_cuda or BUILT.emulated, reason=f"no machine code for a GPU in the core: {BUILT.cuda}"
)


def cuobjdump(*arguments: str) -> str:
    """Output of cuobjdump on the core; from PATH, or from Triton, which carries one."""
    tool = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if tool is None and triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        tool = str(carried) if carried.exists() else None
    if tool is None:
        pytest.skip("no cuobjdump on PATH or in Triton")
    return subprocess.run([tool, *arguments, core.__file__], check=True, capture_output=True, text=True).stdout


def architectures() -> list[str]:
    """What the build was asked for: "80-real", "120", ..."""
    return BUILT.cuda.split("architectures ")[1].split()


def test_machine_code_for_every_architecture_and_ptx_for_the_newest() -> None:
    # 90 or 90a: a cuobjdump older than the toolkit leaves the letter out; that wgmma is there is another test's
    machine = set(re.findall(r"sm_(\d+)\w?\b", cuobjdump("--list-elf")))
    assert machine == {a.removesuffix("-real").rstrip("a") for a in architectures() if not a.endswith("-virtual")}
    ptx = set(re.findall(r"(?:sm|compute)_(\d+\w?)\b", cuobjdump("--list-ptx")))
    assert ptx == {a.removesuffix("-virtual") for a in architectures() if not a.endswith("-real")}


def test_no_kernel_spills() -> None:
    text = cuobjdump("--dump-resource-usage")
    usage = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    kernels = {name for name, *_ in usage}
    for wanted in (
        "sum_and_fold",
        "fold",
        "normalize",
        "project",
        "exempt",
        "row_loss",
        "forward",
        "gradient",
        "tiled",
        "hopper",
    ):
        assert any(wanted in name for name in kernels), f"no kernel {wanted} among {sorted(kernels)}"
    codes = len([a for a in architectures() if not a.endswith("-virtual")])
    assert len(usage) == codes * len(kernels)  # each kernel on each architecture
    spilt = [(name, stack, local) for name, _, stack, local in usage if int(stack) or int(local)]
    assert not spilt


def instructions(architecture: str) -> dict[str, Counter[str]]:
    """How often each kernel has each instruction that these tests ask for."""
    found: dict[str, Counter[str]] = {}
    for line in cuobjdump("-sass", "-arch", f"sm_{architecture}").splitlines():
        if "Function :" in line:
            found[(name := line.split()[-1])] = Counter()
        elif match := re.search(r"\b(HMMA|LDGSTS|LDSM|STL|LDL|HGMMA|UTMALDG|WARPGROUP\.DEPBAR)\b", line):
            found[name][match[1]] += 1
    assert not [name for name, used in found.items() if used.keys() & {"STL", "LDL"}]  # local memory
    return found


def test_tiled_logits_use_tensor_cores_and_asynchronous_copies() -> None:
    """In every one of its variants, on the oldest architecture built for."""
    oldest = min((a.removesuffix("-real") for a in architectures()), key=lambda a: int(re.findall(r"\d+", a)[0]))
    tiled = {name: used for name, used in instructions(oldest).items() if "tiled" in name}
    assert len(tiled) == 20  # five pairs of dtypes, two sizes of tile, with and without a direction
    for name, used in tiled.items():
        assert used.keys() == {"HMMA", "LDGSTS", "LDSM"}, name


@pytest.mark.skipif("90a-real" not in BUILT.cuda, reason="not built for Hopper")
def test_hopper_multiplies_by_warpgroups_and_lets_the_copy_engine_fetch() -> None:
    """And waits for products twice, as the source does: the compiler adds waits where it sees registers at risk."""
    hopper = {name: used for name, used in instructions("90a").items() if "hopper" in name}
    assert len(hopper) == 16  # four pairs of dtypes, two sizes of tile, with and without a direction
    for name, used in hopper.items():
        assert used.keys() == {"HGMMA", "UTMALDG", "WARPGROUP.DEPBAR"}, name
        assert used["HGMMA"] == 4, name
        assert used["WARPGROUP.DEPBAR"] == 2, name
