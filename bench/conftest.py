"""Options of the suite, what its results file says of the machine, and the table of ratios at the end."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

import tde_kernels
from bench.shapes import CPU_SHAPES, SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes",
        default=",".join(CPU_SHAPES),
        help=f"comma-separated shapes to measure, of {', '.join(SHAPES)} (default: %(default)s)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape_name" in metafunc.fixturenames:
        names = metafunc.config.getoption("--shapes").split(",")
        unknown = sorted(set(names) - set(SHAPES))
        if unknown:
            raise pytest.UsageError(f"--shapes must name some of {', '.join(SHAPES)}, got {', '.join(unknown)}")
        metafunc.parametrize("shape_name", names)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The versions that matter; not the machine's own names, nor every flag of its CPU."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info["cpu"].pop("flags", None)
    machine_info["tde_kernels"] = tde_kernels.info().versions | tde_kernels.info().build
    machine_info["threads"] = torch.get_num_threads()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for benchmark in session.benchmarks if session else []:
        if "ratio_to_bare" in benchmark.extra_info:
            rows[benchmark.group][benchmark.extra_info["rival"]] = benchmark.extra_info["ratio_to_bare"]
    if not rows:
        return
    rivals = list(dict.fromkeys(rival for row in rows.values() for rival in row))
    terminalreporter.section("time as a multiple of the bare products (median of interleaved ratios)")
    terminalreporter.write_line(f"{'':<26}" + "".join(f"{rival:>20}" for rival in rivals))
    for group, row in rows.items():
        terminalreporter.write_line(
            f"{group:<26}" + "".join(f"{row.get(rival, float('nan')):>20.3f}" for rival in rivals)
        )
