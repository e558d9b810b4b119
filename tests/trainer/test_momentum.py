"""``tde study momentum``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tde_trainer.config import load_config
from tde_trainer.restore import exact_curves
from tde_trainer.study.momentum import config_at
from trainer_tools import TINY, Tde


@pytest.fixture(scope="module")
def study(tde: Tde, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    options = [
        "methods=[linear,deconfound]",
        "seeds=[0,1]",
        f"out={folder / 'runs'}",
        "--page",
        folder / "docs/page.md",
    ]
    result = tde("study", "momentum", "digits_lt", *TINY, *options, "--mu", 0.9, "--mu", 0)
    assert result.exit_code == 0, result.output
    return folder


def test_it_writes_a_page_with_every_figure(study: Path) -> None:
    page = (study / "docs/page.md").read_text()
    names = [f"momentum_{name}.png" for name in ("feature_norm", "relative_change", "alpha", "weight_norm")]
    for name in names:
        assert (study / "docs/images" / name).read_bytes().startswith(b"\x89PNG") and f"(<images/{name}>)" in page
    assert (study / "runs/page.md").exists() and (study / "runs/momentum.json").exists()


def test_its_numbers_are_those_of_the_runs(study: Path) -> None:
    summary = json.loads((study / "docs/results/momentum.json").read_text())
    assert [(row["mu"], row["method"]) for row in summary["rows"]] == [
        (mu, method) for mu in (0, 0.9) for method in ("linear", "deconfound")
    ]
    cells = [json.loads((study / f"runs/mu0.9/deconfound/seed{s}/results.json").read_text()) for s in (0, 1)]
    row = summary["rows"][3]
    assert row["few"]["mean"] == pytest.approx(np.mean([c["accuracy"]["without_tde"]["few"] for c in cells]))
    lifts = [c["accuracy"]["with_tde"]["overall"] - c["accuracy"]["without_tde"]["overall"] for c in cells]
    assert row["lift"]["mean"] == pytest.approx(np.mean(lifts))
    assert summary["cells"] == 8


def test_the_step_in_the_long_run_stays_unless_asked() -> None:
    config = load_config("digits_lt")
    for mu in (0.0, 0.5, 0.98):
        train = config_at(config, mu, fixed_lr=False).train
        assert train.lr / (1 - train.momentum) == pytest.approx(config.train.lr / (1 - config.train.momentum))
    assert config_at(config, 0.5, fixed_lr=True).train.lr == config.train.lr


@pytest.mark.parametrize("mu", [-0.1, 1, "nan"])
def test_a_momentum_out_of_range_is_refused(mu: object, tmp_path: Path, tde: Tde) -> None:
    result = tde("study", "momentum", "digits_lt", f"out={tmp_path / 'out'}", f"--mu={mu}")
    assert result.exit_code == 2 and "--mu" in result.stderr and not (tmp_path / "out").exists()


def test_the_curve_is_the_accuracy_at_every_alpha(study: Path) -> None:
    run = study / "runs/mu0.9"
    curves = exact_curves(run)["deconfound"]
    sweep = json.loads((run / "deconfound/seed0/results.json").read_text())["sweep"]
    for group, (starts, scores) in curves.items():
        assert starts[0] == 0 and starts[-1] == sweep["alphas"][-1] and (np.diff(starts) >= 0).all()
        for alpha, wanted in zip(sweep["alphas"][1:-1], sweep["test"][group][1:-1], strict=True):
            assert scores[np.searchsorted(starts, alpha, side="right") - 1] == pytest.approx(wanted, abs=0.02)
