"""The package as a whole: one version, imports that flow one way, a core that knows nothing of torch."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tde_kernels

PACKAGE = Path(tde_kernels.__file__).parent
CSRC = PACKAGE.parent / "csrc"
# A module may import only what stands on its own level or below
LEVELS = [
    ["checks", "normalizers", "distributed", "envelope", "published", "_version"],
    ["metrics", "reference"],
    ["backends"],
    ["ops"],
    ["functional"],
    ["heads", "_info"],
    ["class_parallel"],
    ["__init__", "__main__"],
]


def level(module: str) -> int:
    """The level of a name such as ``ops.logits``."""
    return next(i for i, names in enumerate(LEVELS) if (module.split(".")[0] or "__init__") in names)


def imports(path: Path) -> set[str]:
    """What a file of the package imports of the package, without the leading ``tde_kernels.``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tde_kernels":
            own = {name for names in LEVELS for name in names}
            found |= {alias.name if alias.name in own else "__init__" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tde_kernels."):
            found.add(str(node.module).removeprefix("tde_kernels."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("tde_kernels.") for a in node.names if a.name.startswith("tde_kernels.")}
    return found


def test_one_version() -> None:
    assert importlib.metadata.version("tde_kernels") == tde_kernels.__version__
    core = pytest.importorskip("tde_kernels._C", reason="no compiled core")
    assert core.build_info().version == tde_kernels.__version__


def test_public_names() -> None:
    assert {
        "ClassParallelTDEHead",
        "FusedTDEHead",
        "replace_head",
        "use_backend",
        "info",
        "functional",
        "reference",
    } <= set(tde_kernels.__all__)
    assert all(hasattr(tde_kernels, name) for name in tde_kernels.__all__)
    both = {
        "grouped_logits",
        "tde_logits",
        "update_head_ema_",
        "background_exempt",
        "grouped_cross_entropy",
        "alpha_sweep",
        "alpha_segments",
        "topk",
    }
    for module in (tde_kernels.functional, tde_kernels.reference):
        assert all((getattr(module, name).__doc__ or "").strip() for name in both)


def test_import_and_first_step_leave_alone_what_is_slow_to_import() -> None:
    """torch itself is most of an import; its compiler and its sharded tensors would double that, Triton adds to it."""
    code = """
import sys, torch, tde_kernels
head = tde_kernels.FusedTDEHead(8, 3)
head.loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).backward()
head.eval()(torch.randn(4, 8))
tde_kernels.info()
print(*{"torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "triton"} & {*sys.modules})
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (child.returncode, child.stdout.strip()) == (0, ""), child.stderr


def test_the_class_parallel_head_is_listed_before_it_is_imported() -> None:
    assert "ClassParallelTDEHead" in dir(tde_kernels)
    with pytest.raises(AttributeError, match="no attribute 'FusedHead'"):
        _ = tde_kernels.FusedHead


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upwards(path: Path) -> None:
    here = level(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for name in imports(path):
        assert level(name) <= here, f"{path.name} imports {name}"


@pytest.mark.skipif(not CSRC.exists(), reason="no sources beside the package")
def test_the_core_knows_neither_torch_nor_python() -> None:
    sources = [p for p in CSRC.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    assert len(sources) > 10
    for path in sources:
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        assert not [i for i in included if re.match(r"(torch|ATen|c10|caffe2)\b", i)], path
        if not path.name.startswith("bindings"):
            assert not [i for i in included if "pybind11" in i or i == "Python.h"], path
        else:
            assert all(i.startswith(("tde/", "pybind11/")) or "/" not in i for i in included)


def test_core_needs_no_torch_at_run_time() -> None:
    core = pytest.importorskip("tde_kernels._C", reason="no compiled core")
    content = Path(core.__file__).read_bytes()
    assert b"libtorch" not in content and b"libc10" not in content and b"libcudart.so" not in content
