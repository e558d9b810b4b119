"""LVIS's annotation files: what is read, what is refused, and masks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as official
import pytest
import torch
from tde_trainer.detection.annotations import (
    Annotation,
    Annotations,
    frequency_groups,
    read_annotations,
    trainable,
)
from tde_trainer.detection.masks import encode, masks
from tde_trainer.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

SQUARE = [[2.0, 1.0, 8.0, 1.0, 8.0, 7.0, 2.0, 7.0]]
HOLE = {"size": [10, 12], "counts": [13, 4, 6, 1, 2, 1, 6, 4, 83]}  # a ring, column by column


def image(number: int, **changes: Any) -> dict[str, Any]:
    name = f"{number:012}.jpg"
    lists: dict[str, list[int]] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return {"id": number, "width": 12, "height": 10, "file_name": name, **lists, **changes}


def annotation(number: int, image_id: int, category_id: int, **changes: Any) -> dict[str, Any]:
    place = {"bbox": [2.0, 1.0, 6.0, 6.0], "area": 36.0, "segmentation": SQUARE}
    return {"id": number, "image_id": image_id, "category_id": category_id, **place, **changes}


@pytest.fixture
def content() -> dict[str, Any]:
    """Three classes and four images, one of them empty."""
    frequencies = {70: "f", 3: "r", 12: "c"}
    return {
        "categories": [{"id": key, "name": f"class {key}", "frequency": group} for key, group in frequencies.items()],
        "images": [image(5, neg_category_ids=[3]), image(2, not_exhaustive_category_ids=[70]), image(9), image(7)],
        "annotations": [
            annotation(1, 5, 70),
            annotation(4, 5, 70, segmentation=HOLE),
            annotation(2, 2, 12),
            annotation(3, 9, 70, bbox=[1.0, 1.0, 0.0, 4.0]),
        ],
    }


def write(path: Path, content: Any) -> Path:
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def read(content: dict[str, Any], tmp_path: Path) -> Annotations:
    return read_annotations(write(tmp_path / "lvis.json", content))


class TestReading:
    """What a file says."""

    def test_labels_are_contiguous_in_the_order_of_the_ids(self, read: Annotations) -> None:
        assert read.labels == {3: 1, 12: 2, 70: 3}
        assert [read.categories[label - 1].id for label in read.labels.values()] == list(read.labels)
        assert [(category.name, category.frequency) for category in read.categories] == [
            ("class 3", "r"),
            ("class 12", "c"),
            ("class 70", "f"),
        ]

    def test_images_keep_their_order_and_the_empty_one(self, read: Annotations) -> None:
        assert [(item.id, item.width, item.height) for item in read.images] == [(key, 12, 10) for key in (5, 2, 9, 7)]
        assert read.images[0].negative == {3} and read.images[1].not_exhaustive == {70}
        assert {key: [item.id for item in marked] for key, marked in read.by_image.items()} == {
            5: [1, 4],
            2: [2],
            9: [3],
            7: [],
        }

    def test_images_are_counted_once_for_a_class(self, read: Annotations) -> None:
        assert read.image_counts().tolist() == [0, 1, 2]  # two objects of class 70 are in one image

    def test_objects_without_extent_are_not_for_training(self, read: Annotations) -> None:
        by_id = {item.id: item for marked in read.by_image.values() for item in marked}
        assert {key: trainable(item) for key, item in by_id.items()} == {1: True, 4: True, 2: True, 3: False}

    @pytest.mark.parametrize("changes", [{"bbox": [0, 0, 3, 0]}, {"area": 0}])
    def test_nor_are_those_without_area(self, changes: dict[str, Any], content: dict[str, Any], tmp_path: Path) -> None:
        content["annotations"] = [annotation(1, 5, 70, **changes)]
        assert not trainable(read_annotations(write(tmp_path / "lvis.json", content)).by_image[5][0])

    def test_gzipped_files_are_read(self, content: dict[str, Any], read: Annotations, tmp_path: Path) -> None:
        zipped = read_annotations(write(tmp_path / "lvis.json.gz", content))
        assert (zipped.categories, zipped.images, zipped.by_image) == (read.categories, read.images, read.by_image)

    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ({"file_name": "COCO_val2014_000000000042.jpg"}, "000000000042.jpg"),  # v0.5, of COCO's val2017
            ({"file_name": "some/folder/1.png"}, "some/folder/1.png"),
            ({"file_name": "some/1.png", "coco_url": "http://other/place/2.png"}, "some/1.png"),
            ({"file_name": "COCO_val2014_000000000042.jpg", "coco_url": "http://c/val2017/42.jpg"}, "val2017/42.jpg"),
            ({"coco_url": "http://images.cocodataset.org/train2017/000000000042.jpg"}, "train2017/000000000042.jpg"),
        ],
    )
    def test_both_versions_name_the_images(
        self, fields: dict[str, str], name: str, content: dict[str, Any], tmp_path: Path
    ) -> None:
        for key in ("file_name", "coco_url"):
            content["images"][0].pop(key, None)
        content["images"][0] |= fields
        assert read_annotations(write(tmp_path / "lvis.json", content)).images[0].file_name == name

    def test_groups_are_those_of_the_training_images(self) -> None:
        assert frequency_groups(torch.tensor([0, 1, 10, 11, 100, 101, 5000])) == ("r", "r", "r", "c", "c", "f", "f")


class TestRefusal:
    """What is no such file is named by its entry."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "no such file: FILE"),
            ("{", "cannot read FILE: Expecting"),
            ("[]", "FILE holds a list; wanted are LVIS annotations, a mapping"),
            ('{"categories": [], "annotations": []}', "FILE: no list images; wanted are LVIS annotations, the lists"),
            ('{"categories": {}, "images": []}', "FILE: no list categories"),
            ('{"categories": [3], "images": []}', r"FILE: categories\[0\] is 3; wanted is a mapping"),
        ],
    )
    def test_of_files(self, text: str | None, message: str, tmp_path: Path) -> None:
        path = tmp_path / "lvis.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match="^" + message.replace("FILE", str(path))):
            read_annotations(path)

    @pytest.mark.parametrize("name", ["lvis.json", "lvis.json.gz"])
    def test_of_damaged_files(self, name: str, content: dict[str, Any], tmp_path: Path) -> None:
        path = write(tmp_path / name, content)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match=f"^cannot read {path}: "):
            read_annotations(path)

    @pytest.mark.parametrize(
        ("key", "changes", "message"),
        [
            ("categories", {"frequency": "often"}, "frequency is 'often'; wanted is r, c or f"),
            ("categories", {"frequency": None}, "has no frequency; it has id, name"),
            ("categories", {"id": 70}, "id is 70; wanted is one that no other entry has"),
            ("categories", {"id": True}, "id is True; wanted is a whole number"),
            ("images", {"file_name": None}, "has no coco_url; it has id, "),
            ("images", {"file_name": "../a.jpg"}, "file_name is '../a.jpg'; wanted is relative to the root"),
            ("images", {"file_name": "/a.jpg"}, "file_name is '/a.jpg'; wanted is relative to the root"),
            ("images", {"width": 0}, "width is 0; wanted is a whole number from 1"),
            ("images", {"height": 4.5}, "height is 4.5; wanted is a whole number from 1"),
            ("images", {"id": 5}, "id is 5; wanted is one that no other entry has"),
            ("images", {"neg_category_ids": None}, "has no neg_category_ids"),
            ("images", {"not_exhaustive_category_ids": 3}, "not_exhaustive_category_ids is 3; wanted is a list of ids"),
            ("annotations", {"image_id": 99}, "image_id is 99; wanted is the id of one of the images"),
            ("annotations", {"category_id": 1}, "category_id is 1; wanted is the id of one of the categories"),
            ("annotations", {"category_id": None}, "has no category_id"),
            ("annotations", {"id": 1}, "id is 1; wanted is one that no other entry has"),
            ("annotations", {"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]; wanted is .*, four finite numbers"),
            ("annotations", {"bbox": [1, 2, 3, "4"]}, "bbox is .*, four finite numbers"),
            ("annotations", {"bbox": [1, 2, float("inf"), 4]}, "bbox is .*, four finite numbers"),
            ("annotations", {"bbox": [1, 2, float("nan"), 4]}, "bbox is .*, four finite numbers"),
            ("annotations", {"bbox": [1, 2, -3, 4]}, r"bbox is \[1, 2, -3, 4\]; wanted is .*, no side below 0"),
            ("annotations", {"area": float("nan")}, "area is nan; wanted is a finite number"),
            ("annotations", {"iscrowd": 1}, "iscrowd is 1; wanted is 0: LVIS has no such objects"),
            ("annotations", {"ignore": 1}, "ignore is 1; wanted is 0"),
            ("annotations", {"segmentation": []}, r"segmentation is \[\]; wanted is polygons"),
            ("annotations", {"segmentation": [[1, 2, 3, 4]]}, "segmentation is .* three points or more"),
            ("annotations", {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "segmentation is .* three points or more"),
            ("annotations", {"segmentation": "abc"}, "segmentation is 'abc'; wanted is a list of polygons, or"),
            ("annotations", {"segmentation": {"size": [12, 10], "counts": [120]}}, r"image's size, \[10, 12\]"),
            ("annotations", {"segmentation": None}, "has no segmentation"),
        ],
    )
    def test_of_entries(
        self, key: str, changes: dict[str, Any], message: str, content: dict[str, Any], tmp_path: Path
    ) -> None:
        entry = content[key][1] | changes
        content[key][1] = {field: value for field, value in entry.items() if value is not None}
        path = write(tmp_path / "lvis.json", content)
        with pytest.raises(UserError, match=rf"^{path}: {key}\[1\]:? .*{message}"):
            read_annotations(path)


class TestMasks:
    """Masks are those of COCO's own library."""

    @staticmethod
    def marked(segmentation: Any) -> Annotation:
        return Annotation(17, 1, 1, (0.0, 0.0, 1.0, 1.0), 1.0, segmentation)

    def test_all_three_forms_are_read(self) -> None:
        polygons = [[1.2, 1.1, 9.7, 1.3, 8.0, 9.5], [3, 3, 5, 3, 5, 8, 2, 8]]
        union = official.merge(official.frPyObjects(polygons, 10, 12))
        forms = [polygons, HOLE, union, {**union, "counts": union["counts"].decode()}]
        found = masks([self.marked(form) for form in forms], 10, 12)
        assert found.dtype == torch.uint8 and found.shape == (4, 10, 12) and found.is_contiguous()
        wanted = official.decode([union, official.frPyObjects(HOLE, 10, 12), union, union])
        assert torch.equal(found, torch.from_numpy(wanted).permute(2, 0, 1))
        assert found[1].nonzero().amin(0).tolist() == [3, 1] and found[1].sum() == 10

    def test_of_no_objects_there_are_none(self) -> None:
        assert masks([], 10, 12).shape == (0, 10, 12)

    @pytest.mark.parametrize(
        ("damaged", "message"),
        [
            ({"size": [10, 12], "counts": "a"}, "no mask: RLE string is malformed"),
            ({"size": [10, 12], "counts": "zzzzzzzzz"}, "no mask: RLE counts exceed"),
            ({"size": [10, 12], "counts": "34"}, "no mask: run lengths of 7 pixels, wanted are 10 x 12"),
            ({"size": [10, 12], "counts": [3, 4]}, "no mask: run lengths of 7 pixels"),
            ({"size": [10, 12], "counts": [-3, 123]}, "no mask: "),
            ({"size": [10, 12], "counts": 5}, "no mask: "),
            ([[1, 2, 3, 4, 5, float("nan")]], "no mask: polygons with coordinates that are not between"),
            ([[1, 2, 3, 4, 5, 1e30]], "no mask: polygons with coordinates that are not between"),
            ([[1, 2, 3, 4, 5, "6"]], "no mask: "),
        ],
    )
    def test_damaged_ones_are_refused(self, damaged: Any, message: str) -> None:
        with pytest.raises(ValueError, match=f"^annotation 17: {message}"):
            masks([self.marked(damaged)], 10, 12)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
    def test_encoding_gives_what_decoding_reads(self, dtype: torch.dtype) -> None:
        mask = (torch.rand(10, 12, generator=torch.Generator().manual_seed(0)) > 0.5).to(dtype)
        encoded = json.loads(json.dumps(encode(mask)))
        assert np.array_equal(official.decode(encoded), mask.numpy())
        assert encoded["counts"] == official.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"].decode()
        assert torch.equal(masks([self.marked(encoded)], 10, 12)[0], mask.to(torch.uint8))
