"""Time and memory as the batch, the channels, the classes and the heads grow by decades, in float32.

``python -m bench.report`` fits the exponents.
"""

from __future__ import annotations

from typing import Any

from bench.cases import Case, Options, of
from bench.measure import measure
from bench.shapes import SCALING

WORK = {"batch": "step", "dim": "step", "classes": "loss", "heads": "step"}
STEPS = ("bare", "eager")  # beside this package; the loss has most of its rivals
LEFT_OUT = ("bare_by_library", "autotuned_eager")
BUDGET = 0.5


def cases(options: Options) -> list[Case]:
    """Those asked for, or without ``--quick`` all."""
    works = {shape: WORK[axis] for axis, shapes in SCALING.items() for shape in shapes}
    default = () if options.quick else tuple(works)
    asked = [name for name in works if name in (default if options.shapes is None else options.shapes)]
    found = of(asked, options.dtypes or ("float32",), lambda work, shape, _: work == works[shape], options)
    return [
        case._replace(budget=min(case.budget, BUDGET))
        for case in found
        if case.rival.startswith("tde_kernels")
        or (case.rival in STEPS if case.work == "step" else case.rival not in LEFT_OUT)
    ]


def test_scaling(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
