"""LVIS's measures, against the official package."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from tde_trainer.detection.annotations import frequency_groups, read_annotations
from tde_trainer.detection.evaluation import KINDS, evaluate, score
from tde_trainer.errors import UserError
from trainer_tools import Tde

Content = dict[str, Any]
Entries = list[dict[str, Any]]

pytestmark = [  # of the official packages themselves
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning"),
]

OFFICIAL = {f"AP{end}": f"AP_{end}" for end in "smlrcf"} | {"AR@300": "AR"}  # its names of ours
CATEGORIES = {2: "r", 3: "r", 17: "c", 40: "c", 41: "f", 90: "f", 91: "f"}


def official(content: Content, detections: Entries, kind: str, folder: Path) -> dict[str, float]:
    """The measures of `lvis` 0.5.3, under our names; NaN for its -1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)  # which numpy 1.24 removed
        from lvis import LVISEval

        path = folder / "official.json"
        path.write_text(json.dumps(content))
        evaluation = LVISEval(str(path), copy.deepcopy(detections), kind)
        evaluation.run()
    results = {OFFICIAL.get(name, name): value for name, value in evaluation.get_results().items()}
    names = [name for name in results if not name.startswith("AR") or name == "AR"]
    return {name: math.nan if results[name] == -1 else results[name] for name in names}


class Maker:
    """Random images, objects and detections, with everything that is seldom."""

    def __init__(self, seed: int, version: str = "v1", images: int = 12) -> None:
        self.random = np.random.default_rng(seed)
        self.sizes = {int(key): (120, 160) for key in self.random.permutation(100)[:images] + 1}
        self.version = version

    def box(self, key: int) -> list[float]:
        height, width = self.sizes[key]
        longest = self.random.choice([20, 60, 140])  # of all of the three areas
        w, h = (float(side) for side in self.random.uniform(2, [min(longest, width), min(longest, height)]).round(2))
        left, top = self.random.uniform(0, [width - w, height - h]).round(2)
        return [float(left), float(top), w, h]

    def mask(self, key: int, box: list[float]) -> Any:
        """A shape in a box: polygons, or run lengths."""
        left, top, w, h = box
        inner = [left, top + h / 2, left + w / 2, top, left + w, top + h / 2, left + w / 2, top + h]
        polygons = [inner, [left, top, left + w / 4, top, left, top + h / 4]]
        form = self.random.integers(3)
        if form == 0:
            return polygons
        height, width = self.sizes[key]
        merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        if form == 1:
            return {**merged, "counts": merged["counts"].decode()}
        ends = np.flatnonzero(np.diff(coco_mask.decode(merged).ravel(order="F"), prepend=0)).tolist()
        return {"size": [height, width], "counts": np.diff([0, *ends, height * width]).tolist()}

    def compressed(self, key: int, box: list[float]) -> dict[str, Any]:
        """The only form of a mask that the official package takes of a detection without box."""
        left, top, w, h = box
        shape = [[left, top, left + w, top, left + w / 2, top + h]]
        merged = coco_mask.merge(coco_mask.frPyObjects(shape, *self.sizes[key]))
        return {**merged, "counts": merged["counts"].decode()}

    def some(self, most: int) -> list[int]:
        return [int(key) for key in self.random.permutation(list(CATEGORIES))[: self.random.integers(most + 1)]]

    def annotations(self, most: int = 10) -> Content:
        images, objects = [], []
        for place, (key, (height, width)) in enumerate(self.sizes.items()):
            name = {"file_name": f"COCO_val2014_{key:012}.jpg"}
            if self.version == "v1":
                name = {"coco_url": f"http://images.cocodataset.org/val2017/{key:012}.jpg"}
            lists = {"neg_category_ids": self.some(4), "not_exhaustive_category_ids": self.some(3)}
            images.append({"id": key, "height": height, "width": width, **name, **lists})
            for _ in range(self.random.integers(1, most) if place else 0):  # of the first image none
                box = self.box(key)
                category = int(self.random.choice(list(CATEGORIES)[1:]))  # of the first category none
                objects.append({"image_id": key, "category_id": category, "bbox": box, "area": box[2] * box[3] / 2})
                objects[-1]["segmentation"] = self.mask(key, box)
        objects[0] |= {"area": 0.0}
        objects[1] |= {"bbox": [*objects[1]["bbox"][:2], 0.0, 5.0]}
        objects[2] |= {"area": 32.0**2}
        objects[3] |= {"area": 96.0**2}
        for number, item in enumerate(self.random.permutation(np.array(objects, dtype=object)), 1):
            item["id"] = number
        categories = [{"id": key, "name": f"c{key}", "frequency": group} for key, group in CATEGORIES.items()]
        return {"categories": categories[::-1], "images": images, "annotations": objects}

    def detections(self, content: Content, form: str = "both", others: int = 60) -> Entries:
        """Objects found somewhat displaced, twice or not at all, and things that are not there."""
        found: Entries = []
        for item in content["annotations"]:
            for _ in range(self.random.integers(3)):
                moved = np.array(item["bbox"]) + self.random.normal(0, 2, 4)
                box = [float(value) for value in [*moved[:2], *moved[2:].clip(0)]]
                found.append(self.detection(item["image_id"], item["category_id"], box, form))
        for key in list(self.sizes)[:-1]:  # in the last image none of them
            for _ in range(self.random.integers(others)):
                category = int(self.random.choice(list(CATEGORIES)))
                found.append(self.detection(key, category, self.box(key), form))
        found += [{**item, "score": 1.0, "bbox": [*item["bbox"][:3], 0.0]} for item in found[:3] if "bbox" in item]
        return [found[place] for place in self.random.permutation(len(found))]

    def detection(self, key: int, category: int, box: list[float], form: str) -> dict[str, Any]:
        entry = {"image_id": key, "category_id": category, "score": float(self.random.integers(12)) / 12}  # many ties
        place = {"bbox": box} if form != "mask" else {}
        return {**entry, **place, **({"segmentation": self.compressed(key, box)} if form != "box" else {})}


def close(ours: dict[str, float], wanted: dict[str, float]) -> bool:
    return ours.keys() == wanted.keys() and ours == pytest.approx(wanted, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["box", "mask", "both"])
@pytest.mark.parametrize("seed", range(4))
def test_all_measures_equal_the_official_ones(seed: int, form: str, kind: str, tmp_path: Path) -> None:
    maker = Maker(seed, version=["v0.5", "v1"][seed % 2])
    content = maker.annotations()
    detections = maker.detections(content, form)
    wanted = official(content, detections, kind, tmp_path)
    assert 0 < wanted["AP"] < wanted["AP50"] < 1
    assert close(evaluate(tmp_path / "official.json", detections, kind), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_of_an_image_the_300_best_count(seed: int, kind: str, tmp_path: Path) -> None:
    maker = Maker(seed, images=3)
    content = maker.annotations(most=40)
    detections = maker.detections(content, others=900)
    assert max(np.unique([item["image_id"] for item in detections], return_counts=True)[1]) > 400
    wanted = official(content, detections, kind, tmp_path)
    assert close(evaluate(tmp_path / "official.json", detections, kind), wanted)
    ordered = sorted(detections, key=lambda item: -item["score"])
    assert close(evaluate(tmp_path / "official.json", ordered, kind), official(content, ordered, kind, tmp_path))


def test_all_300_may_be_of_one_class(files: tuple[Path, Path]) -> None:
    place = {"image_id": 1, "category_id": 2, "bbox": [5.0, 5.0, 20.0, 20.0]}
    content = json.loads(files[0].read_text())
    square = [[5.0, 5.0, 25.0, 5.0, 25.0, 25.0, 5.0, 25.0]]
    lists: dict[str, list[int]] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    content["images"] = [{"id": 1, "height": 120, "width": 160, "file_name": "a.jpg", **lists}]
    content["annotations"] = [{**place, "id": 1, "area": 400.0, "segmentation": square}]
    files[0].write_text(json.dumps(content))
    misses = [{**place, "bbox": [60.0, 60.0, 9.0, 9.0], "score": 0.9}] * 299
    for kind in KINDS:
        found = evaluate(files[0], [*misses, {**place, "score": 0.1}], kind)
        assert (found["AR"], found["AP"]) == (1, pytest.approx(1 / 300))
        assert evaluate(files[0], [*misses, misses[0], {**place, "score": 0.1}], kind)["AR"] == 0


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Annotations, and a submission."""
    maker = Maker(0)
    content = maker.annotations()
    paths = tmp_path / "lvis.json", tmp_path / "found.json"
    for path, value in zip(paths, (content, maker.detections(content)), strict=True):
        path.write_text(json.dumps(value))
    return paths


def test_files_and_what_they_hold_give_the_same(files: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    detections = json.loads(files[1].read_text())
    before = copy.deepcopy(detections)
    first = evaluate(files[0], files[1], "segm")
    assert evaluate(read_annotations(files[0]), detections, "segm") == first and detections == before
    assert capfd.readouterr() == ("", "")
    values = [{**item, "score": np.float32(item["score"]), "image_id": np.int64(item["image_id"])} for item in before]
    assert evaluate(files[0], values, "segm") == first  # numpy's numbers too


def test_nothing_found_is_zero(files: tuple[Path, Path]) -> None:
    for kind in KINDS:
        measures = evaluate(files[0], [], kind)
        assert set(measures.values()) == {0.0}


def test_what_no_class_has_is_undefined(files: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(files[0].read_text())
    content["annotations"] = [item for item in content["annotations"] if CATEGORIES[item["category_id"]] != "c"]
    detections = json.loads(files[1].read_text())
    wanted = official(content, detections, "bbox", tmp_path)
    assert math.isnan(wanted["AP_c"]) and wanted["AP_f"] > 0
    assert close(evaluate(tmp_path / "official.json", detections), wanted)
    content["annotations"] = []
    (tmp_path / "empty.json").write_text(json.dumps(content))
    assert all(math.isnan(value) for value in evaluate(tmp_path / "empty.json", detections).values())


def test_classes_are_scored_in_the_order_of_their_ids(files: tuple[Path, Path]) -> None:
    found = score(*files)
    per_class, measures = found.per_class(), found.measures()
    assert per_class.shape == (len(CATEGORIES),) and per_class.isnan().tolist() == [True] + [False] * 6
    assert found.frequencies == tuple(CATEGORIES.values())
    for group in "rcf":
        mean = per_class[[value == group for value in CATEGORIES.values()]].nanmean().item()
        assert measures[f"AP_{group}"] == pytest.approx(mean)


def test_perfect_detections_are_perfect(files: tuple[Path, Path]) -> None:
    truth = [item for item in json.loads(files[0].read_text())["annotations"] if item["area"] > 0 < item["bbox"][2]]
    content = json.loads(files[0].read_text()) | {"annotations": truth}
    files[0].write_text(json.dumps(content))
    perfect = [{**item, "score": 1.0} for item in truth]
    for kind in KINDS:
        assert list(evaluate(files[0], perfect, kind).values()) == pytest.approx([1.0] * 10)


def test_groups_may_be_those_of_the_training_images(files: tuple[Path, Path]) -> None:
    groups = frequency_groups(torch.tensor([500, 500, 500, 500, 50, 5, 5]))
    found, own = score(*files, frequencies=groups), score(*files)
    assert found.measures()["AP_c"] == pytest.approx(own.per_class()[4].item())
    assert found.measures()["AP"] == own.measures()["AP"]
    with pytest.raises(UserError, match=r"^frequencies must be r, c or f for each of 7 categories; got \('r',\)"):
        score(*files, frequencies=["r"])


def test_many_classes_are_scored_quickly(tmp_path: Path) -> None:
    """As many as LVIS v0.5 has."""
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": [], "file_name": "a.jpg"}
    place = {"image_id": 1, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 400.0}
    square = [[5.0, 5.0, 25.0, 5.0, 25.0, 25.0, 5.0, 25.0]]
    content = {
        "categories": [{"id": key, "name": str(key), "frequency": "rcf"[key % 3]} for key in range(1, 1231)],
        "images": [{"id": 1, "height": 64, "width": 64, **lists}],
        "annotations": [{**place, "id": key, "category_id": key, "segmentation": square} for key in range(1, 1231)],
    }
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    found = [{**place, "category_id": key, "score": 0.5} for key in range(1, 1231)]
    assert evaluate(path, found)["AP"] == pytest.approx(300 / 1230)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 1000}, "image_id is 1000; wanted is the id of one of the images of .*lvis.json"),
        ({"category_id": 1}, "category_id is 1; wanted is the id of one of the categories of .*lvis.json"),
        ({"image_id": None}, "has no image_id; it has category_id, score, bbox, segmentation"),
        ({"score": None}, "has no score"),
        ({"score": float("nan")}, "score is nan; wanted is a finite number"),
        ({"score": "high"}, "score is 'high'; wanted is a finite number"),
        ({"bbox": [1, 2, 3]}, "bbox is .* four finite numbers"),
        ({"bbox": [1, 2, 3, float("inf")]}, "bbox is .* four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "bbox is .* no side below 0"),
        ({"bbox": None, "segmentation": None}, "has neither bbox nor segmentation"),
        ({"segmentation": {"size": [160, 120], "counts": "abc"}}, r"segmentation is .* image's size, \[120, 160\]"),
        ({"bbox": None, "segmentation": {"size": [120, 160], "counts": "34"}}, "no mask: run lengths of 7 pixels"),
        ({"bbox": [1, 2, 3, 1e9], "segmentation": None}, "no mask: polygons with coordinates"),
    ],
)
def test_bad_detections_are_named_by_their_index(
    changes: dict[str, Any], message: str, files: tuple[Path, Path]
) -> None:
    truth = read_annotations(files[0])
    shown = next(item for items in truth.by_image.values() for item in items if item.area > 0)
    first = json.loads(files[1].read_text())[0]
    judged = {"image_id": shown.image_id, "category_id": shown.category_id, "score": 1.0}
    entry = {key: value for key, value in {**judged, **place_of(first), **changes}.items() if value is not None}
    with pytest.raises(UserError, match=f"^detection 1: {message}"):
        evaluate(truth, [first, entry], "segm")


def place_of(detection: dict[str, Any]) -> dict[str, Any]:
    return {key: detection[key] for key in ("bbox", "segmentation")}


def test_a_file_of_detections_is_named(files: tuple[Path, Path]) -> None:
    for text, message in [("{}", "found.json holds a dict; wanted is a list"), ("[3]", "found.json: detection 0 is 3")]:
        files[1].write_text(text)
        with pytest.raises(UserError, match=message):
            evaluate(*files)


def test_a_damaged_mask_of_the_truth_is_named(files: tuple[Path, Path]) -> None:
    content = json.loads(files[0].read_text())
    item = next(item for item in content["annotations"] if item["area"] > 0)
    item["segmentation"] = {"size": [120, 160], "counts": "34"}
    files[0].write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"^annotation {item['id']}: no mask: run lengths of 7 pixels"):
        evaluate(*files, "segm")


def test_paths_may_be_text(files: tuple[Path, Path]) -> None:
    assert evaluate(*map(str, files)) == pytest.approx(evaluate(*files), nan_ok=True)


def test_there_are_two_kinds(files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="unknown kind 'mask'; known: bbox, segm"):
        evaluate(*files, "mask")


def test_the_command_prints_the_measures(files: tuple[Path, Path], tde: Tde) -> None:
    for kind in KINDS:
        result = tde("ap", *files, "--kind", kind)
        title, names, _, row = (line.split() for line in result.output.splitlines() if line.strip())
        assert result.exit_code == 0 and title == ["LVIS,", f"{kind},", "in", "%"]
        assert dict(zip(names, map(float, row), strict=True)) == {
            name: pytest.approx(100 * value, abs=0.06) for name, value in evaluate(*files, kind).items()
        }


def test_the_command_says_what_is_wrong(files: tuple[Path, Path], tde: Tde) -> None:
    result = tde("ap", files[0], "nothing.json")
    assert (result.exit_code, result.output) == (2, "error: no such file: nothing.json\n")


def test_what_no_class_has_is_not_printed_as_a_number(files: tuple[Path, Path], tde: Tde) -> None:
    content = json.loads(files[0].read_text())
    content["annotations"] = [item for item in content["annotations"] if CATEGORIES[item["category_id"]] != "r"]
    files[0].write_text(json.dumps(content))
    assert tde("ap", *files).output.split().count("n/a") == 1
