"""The cost model: by hand, against what runs of two and four processes send and hold, and on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tde_trainer.plan.model import STAGES, Machine, Problem, flops, memory, wire
from tde_trainer.plan.step import plan_step
from tde_trainer.ranks import ON_CPU
from trainer_tools import TORCHRUN, Tde

JOB = Path(__file__).with_name("plan_job.py")
TIMEOUT = 150.0  # seconds
WITHIN = 0.1
LARGE = Problem(100_000_000, 512, 65536, 64)
# So many that logits do not fit the workspace, and shards are uneven.
MEASURED = Problem(40_001, 128, 768, 2)
CASES = [
    MEASURED,
    replace(MEASURED, dtype="bfloat16"),
    replace(MEASURED, targets=2, optimizer="adam"),
    replace(MEASURED, sample_rate=0.25),
    replace(MEASURED, ranks=4),
    replace(MEASURED, ranks=4, data_parallel=2),
    replace(MEASURED, ranks=4, data_parallel=2, sample_rate=0.25),
]
LARGE_COMMAND = ["plan", "--classes", "100_000_000", "--dim", "512", "--batch", "65536", "--gpus", "64"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[Problem, list[dict[str, int]]]:
    """What every rank sent and held, of all cases."""
    found: dict[Problem, list[dict[str, int]]] = {}
    for ranks in (2, 4):
        folder, cases = tmp_path_factory.mktemp("plan"), [case for case in CASES if case.ranks == ranks]
        (folder / "problems.json").write_text(json.dumps([vars(case) for case in cases]))
        command = [*TORCHRUN, str(ranks), str(JOB), str(folder)]
        ended = subprocess.run(command, timeout=TIMEOUT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        seen = [json.loads((folder / f"measured{rank}.json").read_text()) for rank in range(ranks)]
        found |= {case: list(of_ranks) for case, of_ranks in zip(cases, zip(*seen, strict=True), strict=True)}
    return found


@pytest.mark.skipif(not ON_CPU or sys.platform != "linux", reason="it counts what gloo sends, under Linux")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_ranks_send_and_hold_is_what_was_planned(
    case: Problem, measured: dict[Problem, list[dict[str, int]]]
) -> None:
    machine = Machine("gloo")
    sent = wire(case, machine)
    forward = sum(value for name, value in sent.items() if name.startswith("gather") or "moving" in name)
    for rank in measured[case]:
        assert rank["forward"] == pytest.approx(forward, rel=WITHIN)
        assert rank["backward"] == pytest.approx(sum(sent.values()) - forward, rel=WITHIN)
    # The first rank holds the most classes
    assert measured[case][0]["memory"] == pytest.approx(sum(memory(case, machine).values()), rel=WITHIN)


def test_figures_by_hand() -> None:
    held, sent = memory(LARGE, Machine()), wire(LARGE, Machine())
    assert held["weights"] == held["weights' gradient"] == held["optimizer"] == 100_000_000 // 64 * 512 * 4
    assert sent["gather features"] == 63 * 1024 * 512 * 4
    assert sent["gather labels"] == 63 * 1024 * 8
    assert sent["gather sums"] == 63 * 65536 * 6 * 4
    assert sent["reduce-scatter features' gradient"] == 63 * 1024 * 512 * 4
    assert sum(flops(LARGE, stage) for stage in STAGES.values()) == 4 * 2 * 65536 * (100_000_000 // 64) * 512


def test_one_rank_sends_nothing() -> None:
    assert set(wire(replace(LARGE, ranks=1), Machine()).values()) == {0}


def test_16_bits_halve_features_but_not_their_gradient() -> None:
    whole, half = (wire(replace(LARGE, dtype=dtype), Machine()) for dtype in ("float32", "bfloat16"))
    assert 2 * half["gather features"] == whole["gather features"]
    assert {name for name in whole if whole[name] != half[name]} == {"gather features"}


def test_sampled_classes_are_at_least_the_labels() -> None:
    assert replace(LARGE, sample_rate=0.1).looked_at == 156_250
    assert replace(LARGE, sample_rate=0.01).looked_at == LARGE.batch
    assert replace(LARGE, sample_rate=0.01, classes=6400).looked_at == 100


@pytest.mark.parametrize(
    ("slow", "limit"),
    [({"flops": 1e9}, "products"), ({"memory_bandwidth": 1e6}, "memory"), ({"bandwidth": 1e3}, "wire")],
)
def test_the_slowest_resource_is_the_limit(slow: dict[str, float], limit: str) -> None:
    planned = plan_step(LARGE, replace(Machine(), **slow))  # type: ignore[arg-type]
    assert planned.limit == limit and sum(planned.seconds.values()) >= 0.99 * planned.alone[limit]


def test_a_faster_wire_is_no_slower_where_it_is_hidden() -> None:
    slow, fast = (plan_step(LARGE, Machine(bandwidth=b)).seconds for b in (1e13, 1e14))
    hidden = "last weights' gradient beside the reduce-scatter"
    assert slow[hidden] == fast[hidden] and slow["gather sums"] == pytest.approx(10 * fast["gather sums"])


def test_the_command_prints_tables_or_json(tde: Tde) -> None:
    result = tde(*LARGE_COMMAND)
    assert result.exit_code == 0, result.output
    for shown in ("1,562,500 classes of 100,000,000", "gather sums", "99.1 MB", "the limit is products"):
        assert shown in result.output
    record: dict[str, Any] = json.loads(tde(*LARGE_COMMAND, "--json", "--memory", "8").output)
    assert record["memory"] == memory(LARGE, Machine()) and record["limit"] == "products" and record["fits"] is False
    assert record["measured"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "63"], "batch must be a multiple of ranks, got 65,536 and 63"),
        (["--data-parallel", "3"], "ranks must be a multiple of data_parallel, got 64 and 3"),
        (["--heads", "3"], "dim must be a multiple of heads"),
        (["--classes", "63"], "classes must leave no rank without one, got 63 for 64"),
        (["--dtype", "float8"], "unknown --dtype 'float8'; did you mean"),
        (["--backend", "mpi"], "unknown --backend 'mpi'; known: gloo, nccl"),
        (["--sample-rate", "0"], "--sample-rate must be above 0 and at most 1, got 0"),
    ],
)
def test_a_wrong_option_is_one_line(tde: Tde, options: list[str], message: str) -> None:
    result = tde(*LARGE_COMMAND, *options)
    assert result.exit_code == 2 and f"error: {message}" in result.output
