"""`tde train` of detectors: what it writes down, how it goes on, how alpha is chosen, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tde_trainer import checkpoint
from tde_trainer.config import config_from, load_recipe
from tde_trainer.detection import evaluate, reading, sets
from tde_trainer.detection.annotations import Annotations
from tde_trainer.detection.detector import build_detector
from tde_trainer.detection.images import DetectionImages
from tde_trainer.detection.masks import encode
from tde_trainer.detection.methods import BoxClassification
from tde_trainer.detection.reading import evaluate_detector
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import load_set, prepare_set
from tde_trainer.device import make_accelerator
from tde_trainer.epochs import Cell
from tde_trainer.errors import UserError
from tde_trainer.kinds import DETECTION
from tde_trainer.progress import Reporter
from trainer_tools import TINY_DETECTOR, Tde

MODES = ("without_tde", "with_tde", "with_tde_everywhere")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def defined(measures: dict[str, Any]) -> dict[str, float]:
    """The measures of a table's row, with null as the not-a-number that it was."""
    return {name: math.nan if value is None else value for name, value in measures.items() if name != "per_class"}


class TestWrittenDown:
    """By a run of a linear and a de-confounded detector."""

    def test_there_are_checkpoints_metrics_and_a_report(self, tiny_detectors: Path) -> None:
        assert (tiny_detectors / "report.html").exists() and (tiny_detectors / "results.json").exists()
        for method in ("linear", "deconfound"):
            cell = tiny_detectors / method / "seed0"
            (row,) = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
            assert row["epoch"] == 1 and math.isfinite(row["loss"]) and row["images_per_second"] > 0
            network = torch.load(cell / checkpoint.FILE, weights_only=True)["network"]
            updates = [value.item() for name, value in network.items() if name.endswith("num_updates")]
            assert updates == [6, 6, 6]  # 24 images in batches of 4, a head for every stage

    def test_results_say_how_each_class_fared(self, tiny_detectors: Path, tiny_shapes: Path) -> None:
        content = read(tiny_shapes / "train.json")
        for method, modes in (("linear", MODES[:1]), ("deconfound", MODES)):
            values = read(tiny_detectors / method / "seed0/results.json")
            assert values["class_names"] == [category["name"] for category in content["categories"]]
            assert values["class_counts"] == [category["image_count"] for category in content["categories"]]
            assert tuple(values["accuracy"]) == MODES == tuple(DETECTION.modes)
            for mode, measures in values["accuracy"].items():
                assert (measures is not None) == (mode in modes)
                if measures is not None:
                    assert measures.keys() == {*DETECTION.measures, "per_class"} and len(measures["per_class"]) == 30
            assert (values["alpha"] is None) == (method == "linear")

    def test_submissions_score_what_the_results_say(self, tiny_detectors: Path, tiny_shapes: Path) -> None:
        for file in tiny_detectors.glob("*/seed0/detections/*.json"):
            measures = read(file.parent.parent / "results.json")["accuracy"][file.stem]
            masks, boxes = (evaluate(tiny_shapes / "test.json", file, kind) for kind in ("segm", "bbox"))
            ours = {**{name: masks[name] for name in DETECTION.measures if name != "AP_bbox"}, "AP_bbox": boxes["AP"]}
            assert ours == pytest.approx(defined(measures), nan_ok=True)
        assert len(list(tiny_detectors.glob("*/seed0/detections/*.json"))) == 1 + 3

    def test_submissions_are_of_test_images_in_pixels(self, tiny_detectors: Path, tiny_shapes: Path) -> None:
        images = {image["id"]: image for image in read(tiny_shapes / "test.json")["images"]}
        found = read(tiny_detectors / "deconfound/seed0/detections/with_tde.json")
        assert {entry["image_id"] for entry in found} == images.keys()
        for entry in found:
            image = images[entry["image_id"]]
            left, top, width, height = entry["bbox"]
            assert min(left, top, width, height) >= 0 and 1 <= entry["category_id"] <= 30 and 0 < entry["score"] < 1
            assert left + width <= image["width"] + 1e-3 and top + height <= image["height"] + 1e-3
            assert entry["segmentation"]["size"] == [image["height"], image["width"]]


def tensors(cell: Path) -> dict[str, Any]:
    content = torch.load(cell / checkpoint.FILE, weights_only=True)
    momentum = {str(key): state["momentum_buffer"] for key, state in content["optimizer"].items()}
    return {**content["network"], **momentum}


def counted(original: Callable[..., Any], at: int) -> Callable[..., Any]:
    """``original``, but that its call of that number is Ctrl-C."""
    calls = iter(range(1, 10**6))

    def call(*arguments: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(*arguments)

    return call


class TestGoingOn:
    """After an interruption."""

    @pytest.fixture(scope="class")
    @classmethod
    def command(cls, tiny_shapes: Path) -> list[str]:
        """Two epochs, on images that are repeated."""
        changes = ["methods=[deconfound]", "train.epochs=2", "train.batch_size=8", "train.repeat_threshold=0.1"]
        return ["train", "shapes_lvis", *TINY_DETECTOR, *changes, f"data.root={tiny_shapes}", "head.alpha=1"]

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, command: list[str], tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> Path:
        run = tmp_path_factory.mktemp("whole") / "run"
        result = tde(*command, f"out={run}")
        assert result.exit_code == 0, result.output
        return run / "deconfound/seed0"

    @pytest.mark.parametrize("where", ["between epochs", "within an epoch"])
    def test_it_ends_in_the_same_bits(
        self,
        where: str,
        command: list[str],
        whole: Path,
        tmp_path: Path,
        tde: Tde,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        run = tmp_path / "run"
        with monkeypatch.context() as patch:
            if where == "between epochs":
                patch.setattr(Reporter, "epoch_done", counted(Reporter.epoch_done, 1))
            else:
                steps = int(tensors(whole)["roi_heads.stages.0.box_predictor.head.num_updates"])
                at = 3 * steps * 3 // 4  # a call for each stage: in the second epoch
                loss = counted(BoxClassification.classification_loss, at)
                patch.setattr(BoxClassification, "classification_loss", loss)
            result = tde(*command, f"out={run}")
        assert result.exit_code == 130 and "resume=true" in result.output
        assert len((run / "deconfound/seed0/metrics.jsonl").read_text().splitlines()) == 1

        result = tde(*command, f"out={run}", "resume=true", "data.workers=1")  # which changes nothing either

        assert result.exit_code == 0, result.output
        ours, theirs = tensors(run / "deconfound/seed0"), tensors(whole)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        for name in ("accuracy", "alpha"):
            assert read(run / "deconfound/seed0/results.json")[name] == read(whole / "results.json")[name]
        for mode in MODES:
            name = f"detections/{mode}.json"
            assert (run / "deconfound/seed0" / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture
def copy(tiny_shapes: Path, tmp_path: Path) -> Path:
    """The tiny set, to be changed."""
    return Path(shutil.copytree(tiny_shapes, tmp_path / "shapes"))


def change(file: Path, edit: Callable[[Any], None]) -> None:
    """Edit a JSON file."""
    content = read(file)
    edit(content)
    file.write_text(json.dumps(content))


Quality = Callable[[str, float, bool], int]


def pretend(quality: Quality, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors find ``quality(split, alpha, exempt)`` tenths of an image set's objects, and nothing else."""

    def detect(detector: Any, images: DetectionImages, *_: Any) -> list[dict[str, Any]]:
        head = detector.roi_heads.predictors[-1].head
        truth = images.annotations
        tenths = quality(truth.path.stem, head.alpha.item(), head.background_index is not None)
        return [
            {"image_id": image, "category_id": category, "score": 1.0, "bbox": box, "segmentation": segmentation}
            for number, (image, category, box, segmentation) in enumerate(objects(truth, images))
            if number % 10 < tenths
        ]

    monkeypatch.setattr(reading, "detect", detect)


def objects(truth: Annotations, images: DetectionImages) -> Any:
    for index, image in enumerate(truth.images):
        for item, mask in zip(truth.by_image[image.id], images[index][1]["masks"], strict=True):
            yield image.id, item.category_id, list(item.bbox), encode(mask)


class TestAlpha:
    """And the rest of an evaluation, of detectors that find what they are told to."""

    @pytest.fixture
    def measured(self, tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        def evaluated(quality: Quality, *overrides: str, method: str = "deconfound") -> dict[str, Any]:
            pretend(quality, monkeypatch)
            config = load_recipe("shapes_lvis", [*TINY_DETECTOR, f"data.root={tiny_shapes}", *overrides])
            assert isinstance(config, DetectionConfig)
            data = load_set(config.data)
            detector = build_detector(config, method, data.class_counts, len(data.train.images))
            return evaluate_detector(
                detector, data, config, Cell(tmp_path, method, 0, config), make_accelerator("fp32")
            )

        return evaluated

    def test_it_is_the_best_of_the_validation_images(self, measured: Callable[..., Any], tmp_path: Path) -> None:
        val, test = {0.0: 1, 0.5: 4, 1.0: 9, 2.0: 6}, {0.0: 5, 0.5: 8, 1.0: 7, 2.0: 10}

        def quality(split: str, alpha: float, exempt: bool) -> int:
            return (val if split == "val" else test)[alpha] - 2 * (not exempt)

        found = measured(quality, "head.alphas=[2,0.5,1]")
        alpha = found["alpha"]
        assert alpha["value"] == 1.0 and alpha["chosen_by"] == "AP of masks in the validation images"
        assert [row["alpha"] for row in alpha["tried"]] == [0.5, 1.0, 2.0]
        assert [row["AP"] for row in alpha["tried"]] == pytest.approx([0.4, 0.9, 0.6], abs=0.15)
        shown = {mode: found["accuracy"][mode]["AP"] for mode in MODES}
        assert shown == pytest.approx({"without_tde": 0.5, "with_tde": 0.7, "with_tde_everywhere": 0.5}, abs=0.15)

    def test_every_submission_scores_what_is_reported(
        self, measured: Callable[..., Any], tmp_path: Path, tiny_shapes: Path
    ) -> None:
        found = measured(lambda split, alpha, exempt: 4 + 3 * (alpha > 0) + exempt, "head.alpha=1.25")
        assert found["alpha"] == {"value": 1.25, "chosen_by": "config"}
        for mode in MODES:
            file = tmp_path / "deconfound/seed0/detections" / f"{mode}.json"
            measures = found["accuracy"][mode]
            for name, kind in (("AP", "segm"), ("AP_bbox", "bbox")):
                scored = evaluate(tiny_shapes / "test.json", file, kind)
                assert 0.3 < scored["AP"] < 1 and scored["AP"] == measures[name]
            each = torch.tensor(measures["per_class"])
            assert each.nanmean().item() == pytest.approx(measures["AP"])
        assert len({found["accuracy"][mode]["AP"] for mode in MODES}) == 3

    def test_of_equals_it_is_the_smallest(self, measured: Callable[..., Any]) -> None:
        assert measured(lambda *_: 5, "head.alphas=[2,0.5,1]")["alpha"]["value"] == 0.5

    def test_linear_has_none(self, measured: Callable[..., Any]) -> None:
        found = measured(lambda *_: 5, method="linear")
        assert found["alpha"] is None and [found["accuracy"][mode] is None for mode in MODES] == [False, True, True]

    def test_test_images_have_no_say(self, tiny_detectors: Path, copy: Path, tmp_path: Path, tde: Tde) -> None:
        change(copy / "test.json", lambda content: content.update(annotations=[]))
        run = tmp_path / "run"
        result = tde(
            *("train", "shapes_lvis", *TINY_DETECTOR, "methods=[deconfound]"), f"data.root={copy}", f"out={run}"
        )
        assert result.exit_code == 0, result.output
        ours, theirs = (read(path / "deconfound/seed0/results.json") for path in (run, tiny_detectors))
        assert ours["alpha"] == theirs["alpha"] and len(ours["alpha"]["tried"]) == 2
        assert ours["accuracy"]["with_tde"]["AP"] is None  # of nothing


class TestRefused:
    """Each in one line, with nothing written."""

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("methods=[oltr]", "unknown method 'oltr'"),
            ("methods=[lineal]", r"unknown method 'lineal'; did you mean 'linear'\?"),
            ("loss.name=ldam", "unknown loss.name 'ldam'"),
            ("model.name=resnet51", r"unknown model.name 'resnet51'; did you mean 'resnet50'\?"),
            ("data.name=lvis_v2", r"unknown data.name 'lvis_v2'; did you mean 'lvis_v"),
            ("data.image_size=5", "unknown key 'data.image_size'"),
            ("head.alphas=[]", r"head.alphas=\[\] must be a non-empty list"),
            ("head.alphas=[1,-1]", "must be a non-empty list of finite numbers from 0"),
            ("head.alphas=[nan]", "must be a non-empty list of finite numbers from 0"),
            ("train.repeat_threshold=2", "train.repeat_threshold=2.0 is out of range"),
            ("model.detections=0", "model.detections=0 is out of range"),
            ("model.score_threshold=-1", "model.score_threshold=-1.0 is out of range"),
        ],
    )
    def test_recipes(self, override: str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_recipe("shapes_lvis", [override])

    def test_alpha_can_be_chosen_where_there_are_validation_images(self) -> None:
        with pytest.raises(UserError, match=r"^head.alpha must be given: lvis_v1 has no validation images"):
            load_recipe("shapes_lvis", ["data.name=lvis_v1"])
        assert load_recipe("shapes_lvis", ["data.name=lvis_v1", "head.alpha=1"])

    def test_tasks(self) -> None:
        with pytest.raises(UserError, match=r"unknown task 'detect'; did you mean 'detection'\?"):
            config_from({"task": "detect"})

    @staticmethod
    def refusal(root: Path, tde: Tde, *overrides: str) -> str:
        """What the user sees of a training that cannot be begun."""
        run = root / "run"
        result = tde("train", "shapes_lvis", *TINY_DETECTOR, f"data.root={root}", f"out={run}", *overrides)
        assert result.exit_code == 2 and not run.exists(), result.output
        (line,) = result.output.strip().splitlines()
        return line

    def test_heads_that_do_not_divide_the_channels(self, copy: Path, tde: Tde) -> None:
        assert "error: head of method 'deconfound': " in self.refusal(copy, tde, "head.num_heads=5")

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_files_that_differ_in_their_categories(self, split: str, copy: Path, tde: Tde) -> None:
        other, train = copy / f"{split}.json", copy / "train.json"
        change(other, lambda content: content["categories"].append({**content["categories"][0], "id": 77}))
        wanted = f"error: {other} and {train} must have the same categories; only one of them has 77"
        assert self.refusal(copy, tde) == wanted

    def test_training_images_of_nothing(self, copy: Path, tde: Tde) -> None:
        change(copy / "train.json", lambda content: content.update(annotations=[]))
        assert self.refusal(copy, tde) == f"error: {copy}/train.json marks no object: there is nothing to learn from"

    def test_validation_images_of_nothing(self, copy: Path, tde: Tde) -> None:
        change(copy / "val.json", lambda content: content.update(annotations=[]))
        wanted = f"error: {copy}/val.json marks no object: no alpha can be chosen on it; set head.alpha"
        assert self.refusal(copy, tde) == wanted

    def test_files_that_are_not_there(self, copy: Path, tde: Tde) -> None:
        (copy / "test.json").unlink()
        assert self.refusal(copy, tde) == f"error: no such file: {copy}/test.json"

    @pytest.mark.parametrize("key", ["bbox", "area", "segmentation", "category_id", "image_id"])
    def test_annotations_without_a_key(self, key: str, copy: Path, tde: Tde) -> None:
        change(copy / "train.json", lambda content: content["annotations"][3].pop(key))
        line = self.refusal(copy, tde)
        assert line.startswith(f"error: {copy}/train.json: annotations[3]") and key in line

    def test_sets_too_small_to_draw(self, tmp_path: Path, tde: Tde) -> None:
        line = self.refusal(tmp_path / "new", tde, "data.name=shapes_lvis", "data.train_images=5")
        assert line.startswith("error: a set of shapes has 10 images or more a split")

    def test_an_image_that_is_gone_ends_a_training(self, copy: Path, tmp_path: Path, tde: Tde) -> None:
        (copy / "train/000003.png").unlink()
        for workers in (0, 1):
            result = tde(
                *("train", "shapes_lvis", *TINY_DETECTOR, f"data.root={copy}", f"data.workers={workers}"),
                f"out={tmp_path}/run{workers}",
            )
            wanted = f"error: cannot read image {copy}/train/000003.png: No such file or directory"
            assert result.exit_code == 2 and result.output.strip().splitlines()[-1] == wanted


def test_shapes_are_drawn_as_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(sets, "write_shapes", lambda root, **sizes: drawn.append((root, sizes)))
    for name in ("shapes_lvis", "lvis"):
        changes = [f"data.name={name}", f"data.root={tmp_path}", "data.train_images=77", "data.min_size=96"]
        config = load_recipe("shapes_lvis", changes)
        assert isinstance(config, DetectionConfig)
        prepare_set(config.data)
    assert drawn == [(tmp_path, {"train_images": 77, "size": 96})]
