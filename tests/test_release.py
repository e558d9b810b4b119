"""What a release holds, read from the sources without compiling them; and the release commands' own machinery."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path

import pytest

import tde_kernels
from release import compat, tools

ROOT = Path(__file__).parent.parent
# What works only on the repository
LEFT_OUT = {".ci/run", ".gitignore", ".pre-commit-config.yaml"}
MADE = {"PKG-INFO", "setup.cfg"}
# As pip builds: first the source distribution, then of a wheel all but the core
BUILD = """
import sys
from setuptools import build_meta
sdist, packages = sys.argv[1:]
build_meta.build_sdist(sdist)
sys.argv[1:] = ["--quiet", "build_py", "--build-lib", packages]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
"""


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The files of the repository."""
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True)
    if top.returncode or Path(top.stdout.strip()) != ROOT.resolve():
        pytest.skip("the sources are not a git repository")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the repository in "tree", a source distribution, and the wheel's packages in "wheel"."""
    folder = tmp_path_factory.mktemp("built")
    for name in tracked:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "tree" / name)
    (folder / "tree" / "csrc" / "stray.so").touch()
    command = [sys.executable, "-W", "error::UserWarning", "-c", BUILD, str(folder), str(folder / "wheel")]
    done = subprocess.run(command, cwd=folder / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_source_distribution_is_the_repository(built: Path, tracked: set[str]) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as tar:
        found = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    found = {name for name in found if "egg-info/" not in name}
    assert sorted(found - tracked) == sorted(MADE)
    assert sorted(tracked - found) == sorted(LEFT_OUT & tracked)


def test_the_wheel_holds_the_packages_and_their_data(built: Path, tracked: set[str]) -> None:
    found = {str(p.relative_to(built / "wheel")) for p in (built / "wheel").rglob("*") if p.is_file()}
    tracked = {name.removeprefix("python_api/") for name in tracked}
    assert found == {name for name in tracked if name.startswith(("tde_kernels/", "tde_trainer/"))}
    assert {"tde_kernels/py.typed", "tde_trainer/py.typed", "tde_trainer/recipes/cifar100_lt.yaml"} <= found


def test_what_is_promised_is_what_is_tested(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as tar:
        content = tar.extractfile(next(m for m in tar if m.name.count("/") == 1 and m.name.endswith("/PKG-INFO")))
        assert content is not None
        metadata = Parser().parsestr(content.read().decode())
    assert metadata["Version"] == tde_kernels.__version__ and metadata["License-Expression"] == "MIT"
    oldest = compat.ENVIRONMENTS[0]
    always = {r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert len(always) == 2 and {f"{r.replace('>=', '==')}.*" for r in always} < set(oldest.requirements)
    assert metadata["Requires-Python"] == f">={oldest.python}"
    named = {c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if ":: Python :: 3." in c}
    assert named == {environment.python for environment in compat.ENVIRONMENTS}


def program(path: Path, answer: str) -> Path:
    """A program that prints ``answer``, or fails where that is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{f'echo {answer}' if answer else 'exit 127'}\n")
    path.chmod(0o755)
    return path


def test_an_interpreter_is_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    program(tmp_path / "shims" / "python3.99", "")
    program(tmp_path / "other" / "python3.99", "3.98")
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:{tmp_path / 'other'}:/usr/bin:/bin")
    with pytest.raises(tools.ReleaseError, match=r"there is no Python 3\.99"):
        tools.interpreter("3.99")
    good = program(tmp_path / ".pyenv/versions/3.99.1/bin/python3.99", "3.99")
    assert tools.interpreter("3.99") == good


def test_commands_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    log = tmp_path / "log"
    tools.run([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"], log=log)
    assert log.read_text() == "None\n"
    with pytest.raises(tools.ReleaseError, match=r"failed \(3\); see .*log: "):
        tools.run([sys.executable, "-c", "raise SystemExit(3)"], log=log)
    with pytest.raises(tools.ReleaseError, match="no_such_tool is missing"):
        tools.run(["no_such_tool"])


def test_a_run_is_counted_by_pytests_account(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_not(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\ndef test_error(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=junit.xml", "-c", "/dev/null", "test_three.py"]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert tools.run(command, tmp_path, tmp_path / "log", check=False, environment=alone).returncode == 1
    result = compat.Result("here", "core", "3.99")
    compat.read_junit(tmp_path / "junit.xml", result)
    assert (result.passed, result.skipped) == (1, 1) and not result.ok
    assert result.failed == ["test_three::test_bad", "test_three::test_error"]


def test_the_page_has_the_results_of_compat() -> None:
    results = json.loads((ROOT / "docs/results/compat.json").read_text())
    environments = results["environments"]
    assert list(environments) == [environment.name for environment in compat.ENVIRONMENTS]
    for found in environments.values():
        assert found["passed"] and not found["failed"] and not found["problem"]
    assert compat.markdown(results) in (ROOT / "docs/trust.md").read_text()
