"""The commands of a shell block, checked without running what takes long: nothing is trained, built or installed."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docs_blocks import ROOT
from packaging.requirements import Requirement
from tde_trainer.again import parse_alpha
from tde_trainer.app import app
from tde_trainer.config import load_recipe
from tde_trainer.grid import plan as plan_grid
from tde_trainer.published import published_table
from typer.main import get_command
from typer.testing import CliRunner

if importlib.util.find_spec("tomllib"):
    import tomllib
else:  # Python 3.10
    import tomli as tomllib

RUNS = ("info", "plan", "recipes")  # commands of tde that take no time
NOT_OURS = ("cd", "cmake", "git")  # of which nothing can be said here


def commands(code: str) -> Iterator[list[str]]:
    """The simple commands of a block, as words; comments, variables set before a command and redirections left out."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("|&;"):
                command.append(word)
            elif command:
                yield _bare(command)
                command = []


def _bare(words: list[str]) -> list[str]:
    end = next((i for i, word in enumerate(words) if set(word) <= set("<>")), len(words))
    begin = next((i for i, word in enumerate(words) if not re.fullmatch(r"\w+=.*", word)), end)
    return words[begin:end]


def check(words: list[str]) -> None:
    """Raises where a command names what there is not: a program, a command, an option, a file, an extra, a recipe."""
    program, *arguments = words
    name = program.removeprefix(".venv/bin/")
    if name in NOT_OURS:
        return
    if name not in _CHECKS:
        raise AssertionError(f"{program!r} is no program that the documentation's test knows how to check")
    _CHECKS[name](arguments)


def _tde(arguments: list[str]) -> None:
    if arguments == ["--help"] or (arguments[0] in RUNS and "--measure" not in arguments):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    given = command.make_context(name, list(arguments)).params
    if given.get("number") is not None:
        published_table(given["number"])
    if "alpha" in given:
        parse_alpha(given["alpha"])
    if "recipe" in given:
        recipe = Path(given["recipe"])
        if recipe.suffix == ".yaml":
            recipe.touch()  # one that the reader writes
        resolve = plan_grid if name == "grid" else load_recipe
        resolve(given["recipe"], given["overrides"] or [])


def _make(targets: list[str]) -> None:
    known = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in targets:
        assert "=" in target or target in " ".join(known).split(), f"make has no target {target!r}"


def _pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments[1:]:
        if word.startswith((".", "tde_kernels")):
            asked = Requirement(word.replace(".", "tde_kernels", 1) if word.startswith(".") else word).extras
            assert asked <= extras.keys(), f"there are no extras {asked - extras.keys()}"


def _python(arguments: list[str]) -> None:
    first, *rest = arguments
    if first == "-c":
        compile(rest[0], "-c", "exec")
    elif first == "-m":
        _module(*rest)
    else:
        assert (ROOT / first).is_file(), f"there is no script {first!r}"


def _module(name: str, *arguments: str) -> None:
    if name == "tde_trainer":
        _tde(list(arguments))
    else:
        assert importlib.util.find_spec(name), f"there is no module {name!r}"


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import parse_args

    parsed = parse_args(arguments)
    _python([*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args])


def _accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    parsed = launch_command_parser().parse_args(arguments[1:])
    _python([*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args])


def _pytest(arguments: list[str]) -> None:
    for word in arguments:
        assert word.startswith("-") or (ROOT / word.split("::")[0]).exists(), f"there are no tests {word!r}"


def _pre_commit(arguments: list[str]) -> None:
    assert arguments[0] in ("install", "run")


_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": _accelerate,
    "make": _make,
    "pip": _pip,
    "pre-commit": _pre_commit,
    "pytest": _pytest,
    "python": _python,
    "tde": _tde,
    "torchrun": _torchrun,
}
