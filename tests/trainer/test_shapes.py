"""The made LVIS set: what its files say, how its classes are spread, and that its masks are what is drawn."""

from __future__ import annotations

import colorsys
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from tde_trainer.detection import shapes
from tde_trainer.detection.annotations import frequency_groups, read_annotations, trainable
from tde_trainer.detection.masks import masks
from tde_trainer.detection.shapes import Version, write_shapes
from tde_trainer.detection.shapes_counts import deal, deal_splits, long_tailed_counts
from tde_trainer.detection.shapes_drawing import HUE_JITTER, HUES, KINDS, box, coverage, draw_scene
from tde_trainer.errors import UserError

SPLITS = ("train", "val", "test")
SMALL: dict[str, Any] = {"train_images": 40, "val_images": 10, "test_images": 20, "size": 64}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes")
    write_shapes(directory, **SMALL)
    return directory


def read(directory: Path, split: str) -> Any:
    return json.loads((directory / f"{split}.json").read_text())


def held(content: Any) -> dict[int, list[int]]:
    """The categories of every image, one for each instance."""
    by_image: dict[int, list[int]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation["category_id"])
    return by_image


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


class TestCounts:
    """Long-tailed in training, balanced in the other splits."""

    @pytest.mark.parametrize("seed", range(5))
    def test_a_third_of_the_classes_is_of_each_frequency(self, seed: int) -> None:
        dealt = deal_splits(seed, {"train": 600}, len(KINDS))["train"]
        images = [sum(label in image for image in dealt) for label in range(len(KINDS))]
        rare, common = sum(1 <= n <= 10 for n in images), sum(11 <= n <= 100 for n in images)
        frequent = sum(n > 100 for n in images)
        assert (rare, common, frequent) == (10, 10, 10)

    def test_the_tail_falls(self) -> None:
        for images in (10, 100, 600, 5000):
            counts = long_tailed_counts(images, 30)
            assert (np.diff(counts) <= 0).all() and counts.min() >= 1 and counts.sum() <= 5 * images
        assert long_tailed_counts(5000, 30)[0] == pytest.approx(5000 / 3, abs=1)

    def test_the_seed_says_which_classes_are_rare(self) -> None:
        def rarest(seed: int) -> set[int]:
            counts = Counter(label for image in deal_splits(seed, {"train": 600}, 30)["train"] for label in image)
            return {label for label, _ in counts.most_common()[-10:]}

        assert rarest(0) == rarest(0) != rarest(1)

    @pytest.mark.parametrize("instances", [20, 60, 150, 200])
    def test_every_label_is_dealt(self, instances: int) -> None:
        labels = np.arange(instances)
        dealt = deal(labels, 40, np.random.default_rng(0))
        assert sorted(label for image in dealt for label in image) == labels.tolist()
        sizes = [len(image) for image in dealt]
        assert max(sizes) <= 5 and (min(sizes) >= 1 or instances < 40)

    def test_validation_and_test_are_balanced(self) -> None:
        dealt = deal_splits(0, {"train": 600, "val": 200, "test": 300}, len(KINDS))
        for split, each in (("val", 20), ("test", 30)):
            counts = Counter(label for image in dealt[split] for label in image)
            assert counts == dict.fromkeys(range(len(KINDS)), each)


class TestDrawing:
    """Where the shapes are in the image."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_shape_has_its_colour_inside_its_outline_and_not_around(self, kind: str) -> None:
        inside, around = [], []
        for seed in range(6):
            scene = draw_scene([kind], 96, np.random.default_rng(seed))
            cover = coverage(scene.outlines[0], 96)
            left, upper, right, lower = box(scene.outlines[0]).astype(int)
            near = np.zeros((96, 96), dtype=bool)
            near[upper : lower + 1, left : right + 1] = True
            hues = np.array([[colorsys.rgb_to_hsv(*pixel)[0] for pixel in row] for row in scene.image / 255])
            of_kind = np.abs((hues - HUES[kind.split("_")[0]] + 0.5) % 1 - 0.5) < HUE_JITTER + 0.028
            inside.append(of_kind[cover == 1].mean())
            around.append(of_kind[near & (cover == 0)].mean() if (near & (cover == 0)).any() else 0.0)
        assert min(inside) > 0.97 and np.mean(around) < 0.4

    def test_shapes_are_inside_the_image_and_apart(self) -> None:
        for seed in range(30):
            kinds = np.random.default_rng(seed).choice(KINDS, 5).tolist()
            boxes = [box(outline) for outline in draw_scene(kinds, 64, np.random.default_rng(seed)).outlines]
            assert len(boxes) == 5
            for index, (left, upper, right, lower) in enumerate(boxes):
                assert 0 <= left < right <= 64 and 0 <= upper < lower <= 64
                for other in boxes[:index]:
                    common = (min(right, other[2]) - max(left, other[0]), min(lower, other[3]) - max(upper, other[1]))
                    smaller = min((right - left) * (lower - upper), (other[2] - other[0]) * (other[3] - other[1]))
                    assert max(common[0], 0) * max(common[1], 0) <= 0.1 * smaller + 1e-9

    def test_a_ring_has_a_hole(self) -> None:
        ring = draw_scene(["red_ring"], 96, np.random.default_rng(1)).outlines[0]
        x, y = (ring[0].min(0) + ring[0].max(0)).astype(int) // 2
        cover = coverage(ring, 96)
        assert cover[y, x] == 0 and cover.max() == 1


class TestFiles:
    """LVIS's format."""

    @pytest.mark.parametrize("split", SPLITS)
    def test_entries_are_whole_and_refer_to_each_other(self, split: str, written: Path) -> None:
        content = read(written, split)
        categories = {category["id"] for category in content["categories"]}
        assert len(content["images"]) == SMALL[f"{split}_images"] and len(categories) == 30
        for image in content["images"]:
            file = written / "/".join(image["coco_url"].split("/")[-2:])
            assert Image.open(file).size == (image["width"], image["height"]) == (64, 64)
            assert "file_name" not in image
        by_image = held(content)
        assert set().union(*by_image.values()) <= categories
        numbers = [annotation["id"] for annotation in content["annotations"]]
        assert len(set(numbers)) == len(numbers) == sum(map(len, by_image.values()))

    def test_images_have_other_ids_in_every_split(self, written: Path) -> None:
        ids = [image["id"] for split in SPLITS for image in read(written, split)["images"]]
        assert len(set(ids)) == len(ids) == 70

    @pytest.mark.parametrize("split", SPLITS)
    def test_boxes_and_areas_are_those_of_the_masks(self, split: str, written: Path) -> None:
        codings = set()
        for annotation in read(written, split)["annotations"]:
            run_lengths = coco_mask.segmToRle(annotation["segmentation"], 64, 64)
            codings.add((type(annotation["segmentation"]), "ring" in KINDS[annotation["category_id"] - 1]))
            assert annotation["area"] == coco_mask.area(run_lengths) > 0
            x, y, width, height = annotation["bbox"]
            assert 0 <= x < x + width <= 64.01 and 0 <= y < y + height <= 64.01
            tight = coco_mask.toBbox(run_lengths)
            assert np.abs([x - tight[0], y - tight[1]]).max() < 1.5
            assert np.abs([x + width - tight[0] - tight[2], y + height - tight[1] - tight[3]]).max() < 1.5
        assert codings == {(list, False), (dict, True)}

    def test_masks_are_the_outlines(self) -> None:
        scene = draw_scene(["red_star", "orange_crescent", "yellow_ring"], 96, np.random.default_rng(0))
        labels = [KINDS.index(kind) for kind in ("red_star", "orange_crescent", "yellow_ring")]
        for annotation, outline in zip(shapes._annotations(scene, labels, 1), scene.outlines, strict=True):
            mask = coco_mask.decode(coco_mask.segmToRle(annotation["segmentation"], 96, 96)).reshape(96, 96)
            drawn = coverage(outline, 96) >= 0.5
            assert (mask & drawn).sum() / (mask | drawn).sum() > 0.9

    def test_counts_of_categories_are_those_of_training(self, written: Path) -> None:
        by_image = held(read(written, "train")).values()
        for split in SPLITS:
            for category in read(written, split)["categories"]:
                images = sum(category["id"] in image for image in by_image)
                assert category["image_count"] == images
                assert category["instance_count"] == sum(image.count(category["id"]) for image in by_image)
                assert category["frequency"] == ("r" if images <= 10 else "c")

    @pytest.mark.parametrize("split", SPLITS)
    def test_negatives_are_absent_and_all_of_them_are_named_but_in_training(self, split: str, written: Path) -> None:
        content = read(written, split)
        by_image = held(content)
        for image in content["images"]:
            absent = set(range(1, 31)) - set(by_image[image["id"]])
            named, partly = set(image["neg_category_ids"]), set(image["not_exhaustive_category_ids"])
            if split == "train":
                assert named < absent and len(named) == 3 and partly <= set(by_image[image["id"]])
            else:
                assert named == absent and not partly

    def test_a_few_training_images_are_not_exhaustive(self, written: Path) -> None:
        images = read(written, "train")["images"]
        assert 0 < sum(bool(image["not_exhaustive_category_ids"]) for image in images) < len(images) / 4

    @pytest.mark.parametrize("version", ["v0.5", "v1"])
    def test_the_reader_of_annotations_takes_them(self, version: Version, tmp_path: Path) -> None:
        write_shapes(tmp_path, **SMALL, version=version)
        train, test = (read_annotations(tmp_path / f"{split}.json") for split in ("train", "test"))
        counts = train.image_counts()
        assert [c.frequency for c in test.categories] == list(frequency_groups(counts))
        assert counts.tolist() == [c["image_count"] for c in read(tmp_path, "test")["categories"]]
        for image in test.images:
            assert (tmp_path / image.file_name).is_file()
            found = masks(test.by_image[image.id], image.height, image.width)
            assert found.flatten(1).sum(1).tolist() == [annotation.area for annotation in test.by_image[image.id]]
            assert all(map(trainable, test.by_image[image.id]))

    def test_the_older_flavour_names_files(self, written: Path, tmp_path: Path) -> None:
        write_shapes(tmp_path, **SMALL, version="v0.5")
        older, newer = read(tmp_path, "val"), read(written, "val")
        assert older["annotations"] == newer["annotations"]
        for image, other in zip(older["images"], newer["images"], strict=True):
            assert "coco_url" not in image and other["coco_url"].endswith(f"/{image['file_name']}")
            assert (tmp_path / image["file_name"]).is_file()


class TestWriting:
    """Once, whole, and never over another set."""

    def test_the_same_settings_give_the_same_bytes(self, written: Path, tmp_path: Path) -> None:
        write_shapes(tmp_path / "same", **SMALL)
        write_shapes(tmp_path / "other", **SMALL, seed=1)
        same, other, first = contents(tmp_path / "same"), contents(tmp_path / "other"), contents(written)
        assert same == first and other.keys() == first.keys()
        assert not any(other[name] == first[name] for name in first)

    def test_what_is_there_is_not_drawn_again(self, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shapes, "draw_scene", None)
        write_shapes(written, **SMALL)

    def test_an_interrupted_set_is_written_again(
        self, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(path: Path, content: str) -> None:
            if path.name == "val.json":
                raise KeyboardInterrupt
            path.write_text(content)

        with monkeypatch.context() as patch:
            patch.setattr(shapes, "write_atomic", interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_shapes(tmp_path, **SMALL)
        write_shapes(tmp_path, **SMALL)
        assert contents(tmp_path) == contents(written)

    def test_another_set_is_left_alone(self, written: Path, tmp_path: Path) -> None:
        before = contents(written)
        with pytest.raises(UserError, match=rf"{written}/train.json has the settings .*'seed': 0.*; choose another"):
            write_shapes(written, **SMALL, seed=1)
        assert contents(written) == before
        (tmp_path / "test.json").write_text('{"info": {"year": 2020}}')
        with pytest.raises(UserError, match=f"{tmp_path}/test.json has the settings None"):
            write_shapes(tmp_path, **SMALL)

    @pytest.mark.parametrize(("name", "value"), [("train_images", 9), ("size", 31), ("version", "v2")])
    def test_bad_settings_are_refused(self, name: str, value: Any, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=f"10 images or more.* got .*{value}"):
            write_shapes(tmp_path / "set", **{**SMALL, name: value})
        assert not (tmp_path / "set").exists()

    def test_a_directory_that_is_a_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "set").write_text("")
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/set/train: Not a directory"):
            write_shapes(tmp_path / "set", **SMALL)
