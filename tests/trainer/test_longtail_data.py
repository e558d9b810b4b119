"""CIFAR-LT and long-tailed image folders: what is kept, how it is split, and what is said about bad files."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from tde_trainer.data import DATASETS, ImageDataset, LongTailedData
from tde_trainer.data.longtail import long_tailed_counts, long_tailed_selection, shot_masks
from tde_trainer.errors import UserError
from tde_trainer.schema import DataConfig
from torch.nn.functional import interpolate
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.v2.functional import to_pil_image
from trainer_tools import cifar_files, cifar_labels, image_tree, marks, published_selection

TRAIN, TEST = 20, 6  # images of every class in the files made here
COUNTS = [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]  # what ratio 10 leaves of 10 classes of 20
VALUES = DataConfig(ratio=10, n_max=TRAIN, image_size=8, val_per_class=2)


def load(config: DataConfig, seed: int = 0) -> LongTailedData:
    return DATASETS[config.name](config, seed)


def told(split: ImageDataset) -> list[tuple[int, int]]:
    """The `marks` of a split, whose classes must be its labels."""
    found = marks(split.images)
    assert [label for label, _ in found] == split.labels.tolist()
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes to cut a long tail from."""
    return image_tree(tmp_path_factory.mktemp("tree"), {"train": [TRAIN] * 10, "test": [TEST] * 10})


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    """The tree, to be damaged."""
    return shutil.copytree(tree, tmp_path / "copy")


@pytest.fixture
def folder(tree: Path) -> DataConfig:
    return replace(VALUES, name="cifar10_lt", root=str(tree), format="folder")


@pytest.fixture(params=["folder", "torchvision"])
def cifar10(request: pytest.FixtureRequest, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """CIFAR-10-LT in both formats."""
    root = tree
    if request.param == "torchvision":
        labels = cifar_labels(10, TRAIN), cifar_labels(10, TEST)
        root = cifar_files(tmp_path / "files", CIFAR10, *labels, monkeypatch)
    return replace(VALUES, name="cifar10_lt", root=str(root), format=request.param)


class TestCounts:
    """The formula, and what is kept by it."""

    @pytest.mark.parametrize(
        ("num_classes", "n_max", "ratio", "total"),
        [
            (100, 500, 100, 10847),
            (100, 500, 50, 12608),
            (100, 500, 10, 19573),
            (10, 5000, 100, 12406),
            (10, 5000, 50, 13996),
            (10, 5000, 10, 20431),
        ],
    )
    def test_totals_are_the_published_ones(self, num_classes: int, n_max: int, ratio: float, total: int) -> None:
        counts = long_tailed_counts(n_max, num_classes, ratio)
        assert sum(counts) == total
        assert (counts[0], counts[-1]) == (n_max, n_max // ratio) and counts == sorted(counts, reverse=True)

    @pytest.mark.parametrize(("ratio", "shots"), [(100, [35, 35, 30]), (50, [41, 41, 18]), (10, [69, 31, 0])])
    def test_shots_of_cifar100_are_the_published_ones(self, ratio: float, shots: list[int]) -> None:
        masks = shot_masks(torch.tensor(long_tailed_counts(500, 100, ratio)))
        assert [int(masks[name].sum()) for name in ("many", "medium", "few")] == shots

    def test_seed_0_keeps_what_numpys_legacy_shuffle_puts_first(self) -> None:
        labels = cifar_labels(10, 200)
        counts = long_tailed_counts(200, 10, 50)
        assert long_tailed_selection(labels, counts, 0).tolist() == published_selection(labels, counts)

    def test_the_first_shuffle_of_seed_0_is_the_one_that_numpy_always_made(self) -> None:
        assert long_tailed_selection(torch.zeros(10).long(), [10], 0).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]

    def test_another_seed_keeps_others_but_as_many(self) -> None:
        labels, counts = cifar_labels(10, 200), long_tailed_counts(200, 10, 50)
        first, again, other = (long_tailed_selection(labels, counts, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again) and set(first.tolist()) != set(other.tolist())
        assert labels[other].bincount().tolist() == counts and len(set(other.tolist())) == sum(counts)


class TestCifar:
    """Both data sets, both formats."""

    def test_the_training_images_are_the_published_ones(self, cifar10: DataConfig) -> None:
        data = load(cifar10)
        mixed = cifar10.format == "torchvision"
        labels = cifar_labels(10, TRAIN) if mixed else torch.arange(10).repeat_interleave(TRAIN)
        assert data.class_counts.tolist() == COUNTS
        assert [place for _, place in told(data.train)] == published_selection(labels, COUNTS)
        assert data.class_names == tuple(f"class{label:02}" for label in range(10))
        assert data.train.images.shape[1:] == (3, 8, 8) and data.train.images.dtype == torch.uint8

    def test_the_subset_seed_chooses_the_images_and_the_seed_chooses_nothing(self, cifar10: DataConfig) -> None:
        first, other_seed = load(cifar10, 0), load(cifar10, 7)
        other_subset = load(replace(cifar10, subset_seed=1))
        assert told(first.train) == told(other_seed.train)
        assert set(told(first.train)) != set(told(other_subset.train))
        assert other_subset.class_counts.tolist() == COUNTS
        for again in (other_seed, other_subset):
            assert told(first.val) == told(again.val) and told(first.test) == told(again.test)

    def test_validation_and_test_share_out_the_test_images_evenly(self, cifar10: DataConfig) -> None:
        data = load(cifar10)
        val, test = told(data.val), told(data.test)
        assert data.val.labels.bincount().tolist() == [2] * 10
        assert data.test.labels.bincount().tolist() == [TEST - 2] * 10
        assert len({*val, *test}) == 10 * TEST
        assert sorted(place for _, place in val + test) == list(range(10 * TEST))

    def test_validation_images_are_drawn_not_the_first(self, folder: DataConfig) -> None:
        assert {place % TEST for _, place in told(load(folder).val)} - {0, 1}

    def test_cifar100_has_fine_labels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train, test = cifar_labels(100, 5), cifar_labels(100, 3)
        root = cifar_files(tmp_path, CIFAR100, train, test, monkeypatch)
        data = load(replace(VALUES, name="cifar100_lt", root=str(root), n_max=5, ratio=5, image_size=32))
        counts = long_tailed_counts(5, 100, 5)
        assert data.class_counts.tolist() == counts and data.num_classes == 100
        assert [place for _, place in told(data.train)] == published_selection(train, counts)
        assert data.val.labels.bincount().tolist() == [2] * 100 and len(data.test) == 100

    def test_a_split_named_val_serves_as_test_images(self, folder: DataConfig, copy: Path) -> None:
        expected = load(folder)
        (copy / "test").rename(copy / "val")
        data = load(replace(folder, root=str(copy)))
        assert told(data.test) == told(expected.test) and told(data.val) == told(expected.val)

    @pytest.mark.parametrize(("size", "padding"), [(8, 1), (32, 4), (64, 8)])
    def test_crops_move_by_an_eighth_of_the_image(self, folder: DataConfig, size: int, padding: int) -> None:
        pipeline = load(replace(folder, image_size=size)).pipeline
        assert (pipeline.padding, pipeline.flip) == (padding, True)
        assert (*pipeline.mean, *pipeline.std) == (0.4914, 0.4822, 0.4465, 0.2023, 0.1994, 0.2010)


class TestResampling:
    """Images of another size."""

    @pytest.mark.parametrize("size", [(12, 20), (5, 6)])
    def test_files_of_any_size_become_what_was_asked_for(self, size: tuple[int, int], tmp_path: Path) -> None:
        image_tree(tmp_path, {"train": [2, 1], "test": [2, 2]}, size)
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        to_pil_image(image).save(tmp_path / "train/class01/0002.png")
        config = DataConfig("folder_lt", str(tmp_path), image_size=8, val_per_class=1)
        wanted = interpolate(image[None].float(), (8, 8), mode="bilinear", antialias=True)
        assert (load(config).train.images[2:] - wanted).abs().max() <= 1

    def test_published_files_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        labels = cifar_labels(10, TRAIN), cifar_labels(10, TEST)
        root = cifar_files(tmp_path, CIFAR10, *labels, monkeypatch)
        data = load(replace(VALUES, name="cifar10_lt", root=str(root), image_size=16))
        assert all(split.images.shape[1:] == (3, 16, 16) for split in (data.train, data.val, data.test))
        assert len(told(data.train)) == sum(COUNTS)  # of one colour before and after

    def test_what_has_the_size_is_left_alone(self, tmp_path: Path) -> None:
        image_tree(tmp_path, {"train": [1, 1], "test": [2, 2]})
        image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
        to_pil_image(image).save(tmp_path / "train/class01/0001.png")
        data = load(DataConfig("folder_lt", str(tmp_path), image_size=8, val_per_class=1))
        assert torch.equal(data.train.images[1], image)


class TestFolder:
    """Trees that are long-tailed already."""

    def test_all_training_images_are_kept_in_order(self, tmp_path: Path) -> None:
        config = DataConfig("folder_lt", str(tmp_path), image_size=8, val_per_class=2)
        image_tree(tmp_path, {"train": [9, 4, 1], "val": [5, 5, 5]})
        data, again = load(config, 0), load(config, 1)
        assert data.class_counts.tolist() == [9, 4, 1]
        assert [place for _, place in told(data.train)] == list(range(14))
        assert data.val.labels.bincount().tolist() == [2] * 3 and data.test.labels.bincount().tolist() == [3] * 3
        assert not set(told(data.val)) & set(told(data.test))
        assert told(data.val) == told(again.val)

    def test_jpeg_and_grey_images_are_read_as_colours(self, tmp_path: Path) -> None:
        config = DataConfig("folder_lt", str(tmp_path), image_size=8, val_per_class=1)
        image_tree(tmp_path, {"train": [2, 2], "test": [2, 2]}, suffix="jpg")
        grey = torch.full((1, 8, 8), 200, dtype=torch.uint8)
        to_pil_image(grey).save(tmp_path / "train/class00/0000.jpg")
        to_pil_image(grey).save(tmp_path / "train/class00/0001.png")
        images = load(config).train.images.int()
        assert images.shape == (5, 3, 8, 8) and (images[:3:2] - 200).abs().max() <= 2
        assert (images[3:, 0] - 1).abs().max() <= 3  # class 1, as far as a JPEG keeps it

    def test_other_classes_to_test_than_to_train_are_named(self, tmp_path: Path) -> None:
        image_tree(tmp_path, {"train": [3, 3, 3], "test": [3, 3]})
        (tmp_path / "test/class01").rename(tmp_path / "test/dog")
        with pytest.raises(UserError, match=r"train and test hold other classes: class01, class02, dog"):
            load(DataConfig("folder_lt", str(tmp_path), image_size=8, val_per_class=1))

    def test_so_they_are_where_the_tail_is_cut(self, folder: DataConfig, copy: Path) -> None:
        (copy / "test/class03").rename(copy / "test/dog")
        with pytest.raises(UserError, match=r"train and test hold other classes: class03, dog"):
            load(replace(folder, root=str(copy)))

    def test_a_class_without_images_is_named(self, copy: Path, folder: DataConfig) -> None:
        shutil.rmtree(copy / "train/class04")
        (copy / "train/class04").mkdir()
        with pytest.raises(UserError, match="class04"):
            load(replace(folder, root=str(copy)))

    def test_a_split_without_classes_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "train").mkdir()
        with pytest.raises(UserError, match=r"data.root=.*Couldn't find any class folder"):
            load(DataConfig("folder_lt", str(tmp_path)))


class TestBadInput:
    """What is said, in one line, about data that are not what they should be."""

    @pytest.mark.parametrize(
        ("name", "form", "wanted"),
        [
            ("cifar10_lt", "torchvision", ["ROOT/cifar-10-batches-py", "data.download=true", "data.format=folder"]),
            ("cifar100_lt", "torchvision", ["ROOT/cifar-100-python", "data.download=true", "ROOT/train/CLASS/IMAGE"]),
            ("cifar10_lt", "folder", ["ROOT/train", "ROOT/train/CLASS/IMAGE", "ImageFolder"]),
            ("folder_lt", "folder", ["ROOT/train", "ROOT/train/CLASS/IMAGE", "ImageFolder"]),
        ],
    )
    def test_a_missing_root_says_where_it_looked_and_what_it_wants(
        self, name: str, form: str, wanted: list[str], tmp_path: Path
    ) -> None:
        root = str(tmp_path / "nothing")
        with pytest.raises(UserError) as error:
            load(DataConfig(name, root, form))
        said = str(error.value).replace(root, "ROOT")
        assert said.startswith("data.root=ROOT") and "\n" not in said
        assert [part for part in wanted if part not in said] == []
        assert not (tmp_path / "nothing").exists()

    def test_a_missing_test_split_names_both_of_its_folders(self, folder: DataConfig, copy: Path) -> None:
        shutil.rmtree(copy / "test")
        with pytest.raises(UserError) as error:
            load(replace(folder, root=str(copy)))
        assert f"there is no folder {copy}/test or {copy}/val" in str(error.value)

    def test_a_damaged_file_of_torchvisions_is_no_intact_copy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        labels = cifar_labels(10, TRAIN), cifar_labels(10, TEST)
        with monkeypatch.context() as patch:
            root = cifar_files(tmp_path, CIFAR10, *labels, patch)
        with pytest.raises(UserError, match="no intact copy of CIFAR10 in"):  # the check sums are back
            load(replace(VALUES, name="cifar10_lt", root=str(root)))

    def test_a_download_that_fails_says_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*arguments: object, **options: object) -> None:
            raise URLError("no route to host")

        monkeypatch.setattr("tde_trainer.fetch.download_url_to_file", offline)
        with pytest.raises(UserError, match=rf"cannot fetch {CIFAR10.url} to {tmp_path}: .*no route to host"):
            load(replace(VALUES, name="cifar10_lt", root=str(tmp_path), download=True))

    def test_a_wrong_number_of_classes(self, folder: DataConfig) -> None:
        with pytest.raises(UserError, match=r"holds 10 classes, wanted 100: class00, class01, class02"):
            load(replace(folder, name="cifar100_lt"))

    def test_counts_that_are_not_n_max_name_the_class_and_its_count(self, folder: DataConfig, copy: Path) -> None:
        next((copy / "train/class06").iterdir()).unlink()
        with pytest.raises(UserError, match=r"1 classes have not the 20 training images .*; class06 has 19"):
            load(replace(folder, root=str(copy)))

    def test_files_that_were_not_made_for_n_max(self, cifar10: DataConfig) -> None:
        with pytest.raises(UserError, match=r"10 classes have not the 5000 training images .*; class00 has 20"):
            load(replace(cifar10, n_max=5000))

    def test_a_tail_that_ends_in_nothing(self, folder: DataConfig) -> None:
        with pytest.raises(UserError, match=r"data.n_max=20 and data.ratio=50 leave class counts .* 0\]"):
            load(replace(folder, ratio=50))

    @pytest.mark.parametrize("per_class", [TEST, TEST + 1])
    def test_validation_that_leaves_no_test_images(self, cifar10: DataConfig, per_class: int) -> None:
        with pytest.raises(UserError, match=f"data.val_per_class={per_class} leaves none of a class of 6 test images"):
            load(replace(cifar10, val_per_class=per_class))

    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "broken"])
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_corrupt_image_is_named(self, folder: DataConfig, copy: Path, split: str, damage: str) -> None:
        file = self.damaged(copy, split, damage)
        with pytest.raises(UserError) as error:
            load(replace(folder, root=str(copy)))
        assert str(error.value).startswith(f"cannot read {file}: ") and "\n" not in str(error.value)
        assert str(error.value).endswith("data.skip_corrupt=true leaves it out")

    @pytest.mark.parametrize("damage", ["truncated", "broken"])
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_it_is_left_out_with_a_warning_where_that_was_asked_for(
        self, folder: DataConfig, copy: Path, split: str, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        file, whole = self.damaged(copy, split, damage), load(folder)
        with caplog.at_level(logging.WARNING):
            data = load(replace(folder, root=str(copy), skip_corrupt=True))
        assert [record.getMessage().startswith(f"left out {file}: ") for record in caplog.records] == [True]
        for name in ("train", "val", "test"):
            left_out = {(0, int(file.stem))} if (name == "train") == (split == "train") else set()
            wanted = [mark for mark in told(getattr(whole, name)) if mark not in left_out]
            assert told(getattr(data, name)) == wanted
        assert sum(map(len, (data.train, data.val, data.test))) == sum(COUNTS) + 10 * TEST - 1

    def test_whole_images_warn_of_nothing(self, folder: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
        load(replace(folder, skip_corrupt=True))
        assert not caplog.records

    @staticmethod
    def damaged(root: Path, split: str, damage: str) -> Path:
        """An image of the head class, all of which are read."""
        file = root / split / "class00" / "0004.png"
        whole = file.read_bytes()
        data = whole.index(b"IDAT")
        damaged = {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"not an image",
            "broken": whole[: data - 1] + b"\x04" + whole[data:],  # a chunk of four bytes, and no other where it ends
        }
        file.write_bytes(damaged[damage])
        return file


def test_an_image_that_is_too_large_to_decode_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_tree(tmp_path, {"train": [3, 1], "test": [4, 4]})
    Image.new("RGB", (64, 64)).save(root / "train/class00/0000.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 4)
    config = DataConfig(name="folder_lt", root=str(root), val_per_class=1, image_size=8, skip_corrupt=True)
    assert DATASETS["folder_lt"](config, 0).class_counts.tolist() == [2, 1]
    assert "decompression bomb" in caplog.text


def test_a_class_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    root = image_tree(tmp_path, {"train": [3, 1], "test": [4, 4]})
    (root / "train/class01/0003.png").write_bytes(b"no image")
    config = DataConfig(name="folder_lt", root=str(root), val_per_class=1, image_size=8, skip_corrupt=True)
    with pytest.raises(UserError, match="every class needs at least one training image; class01 has none"):
        DATASETS["folder_lt"](config, 0)
