"""One benchmark, from its case to its figures. What is wrong is not timed."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import launches, ours
from bench.cases import Case
from bench.machine import roof
from bench.memory import peak_bytes
from bench.peers import Absent
from bench.problem import Problem, Results, Run
from bench.shapes import ALL
from bench.timing import against, on_cpu
from bench.works import WORKS

_TINY = 1e-6  # relative; what float32 may lose beyond twice what eager torch does
_ROUNDS = 3  # of pytest-benchmark's own
_held = lru_cache(maxsize=1)  # one problem at a time, and what belongs to it


@_held
def problem(shape: str, dtype: torch.dtype, device: str) -> Problem:
    torch.compiler.reset()  # one problem's compiled code must not make the next one's dynamic
    return Problem.draw(ALL[shape], device=device, dtype=dtype)


@_held
def expected(work: str, p: Problem) -> Results:
    return WORKS[work].expected(p)


@_held
def allowed(work: str, p: Problem) -> float:
    """The relative error that a rival may have: twice that of eager torch in the same dtype."""
    return 2 * error(work, p, WORKS[work].eager(p)()) + _TINY


def limit_of(work: str, p: Problem) -> Run:
    return WORKS[work].limits[WORKS[work].limit(p.x.dtype, p.x.device.type)](p)


@_held
def seconds_of_limit(work: str, p: Problem) -> float:
    """Of one call, the second."""
    limit = limit_of(work, p)
    limit()
    return on_cpu(limit)


def error(work: str, p: Problem, found: Results) -> float:
    """The largest of the results, relative to what is right; some rivals give fewer results."""

    def relative(a: Tensor, b: Tensor) -> Tensor:
        difference: Tensor = (a.detach().to(b.device, b.dtype) - b).norm() / b.norm()
        return difference

    errors = map(relative, WORKS[work].scored(p, found), expected(work, p))
    return float(torch.stack(list(errors)).amax())  # NaN if one is


def rival_of(case: Case, p: Problem) -> tuple[Run, Run]:
    """The case's rival and its limit, on the same operands and backend."""
    work = WORKS[case.work]
    name, _, how = case.rival.partition(" ")
    backend, _, plan = how.partition(" ")
    if name == "reference":
        p = replace(p, backend="reference")
    elif backend:
        p = replace(p, backend=backend)
    make = {**work.limits, **work.rivals}.get(case.rival, work.ours)
    limit = limit_of(case.work, p)
    return ours.planned(make(p), plan) if plan else make(p), limit


def check(case: Case, p: Problem, run: Run) -> None:
    """Fails unless the first call's results are right; skips where a call outlasts the patience."""
    found: list[Results] = []
    seconds = on_cpu(lambda: found.append(run()))
    if case.rival not in WORKS[case.work].limits:  # they are products of the raw operands
        wrong, most = error(case.work, p, found.pop()), allowed(case.work, p)
        assert wrong <= most, f"{case} is wrong: relative error {wrong:.1e}, where {most:.1e} is allowed"
    if seconds > case.patience and on_cpu(run) > case.patience:  # the first call may have compiled
        pytest.skip(f"a call takes {seconds:.0f} s")


def figures(case: Case, p: Problem, run: Run, limit: Run) -> dict[str, Any]:
    """What is measured, by name."""
    work, shape = WORKS[case.work], p.shape
    flops, moved = work.flops(shape), work.bytes(shape, case.kind)
    timed = against(run, limit, case.device, case.budget)
    beyond = peak_bytes(run, case.device) - work.written(shape) * case.kind.itemsize
    return {
        "work": case.work,
        "shape_name": case.shape,
        "shape": shape._asdict(),
        "dtype": case.dtype,
        "rival": case.rival,
        "device": case.device,
        "limit": work.limit(case.kind, case.device),
        **timed._asdict(),
        "flops": flops,
        "bytes": moved,
        "roofline": roof(case.device, case.kind).floor(flops, moved) / timed.seconds,
        "peak_mib": max(beyond, 0) / 2**20,
        "launches": launches.count(run, case.device),
    }


def measure(benchmark: Any, case: Case) -> None:
    """Checks the case's rival, then times it."""
    benchmark.group = case.group
    p = problem(case.shape, case.kind, case.device)
    slow = seconds_of_limit(case.work, p)
    if slow > case.patience:
        pytest.skip(f"the limit takes {slow:.0f} s a call")
    try:
        run, limit = rival_of(case, p)
        check(case, p, run)
    except Absent as reason:
        pytest.skip(str(reason))
    limit()
    if not benchmark.disabled:
        benchmark.extra_info.update(figures(case, p, run, limit))
    rounds = _ROUNDS if benchmark.disabled or benchmark.extra_info["seconds"] < case.budget else 1
    benchmark.pedantic(run, rounds=rounds, iterations=1)
