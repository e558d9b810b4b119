"""Nothing that is read is run: a walk through the sources of both packages for the calls by which it could be."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest


def folder_of(package: str) -> Path:
    """Where it lies: here, or as a wheel installed it."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


FOLDERS = (folder_of("tde_kernels"), folder_of("tde_trainer"), Path(__file__).parent.parent / "bench")
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))

# Modules whose readers rebuild any object, and so run what a file says
REBUILDING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# `subprocess` and `importlib` are not among them: what they are given is looked at below, or is no file's content
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"}
FORBIDDEN |= {"torch.hub.load", "torch.package.PackageImporter", "torch.jit.load", "torch.ops.load_library"}
FORBIDDEN |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "unsafe_load_all")}
# Arguments without which a call would do the same
WANTED = {("torch.load", "weights_only"): True, ("numpy.load", "allow_pickle"): False}


def suspicious(source: str) -> Iterator[str]:
    """The calls and imports of a source by which a file could run code, with their lines."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                names[alias.asname or alias.name] = before + alias.name
                if (before + alias.name).split(".")[0] in REBUILDING:
                    yield f"{node.lineno}: import of {before}{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            called = names.get(first, first) + dot + rest
            given = {word.arg: word.value for word in node.keywords}
            if called in FORBIDDEN or (called.startswith("subprocess.") and not _is(given.get("shell"), False, None)):
                yield f"{node.lineno}: {called}"
            for (name, argument), value in WANTED.items():
                if called == name and not _is(given.get(argument), value):
                    yield f"{node.lineno}: {called} without {argument}={value}"


def _is(node: ast.expr | None, *values: bool | None) -> bool:
    return (node is None and None in values) or (isinstance(node, ast.Constant) and node.value in values)


def test_no_source_can_run_what_it_reads() -> None:
    found = [f"{path}:{what}" for path in SOURCES for what in suspicious(path.read_text())]
    assert len(SOURCES) > 100 and found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch as t\nt.load(path, weights_only=flag)",
        "from torch import load\nload(path)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=loader)",
        "from yaml import unsafe_load as read\nread(text)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "from subprocess import check_output\ncheck_output(text, shell=flag)",
        "import torch\ntorch.hub.load(repository, name)",
    ],
)
def test_the_walk_sees(source: str) -> None:
    assert list(suspicious(source))


def test_the_walk_lets_pass() -> None:
    source = """
import subprocess, re, torch, yaml
import numpy as np
torch.load(path, map_location="cpu", weights_only=True)
np.load(path, allow_pickle=False)
yaml.safe_load(text)
subprocess.run([program, text])
re.compile(text)
model.eval()
"""
    assert list(suspicious(source)) == []
