"""Images with boxes and masks, and how often an epoch shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tde_trainer.detection.annotations import Annotations, read_annotations
from tde_trainer.detection.images import DetectionImages, RepeatFactorSampler, collate, repeat_factors
from tde_trainer.detection.masks import encode
from tde_trainer.errors import UserError
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import to_pil_image

SIZES = {11: (20, 30), 5: (16, 12), 8: (10, 10), 2: (24, 18)}  # height and width, by id
SEEDS = range(40)


def polygon(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, left, bottom, right, bottom, right, top]]


def annotation(number: int, image: int, category: int, box: tuple[int, int, int, int], **changes: Any) -> Any:
    """A rectangle, ``box`` being left, top, right and bottom."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    place = {"bbox": [left, top, width, height], "area": width * height, "segmentation": polygon(*box)}
    return {"id": number, "image_id": image, "category_id": category, **place, **changes}


def ring() -> Tensor:
    """A mask ``[20, 30]`` with a hole."""
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[3:15, 16:28] = 1
    mask[7:11, 20:24] = 0
    return mask


def pixels(height: int, width: int) -> Tensor:
    """Every pixel says its row and its column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows * 0 + 7]).to(torch.uint8)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """Four images, one of them without objects, and three classes."""
    lists: dict[str, Any] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    images = []
    for number, (height, width) in SIZES.items():
        to_pil_image(pixels(height, width)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "height": height, "width": width, "file_name": f"{number}.png", **lists})
    nothing = {"bbox": [4.0, 4.0, 0.0, 5.0], "area": 0.0}
    return {
        "categories": [{"id": key, "name": f"class {key}", "frequency": "c"} for key in (3, 40, 7)],
        "images": images,
        "annotations": [
            annotation(1, 11, 40, (2, 5, 12, 17)),
            annotation(2, 11, 3, (16, 3, 28, 15), segmentation=encode(ring()), area=128.0),
            annotation(3, 5, 3, (1, 2, 7, 10)),
            annotation(4, 5, 7, (1, 2, 7, 10), area=0.0),
            annotation(5, 5, 7, (1, 2, 7, 10), **nothing),
            annotation(6, 5, 7, (1, 2, 7, 10), bbox=[11.0, 2.0, 1e-7, 8.0]),  # in float32 its sides are one
            annotation(7, 2, 3, (0, 0, 18, 24)),
        ],
    }


def read(content: dict[str, Any], root: Path) -> Annotations:
    (root / "set.json").write_text(json.dumps(content))
    return read_annotations(root / "set.json")


@pytest.fixture
def annotations(content: dict[str, Any], tmp_path: Path) -> Annotations:
    return read(content, tmp_path)


def images(annotations: Annotations, *, training: bool = False, seed: int = 0) -> DetectionImages:
    found = DetectionImages(annotations, annotations.path.parent, training=training)
    found.seed = seed
    return found


class TestItems:
    """What a detector is given."""

    def test_they_are_what_the_file_says(self, annotations: Annotations) -> None:
        image, target = images(annotations)[0]
        assert torch.equal(image, pixels(20, 30))
        assert target["boxes"].tolist() == [[2, 5, 12, 17], [16, 3, 28, 15]] and target["labels"].tolist() == [3, 1]
        assert {name: value.dtype for name, value in target.items()} == {
            "boxes": torch.float32,
            "labels": torch.int64,
            "masks": torch.uint8,
        }
        square = torch.zeros(20, 30, dtype=torch.uint8)
        square[5:17, 2:12] = 1
        assert torch.equal(target["masks"], torch.stack([square, ring()]))

    def test_they_keep_the_order_of_the_file(self, annotations: Annotations) -> None:
        found = images(annotations)
        assert [tuple(found[index][0].shape[1:]) for index in range(len(found))] == list(SIZES.values())

    def test_objects_without_extent_are_left_out(self, annotations: Annotations) -> None:
        target = images(annotations)[1][1]
        assert target["boxes"].tolist() == [[1, 2, 7, 10]] and target["labels"].tolist() == [1]
        assert target["masks"].shape == (1, 16, 12)
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()

    def test_an_image_may_be_empty(self, annotations: Annotations) -> None:
        for training in (False, True):
            for seed in SEEDS:
                target = images(annotations, training=training, seed=seed)[2][1]
                shapes = {name: tuple(value.shape) for name, value in target.items()}
                assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, 10, 10)}

    def test_grey_images_have_three_channels(self, annotations: Annotations, tmp_path: Path) -> None:
        to_pil_image(torch.full((1, 20, 30), 9, dtype=torch.uint8)).save(tmp_path / "11.png")
        assert torch.equal(images(annotations)[0][0], torch.full((3, 20, 30), 9, dtype=torch.uint8))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_batches_are_lists(self, workers: int, annotations: Annotations) -> None:
        loader = DataLoader(images(annotations), 3, collate_fn=collate, num_workers=workers)
        (first, targets), (last, _) = list(loader)
        assert [tuple(image.shape[1:]) for image in [*first, *last]] == list(SIZES.values())
        assert [len(target["boxes"]) for target in targets] == [2, 1, 0]


class TestMirroring:
    """Of training images."""

    def test_image_boxes_and_masks_are_mirrored_together(self, annotations: Annotations) -> None:
        plain, target = images(annotations)[0]
        mirrored = 0
        for seed in SEEDS:
            image, other = images(annotations, training=True, seed=seed)[0]
            torch.testing.assert_close(masks_to_boxes(other["masks"]) + torch.tensor([0, 0, 1, 1]), other["boxes"])
            assert torch.equal(other["labels"], target["labels"])
            if torch.equal(image, plain):
                assert all(torch.equal(other[name], target[name]) for name in target)
            else:
                mirrored += 1
                assert torch.equal(image, plain.flip(-1)) and torch.equal(other["masks"], target["masks"].flip(-1))
                assert other["boxes"].tolist() == [[18, 5, 28, 17], [2, 3, 14, 15]]
        assert 10 <= mirrored <= 30  # of 40: more than three standard deviations either way

    def test_it_follows_from_seed_and_index_alone(self, annotations: Annotations) -> None:
        def row(seed: int, order: list[int]) -> list[bool]:
            found = images(annotations, training=True, seed=seed)
            shown = {index: bool(found[index][0][1, 0, 0] > 0) for index in order}
            return [shown[index] for index in range(len(SIZES))]

        state = torch.get_rng_state()
        rows = {seed: row(seed, [0, 1, 2, 3]) for seed in SEEDS}
        assert torch.equal(torch.get_rng_state(), state)
        assert all(row(seed, [3, 1, 2, 0]) == rows[seed] for seed in SEEDS)
        assert all(len(set(of_image)) == 2 for of_image in zip(*rows.values(), strict=True))
        assert any(len(set(of_seed)) == 2 for of_seed in rows.values())

    def test_evaluated_images_are_not(self, annotations: Annotations) -> None:
        for seed in SEEDS:
            assert torch.equal(images(annotations, seed=seed)[0][0], pixels(20, 30))


class TestUnreadable:
    """What is said of files that do not fit."""

    @pytest.mark.parametrize("damage", ["missing", "text", "empty", "truncated"])
    def test_images(self, damage: str, annotations: Annotations, tmp_path: Path) -> None:
        file = tmp_path / "5.png"
        content = {"text": b"no image", "empty": b"", "truncated": file.read_bytes()[:50]}
        file.unlink()
        if damage in content:
            file.write_bytes(content[damage])
        with pytest.raises(UserError, match=f"^cannot read image {file}: .") as error:
            images(annotations)[1]
        assert "\n" not in str(error.value)

    def test_images_of_another_size(self, annotations: Annotations, tmp_path: Path) -> None:
        to_pil_image(pixels(12, 16)).save(tmp_path / "5.png")
        with pytest.raises(UserError) as error:
            images(annotations)[1]
        file, listed = tmp_path / "5.png", tmp_path / "set.json"
        assert str(error.value) == f"{file} is 16 x 12; its annotations, in {listed}, are of 12 x 16"

    @pytest.mark.parametrize("workers", [0, 1])
    def test_masks(self, workers: int, content: dict[str, Any], tmp_path: Path) -> None:
        content["annotations"][2]["segmentation"] = {"size": [16, 12], "counts": [5, 3]}
        loader = DataLoader(images(read(content, tmp_path)), collate_fn=collate, num_workers=workers)
        with pytest.raises(UserError) as error:
            list(loader)
        said = str(error.value)
        assert said.startswith(f"{tmp_path}/set.json: annotation 3: no mask: ") and "\n" not in said


def looped_factors(annotations: Annotations, threshold: float) -> list[float]:
    """The definition, category by category."""
    factors = []
    for image in annotations.images:
        best = 1.0
        for item in annotations.by_image[image.id]:
            showing = sum(
                any(other.category_id == item.category_id for other in annotations.by_image[one.id])
                for one in annotations.images
            )
            best = max(best, (threshold / (showing / len(annotations.images))) ** 0.5)
        factors.append(best)
    return factors


class TestRepeating:
    """Repeat-factor sampling."""

    @pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.5, 1.0])
    def test_factors_are_their_definition(self, threshold: float, annotations: Annotations) -> None:
        factors = repeat_factors(annotations, threshold)
        assert factors.dtype == torch.float64
        assert factors.tolist() == pytest.approx(looped_factors(annotations, threshold))
        if threshold == 1.0:  # class 3 is in three of four images, 40 and 7 in one
            assert factors.tolist() == pytest.approx([2, 2, 1, (4 / 3) ** 0.5])

    def test_a_class_without_images_matters_to_none(self, content: dict[str, Any], tmp_path: Path) -> None:
        content["categories"].append({"id": 99, "name": "unseen", "frequency": "r"})
        assert repeat_factors(read(content, tmp_path), 0.5).isfinite().all()

    def test_all_epochs_are_of_one_length_and_images_come_as_often_as_they_should(self) -> None:
        factors = torch.cat([torch.ones(50), torch.linspace(1, 4, 51), torch.tensor([7.25])]).double()
        sampler, counts, epochs = RepeatFactorSampler(factors, 3), torch.zeros(102), 400
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            drawn = list(sampler)
            assert len(drawn) == len(sampler) == round(factors.sum().item())
            counts += torch.bincount(torch.tensor(drawn), minlength=102)
        # What is over a whole number comes or does not: its share has a standard deviation of at most 1 / 2 sqrt(400)
        assert (counts / epochs - factors).abs().max() < 5 * 0.5 / epochs**0.5
        assert (counts[:50] == epochs).all()

    def test_an_image_comes_as_often_as_the_whole_numbers_about_its_factor(self) -> None:
        factors = torch.linspace(1, 3.5, 30).double()
        sampler = RepeatFactorSampler(factors, 0)
        for epoch in range(20):
            sampler.set_epoch(epoch)
            counts = torch.bincount(torch.tensor(list(sampler)), minlength=30)
            assert ((counts >= factors.floor()) & (counts <= factors.floor() + 1)).all()

    def test_the_order_follows_from_seed_and_epoch_alone(self) -> None:
        def drawn(seed: int, epoch: int) -> list[int]:
            sampler = RepeatFactorSampler(torch.linspace(1, 2, 40).double(), seed)
            sampler.set_epoch(epoch)
            torch.rand(seed + epoch + 1)  # what else is drawn, such as on another rank, changes nothing
            return list(sampler)

        assert drawn(0, 1) == drawn(0, 1)
        assert len({tuple(drawn(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9

    def test_without_repetition_an_epoch_is_every_image_once(self) -> None:
        sampler = RepeatFactorSampler(torch.ones(33).double(), 0)
        assert sorted(sampler) == list(range(33)) and list(sampler) != list(range(33))
