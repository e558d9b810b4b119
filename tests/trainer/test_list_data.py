"""Data sets of list files: what a list may say, which pixels a batch has, and what is said about bad files."""

from __future__ import annotations

import gzip
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from tde_trainer import checkpoint
from tde_trainer.data import DATASETS, Images, LongTailedData, make_loader
from tde_trainer.data.base import UNREADABLE
from tde_trainer.data.listing import read_list
from tde_trainer.device import make_accelerator
from tde_trainer.epochs import seed_epoch
from tde_trainer.errors import UserError
from tde_trainer.evaluate import extract
from tde_trainer.progress import Reporter
from tde_trainer.schema import DataConfig
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image
from trainer_tools import Tde, image_tree, marks

COUNTS = {"train": [6, 3, 1], "val": [2, 2, 2], "test": [3, 3, 3]}
SIZE = 8
PUBLISHED = {
    "imagenet_lt": ("ImageNet_LT_", 1000, {"train": 115_846, "val": 20_000, "test": 50_000}),
    "places_lt": ("Places_LT_", 365, {"train": 62_500, "val": 365, "test": 365}),
}


def write_lists(root: Path, counts: Mapping[str, Sequence[int]] = COUNTS) -> None:
    """Lists of an `image_tree`."""
    for split in counts:
        files = sorted((root / split).rglob("*.*"))
        lines = [f"{file.relative_to(root)} {int(file.parent.name[-2:])}\n" for file in files]
        (root / f"{split}.txt").write_text("".join(lines))


def balanced_list(file: Path, count: int, num_classes: int) -> None:
    """A list of images that are not there."""
    file.write_text("".join(f"{i % num_classes}/{i}.jpg {i % num_classes}\n" for i in range(count)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`marked` images of three classes, and their lists."""
    write_lists(image_tree(tmp_path / "root", COUNTS, (10, 12)))
    return tmp_path / "root"


@pytest.fixture
def config(root: Path) -> DataConfig:
    return DataConfig("list_lt", str(root), image_size=SIZE)


def load(config: DataConfig, seed: int = 0) -> LongTailedData:
    return DATASETS[config.name](config, seed)


def whole(images: Images) -> tuple[Tensor, Tensor]:
    """All of them in order."""
    return images[torch.arange(len(images))]


class TestListing:
    """Lists well-formed and not."""

    @pytest.mark.parametrize("zipped", [False, True])
    def test_lines_are_paths_and_labels(self, zipped: bool, tmp_path: Path) -> None:
        text = "a/1.jpg 0\n\nb c/great white 2.jpg 1\r\n   \n  d/é.jpg\t12  \nlast.jpg  0".encode()
        file = tmp_path / ("list.txt.gz" if zipped else "list.txt")
        file.write_bytes(gzip.compress(text) if zipped else text)
        listing = read_list(file)
        assert listing.paths == ["a/1.jpg", "b c/great white 2.jpg", "d/é.jpg", "last.jpg"]
        assert (listing.labels, listing.lines) == ([0, 1, 12, 0], [1, 3, 5, 6])

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"b.jpg", "no label in 'b.jpg'; wanted is `relative/path label`"),
            (b"12", "no label in '12'"),
            (b"b c.jpg", "label 'c.jpg' must be a whole number from 0"),
            (b"b.jpg -1", "label '-1' must be a whole number from 0"),
            (b"b.jpg 1.0", r"label '1\.0' must be a whole number from 0"),
            ("b.jpg ²".encode(), "label '²' must be a whole number from 0"),
            (b" 12", "no path before label 12"),
            (b"/b.jpg 1", "/b.jpg must be relative to the root of the images, and stay inside"),
            (b"a/../../b.jpg 1", r"a/\.\./\.\./b\.jpg must be relative .* and stay inside"),
            (b".. 1", r"\.\. must be relative"),
            (b"\xff.jpg 1", "is not UTF-8 text"),
        ],
    )
    def test_a_bad_line_is_named_by_file_and_number(self, line: bytes, message: str, tmp_path: Path) -> None:
        file = tmp_path / "list.txt"
        file.write_bytes(b"a.jpg 0\n\n" + line + b"\nc.jpg 1\n")
        with pytest.raises(UserError, match=f"^{file}, line 3: {message}") as error:
            read_list(file)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("content", [b"", b"\n \n"])
    def test_an_empty_list_is_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"list\.txt lists nothing"):
            read_list(tmp_path / "list.txt")

    @pytest.mark.parametrize("damage", ["missing", "a folder", "truncated", "not zipped", "bad check sum"])
    def test_an_unreadable_list_is_refused(self, damage: str, tmp_path: Path) -> None:
        file, packed = tmp_path / "list.txt.gz", gzip.compress(b"a.jpg 0\n" * 99)
        if damage == "a folder":
            file.mkdir()
        elif damage != "missing":
            contents = {"truncated": packed[:-12], "not zipped": b"a.jpg 0\n", "bad check sum": packed[:-8] + bytes(8)}
            file.write_bytes(contents[damage])
        with pytest.raises(UserError, match=f"^cannot read {file}: ") as error:
            read_list(file)
        assert "\n" not in str(error.value)

    def test_a_gap_in_the_labels_names_the_missing_one_and_the_line_of_the_largest(self, tmp_path: Path) -> None:
        file = tmp_path / "list.txt"
        file.write_text("a.jpg 0\nb.jpg 3\n\nc.jpg 99999999999999999999\nd.jpg 1\n")
        with pytest.raises(UserError, match=f"^{file}, line 4: label 9{{20}}, while no image has label 2;"):
            read_list(file).num_classes()

    def test_labels_in_any_order_without_a_gap_are_fine(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("a.jpg 2\nb.jpg 0\nc.jpg 1\nd.jpg 2\n")
        assert read_list(tmp_path / "list.txt").num_classes() == 3


class TestDataSets:
    """Three lists as one data set."""

    def test_every_listed_image_is_there_with_its_label(self, config: DataConfig) -> None:
        data = load(config)
        assert (data.num_classes, data.channels, data.class_counts.tolist()) == (3, 3, COUNTS["train"])
        for split, counts in COUNTS.items():
            images, labels = whole(getattr(data, split))
            assert (images.shape, images.dtype) == ((sum(counts), 3, SIZE, SIZE), torch.uint8)
            assert labels.dtype == torch.int64
            assert marks(images) == [(int(label), place) for place, label in enumerate(labels)]
            assert labels.bincount().tolist() == counts

    def test_the_seed_chooses_nothing(self, config: DataConfig) -> None:
        first, other = load(config, 0), load(config, 7)
        for split in COUNTS:
            assert all(map(torch.equal, whole(getattr(first, split)), whole(getattr(other, split))))

    @pytest.mark.parametrize("zipped", [False, True])
    def test_lists_may_lie_elsewhere(self, zipped: bool, config: DataConfig, root: Path, tmp_path: Path) -> None:
        lists = tmp_path / "lists"
        lists.mkdir()
        for split in COUNTS:
            text = (root / f"{split}.txt").read_bytes()
            (root / f"{split}.txt").unlink()
            (lists / f"{split}.txt{'.gz' if zipped else ''}").write_bytes(gzip.compress(text) if zipped else text)
        with pytest.raises(UserError, match=f"^data.lists={root}: there is no train.txt or train.txt.gz; wanted are"):
            load(config)
        assert load(replace(config, lists=str(lists))).class_counts.tolist() == COUNTS["train"]

    def test_a_missing_root_is_named(self, config: DataConfig, root: Path) -> None:
        with pytest.raises(UserError, match=f"^data.root={root}/nothing: there is no such folder"):
            load(replace(config, root=f"{root}/nothing", lists=str(root)))

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_a_class_that_is_not_trained_is_named_by_its_line(self, split: str, config: DataConfig, root: Path) -> None:
        with open(root / f"{split}.txt", "a") as file:
            file.write("\ntrain/a.png 3\n")
        line = sum(COUNTS[split]) + 2
        with pytest.raises(UserError, match=f"^{root}/{split}.txt, line {line}: label 3, while {root}/train.txt has "):
            load(config)

    def test_a_gap_in_training_is_refused(self, config: DataConfig, root: Path) -> None:
        (root / "train.txt").write_text("a.png 0\nb.png 2\n")
        with pytest.raises(UserError, match="line 2: label 2, while no image has label 1"):
            load(config)

    def test_classes_are_named_by_their_folders_as_far_as_these_differ(self, config: DataConfig, root: Path) -> None:
        assert load(config).class_names == ("class00", "class01", "class02")
        paths = ["x/a/house/inside/1.jpg", "x/a/house/outside/2.jpg", "x/b/3.jpg"]
        (root / "train.txt").write_text("".join(f"{path} {label}\n" for label, path in enumerate(paths)))
        assert load(config).class_names == ("a/house/inside", "a/house/outside", "b")

    @pytest.mark.parametrize("paths", [["a/1", "a/2", "b/3"], ["a/1", "b/2", "c/3", "d/4"], ["1", "2", "3"]])
    def test_or_by_numbers_where_a_class_has_no_folder_of_its_own(
        self, paths: list[str], config: DataConfig, root: Path
    ) -> None:
        (root / "train.txt").write_text("".join(f"{path} {min(label, 2)}\n" for label, path in enumerate(paths)))
        assert load(config).class_names == ("0", "1", "2")

    @pytest.mark.parametrize("zipped", [False, True])
    def test_or_as_a_file_says(self, zipped: bool, config: DataConfig, root: Path) -> None:
        text = b"n01 tench\nn02 great white shark\n\nn03 crane\n"
        (root / f"classnames.txt{'.gz' if zipped else ''}").write_bytes(gzip.compress(text) if zipped else text)
        assert load(config).class_names == ("tench", "great white shark", "crane")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("n01 a\nn02 b\n", "names 2 classes, the training list has 3"),
            ("n01 a\nn02\nn03 c\n", "line 2: no name in 'n02'; wanted is `wnid name`"),
        ],
    )
    def test_bad_class_names_are_refused(self, text: str, message: str, config: DataConfig, root: Path) -> None:
        (root / "classnames.txt").write_text(text)
        with pytest.raises(UserError, match=f"{root}/classnames.txt.*{message}"):
            load(config)

    @pytest.mark.parametrize("name", list(PUBLISHED))
    def test_the_published_lists_are_taken(self, name: str, tmp_path: Path) -> None:
        prefix, num_classes, images = PUBLISHED[name]
        for split, count in images.items():
            balanced_list(tmp_path / f"{prefix}{split}.txt", count, num_classes)
        data = load(DataConfig(name, str(tmp_path)))
        assert (data.num_classes, {split: len(getattr(data, split)) for split in images}) == (num_classes, images)

    @pytest.mark.parametrize("lacking", ["images", "classes"])
    def test_others_are_refused_under_their_name(self, lacking: str, tmp_path: Path) -> None:
        prefix, num_classes, images = PUBLISHED["places_lt"]
        for split, count in images.items():
            fewer = (lacking == "images", lacking == "classes") if split == "train" else (False, False)
            balanced_list(tmp_path / f"{prefix}{split}.txt", count - fewer[0], num_classes - fewer[1])
        wanted = {"images": "62,499 images, the published places_lt 62,500", "classes": "364 classes, .* 365"}[lacking]
        with pytest.raises(UserError, match=f"Places_LT_train.txt holds {wanted}; data.name=list_lt takes any lists"):
            load(DataConfig("places_lt", str(tmp_path)))


class TestPixels:
    """Which part of an image a batch shows."""

    @pytest.mark.parametrize("size", [(48, 64), (64, 40), (20, 20)])
    def test_evaluation_shows_the_middle_of_the_resized_image(
        self, size: tuple[int, int], config: DataConfig, root: Path
    ) -> None:
        image = to_pil_image(torch.randint(256, (3, *size), dtype=torch.uint8))
        image.save(root / "val/class00/0000.png")
        shorter, crop = 32, 28
        width, height = (int(side * shorter / min(image.size)) for side in image.size)
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        wanted = np.asarray(resized.crop((left, top, left + crop, top + crop)))
        seen, _ = load(replace(config, image_size=crop)).val[torch.tensor([0])]
        assert np.array_equal(seen[0].permute(1, 2, 0).numpy(), wanted)

    def test_training_shows_random_parts(self, config: DataConfig, root: Path) -> None:
        side = 128
        ramp = torch.arange(0, 256, 2).to(torch.uint8)  # red says the column, green the row
        image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)])
        to_pil_image(image.to(torch.uint8)).save(root / "train/class00/0000.png")
        seen, labels = load(replace(config, image_size=32)).train[torch.zeros(200, dtype=torch.int64)]
        assert labels.tolist() == [0] * 200
        width, height = (
            (part.flatten(1).amax(1).float() - part.flatten(1).amin(1)) / 256 for part in (seen[:, 0], seen[:, 1])
        )
        # The mean of an edge pixel is up to half of its own width from the edge.
        area, shape = width * height, width / height
        assert 0.05 < area.min() < 0.2 and 0.8 < area.max() <= 1
        assert 0.6 < shape.min() < 0.9 and 1.1 < shape.max() < 1.6
        places = seen[:, 0, 0, 0].float()
        assert places.unique().numel() > 50 and places.min() < 20

    def test_evaluated_training_images_are_as_an_evaluation_sees_them(self, config: DataConfig, root: Path) -> None:
        to_pil_image(torch.randint(256, (3, 40, 50), dtype=torch.uint8)).save(root / "train/class00/0000.png")
        shutil.copy(root / "train/class00/0000.png", root / "val/class00/0000.png")
        data, first = load(config), torch.tensor([0])
        assert torch.equal(data.train.evaluated()[first][0], data.val[first][0])
        assert not torch.equal(data.train[first][0], data.val[first][0])
        assert torch.equal(data.val.evaluated()[first][0], data.val[first][0])

    def test_grey_images_and_palettes_are_read_as_colours(self, config: DataConfig, root: Path) -> None:
        grey = Image.new("L", (20, 20), 200)
        grey.save(root / "val/class00/0000.png")
        grey.convert("P").save(root / "val/class00/0001.png")
        assert (load(config).val[torch.arange(2)][0] == 200).all()


@pytest.fixture
def textured(config: DataConfig, root: Path) -> DataConfig:
    """Training images of which no two parts look alike."""
    for file in (root / "train").rglob("*.png"):
        to_pil_image(torch.randint(256, (3, 30, 30), dtype=torch.uint8)).save(file)
    return config


class TestRandomness:
    """Order and crops follow from seed and epoch."""

    @staticmethod
    def epoch(config: DataConfig, seed: int, epoch: int, *, sampler: Any = None) -> tuple[Tensor, Tensor]:
        """The batches of an epoch, as a training reads them."""
        set_seed(seed)
        loader = make_loader(load(config).train, 4, shuffle=sampler is None, sampler=sampler)
        loader = make_accelerator("fp32").prepare(loader)
        seed_epoch(seed, epoch, loader)
        images, labels = zip(*loader, strict=True)
        return torch.cat(images), torch.cat(labels)

    def test_workers_change_nothing(self, textured: DataConfig) -> None:
        wanted = self.epoch(textured, 3, 5)
        for workers in (1, 2):
            assert all(map(torch.equal, self.epoch(replace(textured, workers=workers), 3, 5), wanted))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_seeds_and_epochs_do(self, workers: int, textured: DataConfig) -> None:
        config, in_order = replace(textured, workers=workers), range(10)
        first, again, epoch, seed = (
            self.epoch(config, *which, sampler=in_order)[0] for which in ((3, 5), (3, 5), (3, 6), (4, 5))
        )
        assert torch.equal(first, again)
        for other in (epoch, seed):
            assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    def test_shuffling_does_too(self, config: DataConfig) -> None:
        first, again, epoch = (marks(self.epoch(config, 3, number)[0]) for number in (5, 5, 6))
        assert first == again != epoch and sorted(first) == sorted(epoch)

    def test_an_image_drawn_twice_shows_two_parts(self, textured: DataConfig) -> None:
        train = load(textured).train
        one, other = train[torch.tensor([2, 2])][0]
        later = train[torch.tensor([2, 1])][0][0]
        assert not torch.equal(one, other) and not torch.equal(one, later) and not torch.equal(other, later)

    def test_reading_draws_from_nobody_elses_generator(self, textured: DataConfig) -> None:
        data, state = load(textured), torch.get_rng_state()
        whole(data.train)
        assert torch.equal(torch.get_rng_state(), state)


class TestUnreadable:
    """Images that are missing or damaged."""

    @pytest.fixture(params=["missing", "truncated", "empty", "text", "a folder"])
    def damaged(self, request: pytest.FixtureRequest, root: Path) -> Path:
        """The second training image."""
        file = root / "train/class00/0001.png"
        content = {"truncated": file.read_bytes()[:45], "empty": b"", "text": b"no image"}
        file.unlink()
        if request.param == "a folder":
            file.mkdir()
        elif request.param != "missing":
            file.write_bytes(content[request.param])
        return file

    @pytest.mark.parametrize("workers", [0, 1])
    def test_one_is_named_with_its_line(self, workers: int, damaged: Path, config: DataConfig, root: Path) -> None:
        train = load(replace(config, workers=workers)).train
        for images in (train, train.evaluated()):
            with pytest.raises(UserError) as error:
                list(make_loader(images, 4))
            said = str(error.value)
            assert said.startswith(f"cannot read {damaged} ({root}/train.txt, line 2): ") and "\n" not in said
            assert said.endswith("; data.skip_corrupt=true leaves it out")

    @pytest.mark.parametrize("workers", [0, 1])
    def test_the_user_sees_one_line(self, workers: int, config: DataConfig, root: Path, tde: Tde) -> None:
        (root / "train/class01/0006.png").unlink()
        result = tde("train", *recipe(config), f"data.workers={workers}", f"out={root}/run")
        assert result.exit_code == 2
        assert result.stderr == (
            f"error: cannot read {root}/train/class01/0006.png ({root}/train.txt, line 7): No such file or directory; "
            "data.skip_corrupt=true leaves it out\n"
        )

    def test_another_of_the_batch_takes_its_place_in_training(
        self, damaged: Path, config: DataConfig, caplog: pytest.LogCaptureFixture
    ) -> None:
        train = load(replace(config, skip_corrupt=True)).train
        for batch in ([1, 6, 9], [6, 1, 9], [9, 6, 1]):
            images, labels = train[torch.tensor(batch)]
            wanted = [place if place != 1 else next(p for p in batch if p != 1) for place in batch]
            assert marks(images) == [(int(train.labels[p]), p) for p in wanted]
            assert labels.tolist() == train.labels[wanted].tolist()
        assert len(caplog.records) == 1
        assert caplog.records[0].getMessage().startswith(f"left out {damaged} ({config.root}/train.txt, line 2): ")

    def test_a_batch_of_nothing_else_is_refused(self, damaged: Path, config: DataConfig, root: Path) -> None:
        with pytest.raises(UserError, match=rf"none of a batch.* {damaged} \({root}/train.txt, line 2\)$"):
            load(replace(config, skip_corrupt=True)).train[torch.tensor([1, 1])]

    def test_it_is_left_out_of_an_evaluation(self, damaged: Path, config: DataConfig) -> None:
        images = load(replace(config, skip_corrupt=True)).train.evaluated()
        assert images[torch.tensor([0, 1, 9])][1].tolist() == [0, UNREADABLE, 2]

        class Colours(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return images[:, :, 0, 0]

        def pipeline(images: Tensor, *, training: bool) -> Tensor:
            return images

        found = extract(Colours(), images, pipeline, 4, make_accelerator("fp32"))  # type: ignore[arg-type]
        assert found.x[:, 2].tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9] and found.y.tolist() == [0] * 5 + [1] * 3 + [2]

    def test_workers_warn_of_it_once(
        self, config: DataConfig, root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (root / "train/class00/0001.png").unlink()
        monkeypatch.setattr(logging.getLogger("tde_trainer.data.image_files"), "propagate", False)
        loader = make_loader(load(replace(config, skip_corrupt=True, workers=2)).train, 4)
        for _ in range(2):
            assert sum(len(labels) for _, labels in loader) == 10
        assert capfd.readouterr().err.count("left out") == 1


def recipe(config: DataConfig) -> list[str]:
    """A short training on ``config``'s lists."""
    small = ["model.width=4", "model.features=8", "train.epochs=2", "train.batch_size=4", "head.alpha_steps=3"]
    data = ["data.name=list_lt", f"data.root={config.root}", f"data.image_size={SIZE}"]
    return ["digits_lt", *data, *small, "methods=[deconfound]", "seeds=[0]"]


def test_a_training_resumed_with_other_workers_ends_in_the_same_bits(
    textured: DataConfig, tmp_path: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", *recipe(textured)]
    assert tde(*command, "data.workers=2", f"out={tmp_path}/whole").exit_code == 0

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "epoch_done", interrupt)
        assert tde(*command, "data.workers=1", f"out={tmp_path}/run").exit_code == 130
    assert tde(*command, f"out={tmp_path}/run", "resume=true").exit_code == 0
    first, second = (
        torch.load(tmp_path / run / "deconfound/seed0" / checkpoint.FILE, weights_only=True)["network"]
        for run in ("whole", "run")
    )
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
