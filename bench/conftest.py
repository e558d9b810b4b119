"""Options of the suite, what its results file says of the machine, and the tables at the end."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from rich.console import Console

import tde_kernels
from bench import results, tables
from bench.cases import DTYPES, Options, at_hand
from bench.machine import roof
from bench.peers import PACKAGES
from bench.shapes import ALL

_started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tde_kernels")
    group.addoption("--shapes", help=f"comma-separated, of {', '.join(ALL)} (default: what each work lists)")
    group.addoption("--dtypes", help=f"comma-separated, of {', '.join(DTYPES)} (default: what each work lists)")
    group.addoption("--backends", help="comma-separated backends of tde_kernels (default: all at hand)")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: cpu)")
    group.addoption("--quick", action="store_true", help="few shapes, one dtype, small budgets, no max-autotune")
    group.addoption("--patience", type=float, default=5.0, help="leave out calls of more seconds than this (5)")
    group.addoption("--stop-after", type=float, help="leave out what has not begun after so many seconds")


def _names(config: pytest.Config, option: str, known: Iterable[str]) -> tuple[str, ...] | None:
    """The names that an option lists, each one known."""
    asked = config.getoption(option)
    names = tuple(asked.split(",")) if asked else None
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise pytest.UsageError(f"{option} must name some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def options(config: pytest.Config) -> Options:
    """What is asked for; as a test, without figures, the suite is quick."""
    device = config.getoption("--device")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device not in devices:
        raise pytest.UsageError(f"--device must be one of {', '.join(devices)}, got {device}")
    return Options(
        _names(config, "--shapes", ALL),
        _names(config, "--dtypes", DTYPES),
        _names(config, "--backends", at_hand(device)),
        device,
        config.getoption("--quick") or config.getoption("--benchmark-disable"),
        config.getoption("--patience"),
    )


def pytest_configure(config: pytest.Config) -> None:
    options(config)  # what is unknown is told before anything is collected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.cases(options(metafunc.config)), ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where time is limited, what compiles first comes last."""
    if config.getoption("--stop-after") is not None:
        items.sort(key=lambda item: "compiled" in item.name or "autotuned" in item.name)


@pytest.fixture(autouse=True)
def _in_time(request: pytest.FixtureRequest) -> None:
    limit = request.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - _started > limit:
        pytest.skip("out of time")


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """The command, the device and the versions that matter; not the machine's own names, nor every flag of its CPU."""
    machine = output_json["machine_info"]
    for name in ("node", "release"):
        machine.pop(name, None)
    machine["cpu"].pop("flags", None)
    for benchmark in output_json["benchmarks"]:
        for name in ("params", "param", "options"):  # its name and the command say them already
            benchmark.pop(name, None)
    asked = options(config)
    measured = {b["extra_info"]["dtype"] for b in output_json["benchmarks"] if "dtype" in b["extra_info"]}
    machine |= {
        "command": shlex.join(["python", "-m", "pytest", *config.invocation_params.args]),
        "device": machine["cpu"]["brand_raw"] if asked.device == "cpu" else torch.cuda.get_device_name(),
        "tde_kernels": tde_kernels.info().versions | tde_kernels.info().build,
        "threads": torch.get_num_threads(),
        "peers": {name: importlib.metadata.version(name) for name in PACKAGES if find_spec(PACKAGES[name])},
        "roofs": {name: roof(asked.device, getattr(torch, name))._asdict() for name in sorted(measured)},
    }


def pytest_terminal_summary(config: pytest.Config) -> None:
    """The tables of the report, of this session."""
    session = getattr(config, "_benchmarksession", None)
    benchmarks = session.benchmarks if session else []
    found = [results.row(b.group, b.extra_info) for b in benchmarks if "ratio" in b.extra_info]
    console = Console(file=sys.__stdout__)
    console.width = console.width if console.is_terminal else 160
    for table in tables.of(found):
        console.print(tables.rich_table(table))
