"""The benchmark suite: what is wrong is not timed, what is unknown is named, and the report says what a file holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import cases, conftest, measure, page, report, results, scaling, tables, works
from bench.bench_works import cases as works_asked
from bench.cases import Case, Options
from bench.peers import Absent
from bench.shapes import SCALING, SHAPES
from bench.works import WORKS

OLD = Path(__file__).parent.parent / "bench" / "results" / "cpu-2026-11-24.json"
QUICK = Options(None, None, None, "cpu", quick=True, patience=5.0)


def _benchmark(work: str, shape: str, rival: str, ratio: float, **info: Any) -> dict[str, Any]:
    figures = {"seconds": ratio / 1e3, "turns": 5, "limit": "bare", "peak_mib": 1.0, "flops": 10**6, "bytes": 10**4}
    figures |= {"work": work, "rival": rival, "dtype": "float32", "ratio": ratio, "roofline": 0.5, "launches": 3}
    return {"group": f"{work} {shape} float32", "extra_info": figures | info, "stats": {"median": ratio / 1e3}}


def _file(path: Path, date: str, benchmarks: list[dict[str, Any]], device: str = "A CPU") -> Path:
    built = {"tde_kernels": "0.1.0", "torch": "2.14", "python": "3.11", "cpu": "avx2 kernels"}
    machine = {"device": device, "cpu": {"brand_raw": device}, "threads": 2, "tde_kernels": built, "command": "pytest"}
    machine["roofs"] = {"float32": {"flops": 1e11, "bytes": 1e10}}
    commit = {"id": "0123456789abcdef"}
    whole = {"machine_info": machine, "commit_info": commit, "datetime": f"{date}T00:00:00", "benchmarks": benchmarks}
    path.write_text(json.dumps(whole))
    return path


def test_a_wrong_rival_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("plain", "cifar10", "float32", "eager", "cpu", 0.1, 5.0)
    right = WORKS["plain"].rivals["eager"]
    for spoil in (lambda z: 1.001 * z, lambda z: z.index_fill(0, torch.tensor([3]), torch.nan)):
        wrong = {"eager": lambda p, spoil=spoil: lambda: (spoil(right(p)()[0]),)}
        monkeypatch.setitem(works.WORKS, "plain", replace(WORKS["plain"], rivals=wrong, eager=right))
        with pytest.raises(AssertionError, match="plain-cifar10-float32-eager is wrong"):
            measure.measure(SimpleNamespace(disabled=True), case)


def test_a_wrong_gradient_counts() -> None:
    p = measure.problem("cifar10", torch.float32, "cpu")
    z, dx, dw, ema = WORKS["step"].ours(p)()
    assert measure.error("step", p, (z, dx, dw, ema)) <= measure.allowed("step", p) < 1e-4
    assert measure.error("step", p, (z, dx, 1.01 * dw, ema)) > 5e-3


@pytest.mark.parametrize("work", ["forward", "step", "loss", "plain"])
def test_torchvisions_class_scores_are_the_heads_logits(work: str) -> None:
    p = measure.problem("cifar10", torch.float32, "cpu")
    found = WORKS[work].rivals["torchvision"](p)()
    assert len(found) == 1 and measure.error(work, p, found) <= measure.allowed(work, p) < 1e-4
    assert measure.error(work, p, (1.01 * found[0],)) > 5e-3


def test_a_loop_over_classes_exempts_the_background() -> None:
    p = measure.problem("cifar10", torch.float32, "cpu")
    (found,) = WORKS["exempt"].rivals["by_class"](p)()
    assert measure.error("exempt", p, (found,)) <= measure.allowed("exempt", p) < 1e-4
    torch.testing.assert_close(found.sum(1), torch.ones(p.shape.batch))


def test_predictions_are_judged_by_the_logits_they_win_with() -> None:
    p = measure.problem("cifar10", torch.float32, "cpu")
    found = WORKS["sweep"].ours(p)()
    assert measure.error("sweep", p, found) <= 1e-6
    assert measure.error("sweep", p, ((found[0] + 1) % p.shape.classes,)) > 0.1


def test_every_work_has_its_limits_this_package_and_labels() -> None:
    for name in WORKS:
        rivals = cases.rivals(name, "float32", QUICK._replace(quick=False))
        assert "tde_kernels cpu" in rivals and rivals[0] == WORKS[name].limit(torch.float32, "cpu")
        assert all(rival in tables.LABELS for rival in rivals if rival.split()[0] != "tde_kernels")


def test_plans_of_the_cuda_backend_are_rivals_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.backends, "refusal", lambda name, *_: "no" if name == "cpu" else None)
    on_gpu = QUICK._replace(device="cuda")
    assert {"tde_kernels cuda hopper", "tde_kernels triton"} < set(cases.rivals("step", "bfloat16", on_gpu))
    assert "tde_kernels cuda hopper" not in cases.rivals("loss", "bfloat16", on_gpu)
    asked = works_asked(on_gpu._replace(quick=False))
    assert {case.dtype for case in asked if case.shape == "million"} == {"bfloat16"}
    assert not any(case.rival == "bare_by_library" for case in asked)


def test_a_plan_holds_for_its_call_alone() -> None:
    from bench.ours import planned
    from tde_kernels.backends import crossovers

    before, seen = crossovers.plan, list[str]()
    planned(lambda: seen.append(crossovers.plan) or (), "small")()  # type: ignore[func-returns-value]
    assert seen == ["small"] and crossovers.plan == before


@pytest.mark.parametrize("option", ["--shapes", "--dtypes", "--backends", "--device"])
def test_what_is_unknown_is_named(option: str, pytestconfig: pytest.Config) -> None:
    given = {"--device": "cpu", "--patience": 5.0, "--quick": True, "--benchmark-disable": True} | {option: "nonsense"}
    config: Any = SimpleNamespace(getoption=given.get)
    with pytest.raises(pytest.UsageError, match=rf"{option} must .* of .*(cifar10|float32|cpu).*got nonsense"):
        conftest.options(config)


def test_exponents() -> None:
    rows = [
        results.Row("step", name, "float32", "bare", 1.0, 1e-6 * shape.batch**1.5, {})
        for name, shape in SCALING["batch"].items()
    ]
    found = scaling.fit(rows, "batch", "bare")
    assert found is not None and found.exponent == pytest.approx(1.5) and (found.smallest, found.largest) == (512, 8192)
    assert scaling.fit(rows[:2], "batch", "bare") is None


def test_the_report_names_losses_and_regressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [_benchmark("step", "lvis", "tde_kernels cpu", 1.0), _benchmark("step", "cifar10", "tde_kernels cpu", 1.0)]
    now = [
        _benchmark("step", "lvis", "bare", 1.0),
        _benchmark("step", "lvis", "tde_kernels cpu", 1.2),
        _benchmark("step", "lvis", "eager", 0.8),
        _benchmark("step", "cifar10", "tde_kernels cpu", 1.05),
        _benchmark("step", "cifar10", "eager", 1.5),
        *(_benchmark("step", name, "tde_kernels cpu", 1.0 + n) for n, name in enumerate(SCALING["batch"])),
        {"group": "overhead training", "extra_info": {"work": "training", "layer": "module", "microseconds": 9.0}},
    ]
    earlier = _file(tmp_path / "a.json", "2026-01-01", before)
    written = tmp_path / "docs" / "performance.md"
    current = _file(tmp_path / "b.json", "2026-01-02", now)
    report.main([str(current), "--against", str(earlier), "--page", str(written)])
    text = written.read_text()
    assert "- step, lvis, float32: faster than tde_kernels: eager torch, as the paper's code 1.50x." in text
    assert "step, cifar10, float32: faster" not in text and "1.50 (1.43x ours, 1.5 ms, 1 MiB)" in text
    assert "step, lvis, float32, tde_kernels cpu: 1.00 to 1.20" in text and "1 grew by more than 10%" in text
    assert "| module | 9.0 | 9.0 |" in text and "0123456789" in text and "`pytest`" in text
    assert "slower than in a.json: step, lvis" in capsys.readouterr().err
    assert {path.name for path in (written.parent / "images").iterdir()} == {"step_by_batch.png", "roofline.png"}


def test_what_is_measured_again_takes_its_place(tmp_path: Path) -> None:
    first = [_benchmark("step", "lvis", "tde_kernels cpu", 1.25), _benchmark("step", "cifar10", "tde_kernels cpu", 3.5)]
    again = _file(tmp_path / "b.json", "2026-01-02", [_benchmark("step", "lvis", "tde_kernels cpu", 0.75)])
    written = tmp_path / "performance.md"
    report.main([str(_file(tmp_path / "a.json", "2026-01-01", first)), str(again), "--page", str(written)])
    text = written.read_text()
    assert "0.75 (" in text and "3.50 (" in text and "1.25 (" not in text
    assert "- Measured again: `pytest`" in text and "a.json" in text and "b.json" in text


def test_a_file_of_the_older_format_compares(tmp_path: Path) -> None:
    old = results.load(OLD)
    assert {row.work for row in old.rows} >= {"forward", "step", "loss", "inference", "sweep", "segments", "topk"}
    now = _file(tmp_path / "new.json", "2026-12-01", [_benchmark("step", "lvis", "tde_kernels cpu", 9.0)])
    text = page.page(results.load(now), old)
    assert "of 1 ratios of ours" in text.replace("\n", " ") and "step, lvis, float32, tde_kernels cpu" in text
    assert "# Performance" in page.page(old, results.load(now))


def test_the_earlier_file_is_the_newest_of_the_device(tmp_path: Path) -> None:
    one = [_benchmark("step", "lvis", "tde_kernels cpu", 1.0)]
    for date in ("2026-01-01", "2026-01-02", "2026-01-03"):
        _file(tmp_path / f"{date}.json", date, one)
    _file(tmp_path / "other.json", "2026-01-02", one, device="Another CPU")
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": {}, "steps": [], "suite": None}))
    found = results.earlier(results.load(tmp_path / "2026-01-03.json"), tmp_path)
    assert found is not None and found.path.name == "2026-01-02.json"
    assert results.earlier(found, tmp_path / "nowhere") is None


def test_an_absent_peer_says_why() -> None:
    with pytest.raises(Absent, match="Liger's kernels need a GPU"):
        WORKS["loss"].rivals["liger"](measure.problem("cifar10", torch.float32, "cpu"))


def test_quick_is_few() -> None:
    asked = works_asked(QUICK)
    assert {case.dtype for case in asked} == {"float32"} and {case.shape for case in asked} == {
        "cifar100",
        "imagenet_lt",
    }
    assert not any("autotuned" in case.rival for case in asked) and len(asked) < 120
    assert {case.shape for case in works_asked(QUICK._replace(quick=False))} == set(SHAPES) - {"million"}


def test_the_limit_is_what_the_device_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "multiplied_as", lambda _: torch.float32)
    assert WORKS["step"].limit(torch.bfloat16, "cpu") == "bare_by_library"
    assert WORKS["step"].limit(torch.bfloat16, "cuda") == WORKS["step"].limit(torch.float32, "cpu") == "bare"
