"""The figures in the report of a run of detectors."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from tde_trainer.detection import figures
from tde_trainer.detection.annotations import frequency_groups, read_annotations
from tde_trainer.detection.figures import CAPTIONS, IMAGES, SURE, with_most_rare
from tde_trainer.detection.pictures import Classes, Row
from tde_trainer.pages import write_results_page
from tde_trainer.report import collect, write_report
from trainer_tools import Tde


@pytest.fixture
def copy(tiny_detectors: Path, tiny_shapes: Path, tmp_path: Path) -> Path:
    """The run, and its images, to be changed."""
    shutil.copytree(tiny_shapes, tmp_path / "data")
    run = Path(shutil.copytree(tiny_detectors, tmp_path / "run"))
    for file in (run / "linear/seed0/results.json", run / "deconfound/seed0/results.json"):
        change(file, lambda values: values["config"]["data"].update(root=str(tmp_path / "data")))
    return run


def change(file: Path, how: Any) -> None:
    values = json.loads(file.read_text())
    how(values)
    file.write_text(json.dumps(values))


def page_of(run: Path) -> str:
    return " ".join(html.unescape((run / "report.html").read_text()).split())


def test_training_draws_them(tiny_detectors: Path) -> None:
    page = page_of(tiny_detectors)
    assert {path.stem for path in (tiny_detectors / "plots").glob("*.png")} == set(CAPTIONS)
    assert all(f"<figcaption>{caption}</figcaption>" in page for caption in CAPTIONS.values())
    assert page.count('src="data:image/png;base64,') == len(CAPTIONS) and "left out" not in page


class TestDetections:
    """Images of rare classes, with the truth and what was found."""

    @pytest.fixture
    def drawn(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        kept: dict[str, Any] = {}

        def keep(rows: Sequence[Row], classes: Classes, *, threshold: float) -> Figure:
            kept.update(rows=rows, classes=classes, threshold=threshold)
            return Figure()

        monkeypatch.setattr(figures, "draw_detections", keep)
        return kept

    def test_the_images_are_those_with_most_objects_of_rare_classes(self, tiny_shapes: Path) -> None:
        truth = read_annotations(tiny_shapes / "test.json")
        for rare in (range(30), range(3, 9), range(25, 30), []):
            frequencies = tuple("r" if label in rare else "f" for label in range(30))
            counts = [
                len([found for found in truth.by_image[image.id] if found.category_id - 1 in rare])
                for image in truth.images
            ]
            chosen = with_most_rare(truth, frequencies)
            assert [counts[index] for index in chosen] == sorted(counts, reverse=True)[:IMAGES]
            assert chosen == sorted(chosen, key=lambda index: (-counts[index], index))

    def test_rows_are_the_truth_and_the_submissions(self, copy: Path, drawn: dict[str, Any]) -> None:
        cell = copy / "deconfound/seed0"
        for place, mode in enumerate(("without_tde", "with_tde")):
            entries = json.loads((cell / f"detections/{mode}.json").read_text())
            for number, entry in enumerate(entries):
                entry["score"] = (SURE, SURE - 0.01, 0.9)[(number + place) % 3]
            (cell / f"detections/{mode}.json").write_text(json.dumps(entries))
        figures.draw_all(collect([copy]))
        truth = read_annotations(copy.parent / "data/test.json")
        frequencies = frequency_groups(read_annotations(copy.parent / "data/train.json").image_counts())
        assert drawn["threshold"] == SURE and drawn["classes"].frequencies == frequencies
        chosen = with_most_rare(truth, frequencies)
        for row, index in zip(drawn["rows"], chosen, strict=True):
            image = truth.images[index]
            boxes = np.array([found.bbox for found in truth.by_image[image.id]])
            assert np.allclose(row.truth["boxes"][:, 2:] - row.truth["boxes"][:, :2], boxes[:, 2:], atol=1e-4)
            assert list(row.columns) == ["deconfound", "deconfound + TDE"] and row.image.shape == (3, 48, 48)
            for mode, found in zip(("without_tde", "with_tde"), row.columns.values(), strict=True):
                entries = json.loads((cell / f"detections/{mode}.json").read_text())
                wanted = [entry for entry in entries if entry["image_id"] == image.id and entry["score"] >= SURE]
                assert wanted and found["labels"].tolist() == [entry["category_id"] for entry in wanted]
                assert found["scores"].tolist() == pytest.approx([entry["score"] for entry in wanted])
                box = np.array([entry["bbox"] for entry in wanted])
                assert np.allclose(found["boxes"][:, :2], box[:, :2], atol=1e-4)
                assert np.allclose(found["boxes"][:, 2:], box[:, :2] + box[:, 2:], atol=1e-4)
                assert found["masks"].shape == (len(wanted), 48, 48)

    def test_without_a_method_with_tde_there_is_one_column(self, copy: Path, drawn: dict[str, Any]) -> None:
        figures.draw_all(collect([copy / "linear/seed0"]))
        assert [list(row.columns) for row in drawn["rows"]] == [["linear"]] * IMAGES

    @pytest.mark.parametrize(
        ("gone", "reason"),
        [
            ("data/test", "cannot read image"),
            ("data/test.json", "test.json"),
            ("run/deconfound/seed0/detections", "with"),
        ],
    )
    def test_what_is_gone_is_said(self, gone: str, reason: str, copy: Path, tde: Tde) -> None:
        path = copy.parent / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(copy / "plots")
        result = tde("report", copy)
        assert result.exit_code == 0, result.output
        assert [path.stem for path in (copy / "plots").iterdir()] == ["ap_per_class"]
        said = page_of(copy).partition("The figure detections is left out: ")[2].partition("</p>")[0]
        assert reason in said and str(copy.parent) in said


class TestClasses:
    """Average precision per class."""

    @pytest.fixture
    def rows(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        kept: dict[str, Any] = {}

        def keep(counts: Sequence[int], ap: Mapping[str, Sequence[float]], names: Sequence[str]) -> Figure:
            kept.update(ap)
            return Figure()

        monkeypatch.setattr(figures, "class_plot", keep)
        return kept

    def test_rows_are_means_over_seeds(self, copy: Path, rows: dict[str, Any]) -> None:
        shutil.copytree(copy / "deconfound/seed0", copy / "deconfound/seed1")
        for seed, values in enumerate(([0.2, None, *[0.0] * 28], [0.4, None, *[0.5] * 28])):
            change(
                copy / f"deconfound/seed{seed}/results.json",
                lambda cell, values=values: cell["accuracy"]["with_tde"].update(per_class=values),
            )
        change(copy / "run.json", lambda settings: settings["config"].update(seeds=[0, 1]))
        figures.draw_all(collect([copy]))
        assert list(rows) == ["linear", "deconfound", "deconfound + TDE"]
        assert np.allclose(rows["deconfound + TDE"], [0.3, np.nan, *[0.25] * 28], equal_nan=True)

    def test_runs_of_other_training_images_share_no_axis(self, copy: Path, tiny_detectors: Path) -> None:
        change(copy / "linear/seed0/results.json", lambda cell: cell["class_counts"].__setitem__(0, 99))
        write_report([tiny_detectors, copy], copy / "report.html")
        assert "The figure ap_per_class is left out: the runs are of other training images" in page_of(copy)


def test_the_page_of_results_shows_those_that_are_kept(tiny_detectors: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/shapes_detections.png").write_bytes(b"")
    (tmp_path / "images/shapes_alpha.png").write_bytes(b"")
    file = Path(shutil.copy(tiny_detectors / "results.json", tmp_path / "shapes.json"))
    write_results_page([file], tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "images/shapes_detections.png" in page and "images/shapes_alpha.png" not in page
