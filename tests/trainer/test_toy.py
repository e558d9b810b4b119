"""The one-dimensional example: what is trained, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tde_trainer.study.toy import HEAD, TAIL, WAYS, Setting, Trained, angles, measure, simulate
from torch.testing import assert_close
from trainer_tools import Tde


@pytest.fixture(scope="module")
def trained() -> Trained:
    return simulate(Setting(), seed=0)


def test_a_seed_gives_the_same_twice_and_leaves_torch_alone(trained: Trained) -> None:
    before = torch.random.get_rng_state()
    assert measure(simulate(Setting(), seed=0)) == measure(trained)
    assert measure(simulate(Setting(steps=5), seed=0)) != measure(simulate(Setting(steps=5), seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_conventional_boundary_is_in_the_tail_and_the_others_near_the_middle(trained: Trained) -> None:
    ways = measure(trained)["ways"]
    assert ways["conventional"]["boundary"] < -0.8 and ways["conventional"]["tail"] < 0.6
    for way in ("one_stage", "two_stage", "tde"):
        assert abs(ways[way]["boundary"]) < 0.6
        assert ways[way]["accuracy"] > ways["conventional"]["accuracy"] + 0.1


def test_two_stage_and_tde_keep_the_features(trained: Trained) -> None:
    x = trained.test.x
    kept = trained.ways["conventional"].features(x)
    assert torch.equal(trained.ways["two_stage"].features(x), kept)
    assert torch.equal(trained.ways["tde"].features(x), kept)
    assert torch.equal(trained.ways["tde"].normal(), trained.ways["conventional"].normal())
    assert not torch.equal(trained.ways["one_stage"].features(x), kept)


@pytest.mark.parametrize("way", WAYS)
def test_the_margin_is_the_normal_times_what_is_left_of_a_feature(way: str, trained: Trained) -> None:
    classifier = trained.ways[way]
    features = classifier.features(trained.test.x)
    left = classifier.direct(features)
    assert_close(classifier.margin(features), left @ classifier.normal(), rtol=1e-4, atol=1e-4)
    decided = classifier.margin(features).abs() > 1e-3
    assert torch.equal(angles(left, classifier.normal())[decided] > 0, (classifier.margin(features) > 0)[decided])


def test_tde_can_not_help_where_the_boundary_faces_away_from_the_head_direction() -> None:
    results = measure(simulate(Setting(positive=False), seed=0))
    assert results["boundary_projection"] < 0
    assert results["ways"]["tde"]["accuracy"] == pytest.approx(results["ways"]["conventional"]["accuracy"], abs=0.02)


def test_the_test_draw_is_balanced(trained: Trained) -> None:
    counts = torch.bincount(trained.test.y)
    assert counts[HEAD] == counts[TAIL] == 5000


def test_the_command_writes_page_figure_and_results(tde: Tde, tmp_path: Path) -> None:
    out, page = tmp_path / "toy", tmp_path / "pages/toy.md"
    result = tde("study", "toy", "--seeds", 2, "--out", out, "--page", page)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"page.md", "toy.png", "toy.json"}
    written = {path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*") if path.is_file()}
    assert written == {"toy.md", "images/toy.png", "results/toy.json"}
    assert (out / "toy.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "toy.json").read_text(), parse_constant=pytest.fail)
    assert results["command"] == f"tde study toy --seeds 2 --out {out} --page {page}"
    for kind in results["features"].values():
        assert [row["name"] for row in kind["rows"]] == list(WAYS.values()) and len(kind["seeds"]) == 2
    for text, image in ((page.read_text(), "images/toy.png"), ((out / "page.md").read_text(), "toy.png")):
        assert f"(<{image}>)" in text and results["command"] in text and text.count("| TDE | ") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--out", "file"], "--out file is a file"),
        (["--page", "."], "--page . is a folder"),
    ],
)
def test_a_bad_option_is_one_line(
    options: list[str], message: str, tde: Tde, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = tde("study", "toy", *options)
    assert result.exit_code == 2 and result.output == f"error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
