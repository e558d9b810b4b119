"""Options of the suite, what its results file says of the machine, and the table of ratios at the end."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import tde_kernels
from bench.shapes import SHAPES

_PEERS = {"cut-cross-entropy": "cut_cross_entropy", "liger-kernel": "liger_kernel"}  # and the modules they install


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes",
        help=f"comma-separated shapes to measure, of {', '.join(SHAPES)} (default: what each file lists as MEASURED)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape_name" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--shapes")
        names = asked.split(",") if asked else metafunc.module.MEASURED
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
    machine_info["peers"] = {name: importlib.metadata.version(name) for name in _PEERS if find_spec(_PEERS[name])}


_LIMITS = {"ratio_to_bare": "the bare products", "ratio_to_inference": "one TDE inference"}
_WIDTH = 20


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    for key, limit in _LIMITS.items():
        found = [b for b in session.benchmarks if key in b.extra_info] if session else []
        for work in dict.fromkeys(b.group.split()[0] for b in found):
            _print_table(terminalreporter, [b for b in found if b.group.split()[0] == work], key, limit)


def _print_table(out: Any, found: list[Any], key: str, limit: str) -> None:
    """A line for each shape, a column for each rival; beside the ratio the peak of memory, where it was measured."""
    work = found[0].group.split()[0]
    rivals = list(dict.fromkeys(b.extra_info["rival"] for b in found))
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for b in found:
        memory = f" {b.extra_info['peak_mib']:6.0f} MiB" if "peak_mib" in b.extra_info else ""
        rows[b.group.split()[1]][b.extra_info["rival"]] = f"{b.extra_info[key]:.2f}{memory}"
    out.section(f"{work}: time as a multiple of {limit} (median of interleaved ratios)")
    out.write_line(f"{'':<16}" + "".join(f"{rival:>{_WIDTH}}" for rival in rivals))
    for shape, row in rows.items():
        out.write_line(f"{shape:<16}" + "".join(f"{row.get(rival, '-'):>{_WIDTH}}" for rival in rivals))
