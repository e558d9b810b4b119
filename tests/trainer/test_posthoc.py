"""Features in files, and TDE for networks that are trained already."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tde_trainer import results
from tde_trainer.device import cpu_threads
from tde_trainer.errors import UserError
from tde_trainer.evaluate import Features
from tde_trainer.feature_file import FeatureFile, load_features, save_features
from tde_trainer.posthoc.head_file import load_head
from tde_trainer.posthoc.weights import read_checkpoint
from tde_trainer.trained import TrainedCell
from torch import Tensor
from trainer_tools import Tde

C, D = 5, 12


@pytest.fixture
def cell(tiny_run: Path, tmp_path: Path) -> Path:
    """A training with plain cross entropy, in a run of its own."""
    copied = tmp_path / "run"
    shutil.copytree(tiny_run, copied)
    return copied / "linear/seed0"


def made_up() -> tuple[dict[str, np.ndarray[Any, Any]], Tensor]:
    """Features of a long-tailed set, biased to its head, and a classifier's weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(C, D, generator=generator)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for split, counts in (("train", [200, 60, 20, 8, 3]), ("val", [10] * C), ("test", [12] * C)):
        y = torch.arange(C).repeat_interleave(torch.tensor(counts))
        x = weight[y] + 1.5 * weight[0] + torch.randn(len(y), D, generator=generator)
        arrays |= {f"{split}_x": x.numpy(), f"{split}_y": y.numpy()}
    return arrays, weight


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """Other people's features with their network beside them."""
    arrays, weight = made_up()
    np.savez(tmp_path / "features.npz", **arrays)
    torch.save({"state_dict": {"fc.weight": weight, "conv.weight": torch.ones(3, 3, 1, 1)}}, tmp_path / "net.pth")
    return tmp_path / "features.npz"


def refused(result: Any) -> str:
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


class TestKeptFeatures:
    """`tde features`, and who reads them."""

    def test_they_are_what_the_network_gives(self, cell: Path, tde: Tde) -> None:
        assert tde("features", cell).exit_code == 0
        trained = TrainedCell(results.finished_cells(cell)[0])
        kept = load_features(cell / "features.safetensors")
        for split in ("train", "val", "test"):
            images = getattr(trained.data, split)
            with torch.no_grad():
                x = trained.network(trained.data.pipeline(images.images, training=False))
            torch.testing.assert_close(kept.splits[split].x, x)
            assert torch.equal(kept.splits[split].y, images.labels)
        assert torch.equal(kept.class_counts, trained.data.class_counts)

    def test_eval_and_sweep_then_need_no_images(self, cell: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch) -> None:
        run = cell.parent.parent
        before = [tde("eval", run).output, tde("sweep", run, "--steps", 3).output]
        assert tde("features", run).exit_code == 0
        monkeypatch.setattr("tde_trainer.trained.DATASETS", {})
        assert [tde("eval", run).output, tde("sweep", run, "--steps", 3).output] == before

    def test_features_of_another_checkpoint_are_not_read(self, cell: Path, tde: Tde) -> None:
        assert tde("features", cell).exit_code == 0
        content = torch.load(cell / "checkpoint.pt", weights_only=True)
        content["network"]["backbone.4.weight"] += 1  # as if training had gone on
        torch.save(content, cell / "checkpoint.pt")
        trained = TrainedCell(results.finished_cells(cell)[0])
        kept = load_features(cell / "features.safetensors")
        assert not torch.equal(trained.features("test").x, kept.splits["test"].x)

    def test_a_split_that_was_not_kept_is_extracted(self, cell: Path, tde: Tde) -> None:
        whole = TrainedCell(results.finished_cells(cell)[0]).features("test")
        assert tde("features", cell, "--splits", "val").exit_code == 0
        assert list(load_features(cell / "features.safetensors").splits) == ["val"]
        torch.testing.assert_close(TrainedCell(results.finished_cells(cell)[0]).features("test").x, whole.x)

    def test_they_take_as_many_threads_as_the_training(self, cell: Path) -> None:
        trained = TrainedCell(results.finished_cells(cell)[0])
        assert trained.config.train.threads == 1
        seen: set[int] = set()
        trained.network.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
        with cpu_threads(2):
            trained.features("test")
            assert seen == {1} and torch.get_num_threads() == 2

    def test_an_unknown_split(self, cell: Path, tde: Tde) -> None:
        assert "unknown split 'tests'; did you mean 'test'?" in refused(tde("features", cell, "--splits", "val,tests"))


class TestFiles:
    """Features that other people wrote."""

    def test_counts_are_those_of_the_training_labels(self, dump: Path) -> None:
        assert load_features(dump).class_counts.tolist() == [200, 60, 20, 8, 3]

    def test_what_was_saved_is_loaded(self, tmp_path: Path) -> None:
        features = Features(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))
        save_features(tmp_path / "f.safetensors", FeatureFile({"val": features}, torch.tensor([5, 3, 1, 0]), "abc"))
        found = load_features(tmp_path / "f.safetensors")
        assert torch.equal(found.splits["val"].x, features.x) and torch.equal(found.splits["val"].y, features.y)
        assert found.class_counts.tolist() == [5, 3, 1, 0] and found.checkpoint == "abc"
        with pytest.raises(UserError, match=r"no split 'test' .* there are: val"):
            found.split("test")

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"train_x": None, "train_y": None}, "neither class_counts nor train_y"),
            ({"val_y": None}, "only one of val_x and val_y"),
            ({"val_x": np.zeros((50, D + 1), np.float32)}, "as wide in every split"),
            ({"val_x": np.zeros(50, np.float32)}, "val_x must be floating point"),
            ({"val_y": np.zeros(49, np.int64)}, "val_y whole numbers"),
            ({"val_y": np.zeros(50, np.float32)}, "val_y whole numbers"),
            ({"val_y": np.full(50, -1)}, "holds the label -1"),
            ({"class_counts": np.array([1, 2])}, "C above the largest label, 4"),
        ],
    )
    def test_what_does_not_fit_is_named(self, changed: dict[str, Any], said: str, tmp_path: Path) -> None:
        arrays = {key: value for key, value in {**made_up()[0], **changed}.items() if value is not None}
        np.savez(tmp_path / "f.npz", **arrays)
        with pytest.raises(UserError, match=said):
            load_features(tmp_path / "f.npz")

    @pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
    def test_missing_corrupt_and_foreign_files(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no features at"):
            load_features(tmp_path / name)
        (tmp_path / name).write_bytes(b"no such format")
        with pytest.raises(UserError, match="cannot read features from"):
            load_features(tmp_path / name)
        if name.endswith("npz"):
            np.savez(tmp_path / name, other=np.ones(3))
        else:
            save_file({"other": torch.ones(3)}, tmp_path / name)
        with pytest.raises(UserError, match=r"holds no features: .* got other"):
            load_features(tmp_path / name)

    def test_an_array_of_objects_is_not_unpickled(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "f.npz", train_x=np.array([object()], dtype=object))
        with pytest.raises(UserError, match="cannot read features"):
            load_features(tmp_path / "f.npz")


def logits(x: Tensor, w: Tensor, mean: Tensor, alpha: float) -> Tensor:
    """A linear classifier without what lies along the mean of the training features, in float64."""
    x, w, d = x.double(), w.double(), mean.double() / mean.double().norm()
    return (x - alpha * (x @ d)[:, None] * d) @ w.T


class TestFitDirection:
    """`tde fit-direction`."""

    def test_a_network_trained_with_cross_entropy_from_its_checkpoint(self, cell: Path, tde: Tde) -> None:
        result = tde("fit-direction", cell)
        assert result.exit_code == 0 and "linear + TDE" in result.output, result.output
        trained = TrainedCell(results.finished_cells(cell)[0])
        head = load_head(cell / "tde_head.safetensors")
        mean = trained.features("train").x.double().mean(0)
        torch.testing.assert_close(head.ema.double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(head.weight, trained.head.weight)
        test = trained.features("test").x
        wanted = logits(test, head.weight.detach(), mean, float(head.alpha))
        torch.testing.assert_close(head(test).double(), wanted, rtol=1e-4, atol=1e-4)

    def test_alpha_is_the_best_on_validation_data_and_sees_no_test_data(self, dump: Path, tde: Tde) -> None:
        assert tde("fit-direction", dump, "--weight", dump.with_name("net.pth")).exit_code == 0
        head = load_head(dump.with_name("tde_head.safetensors"))
        arrays, weight = made_up()
        x, y = torch.from_numpy(arrays["val_x"]), torch.from_numpy(arrays["val_y"])
        mean = torch.from_numpy(arrays["train_x"]).double().mean(0)
        accuracies = {
            alpha: (logits(x, weight, mean, alpha).argmax(1) == y).double().mean().item()
            for alpha in [0.0, float(head.alpha), *np.linspace(0, 3, 61)]
        }
        assert accuracies[float(head.alpha)] == max(accuracies.values()) > accuracies[0.0]
        arrays["test_y"] = arrays["test_y"][::-1].copy()
        np.savez(dump, **arrays)
        assert tde("fit-direction", dump, "--weight", dump.with_name("net.pth")).exit_code == 0
        assert load_head(dump.with_name("tde_head.safetensors")).alpha == head.alpha

    def test_any_head_of_the_family(self, dump: Path, tde: Tde, tmp_path: Path) -> None:
        options = ("--normalizer", "deconfound", "--num-heads", 3, "--tau", 8, "--gamma", 0.5, "--out", tmp_path / "h")
        assert tde("fit-direction", dump, "--weight", dump.with_name("net.pth"), *options).exit_code == 0
        head = load_head(tmp_path / "h")
        assert (head.normalizer, head.num_heads, head.tau, head.gamma) == ("deconfound", 3, 8.0, 0.5)
        said = refused(tde("fit-direction", dump, "--weight", dump.with_name("net.pth"), "--num-heads", 5))
        assert "num_heads" in said and "12" in said

    def test_a_checkpoint_of_the_published_code_brings_its_average(self, dump: Path, tde: Tde) -> None:
        _, weight = made_up()
        average = np.linspace(-1, 1, D)
        published = {"state_dict_best": {"classifier": {"module.fc.weight": weight}, "embed": average}}
        torch.save(published, dump.with_name("published.pth"))
        result = tde("fit-direction", dump, "--weight", dump.with_name("published.pth"))
        assert result.exit_code == 0, result.output
        head = load_head(dump.with_name("tde_head.safetensors"))
        torch.testing.assert_close(head.ema.double(), torch.from_numpy(average), rtol=1e-6, atol=1e-7)
        # the classifier that it was trained as, which its file does not say
        assert (head.normalizer, head.num_heads, head.tau, head.gamma) == ("deconfound", 2, 16.0, 1 / 32)

    def test_a_checkpoint_that_was_written_with_numpy_1(self, tmp_path: Path) -> None:
        average = np.linspace(-1, 1, D, dtype=np.float32)
        torch.save({"embed": average}, tmp_path / "new.pth")
        with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
            for name in new.namelist():
                content = new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                assert b"numpy._core" not in content
                old.writestr(name.replace("new/", "old/"), content)
        np.testing.assert_array_equal(read_checkpoint(tmp_path / "old.pth")["embed"], average)

    def test_a_safetensors_file_and_a_bias(self, dump: Path, tde: Tde, caplog: pytest.LogCaptureFixture) -> None:
        _, weight = made_up()
        save_file({"head.weight": weight, "head.bias": torch.ones(C)}, dump.with_name("net.safetensors"))
        assert tde("fit-direction", dump, "--weight", dump.with_name("net.safetensors")).exit_code == 0
        assert "the bias beside head.weight is left out" in caplog.text
        assert torch.equal(load_file(dump.with_name("tde_head.safetensors"))["weight"], weight)

    def test_weights_that_are_none_or_more_than_one(self, dump: Path, tde: Tde) -> None:
        _, weight = made_up()
        other = dump.with_name("other.pth")
        torch.save({"a.weight": weight, "b.weight": weight, "c.weight": weight.T.contiguous()}, other)
        command = ("fit-direction", dump, "--weight", other)
        assert "2 tensors have the shape [5, 12] (a.weight, b.weight); --key names one" in refused(tde(*command))
        assert "no such tensor" in refused(tde(*command, "--key", "d.weight"))
        assert "--key c.weight has shape [12, 5], wanted is [5, 12]" in refused(tde(*command, "--key", "c.weight"))
        assert tde(*command, "--key", "b.weight").exit_code == 0

    def test_a_checkpoint_with_code_in_it_is_refused(self, dump: Path, tde: Tde) -> None:
        torch.save({"fc.weight": made_up()[1], "extra": Path("x")}, dump.with_name("evil.pth"))
        assert "cannot read" in refused(tde("fit-direction", dump, "--weight", dump.with_name("evil.pth")))

    def test_arguments_that_do_not_go_together(self, dump: Path, cell: Path, tde: Tde) -> None:
        assert "--weight FILE names the checkpoint" in refused(tde("fit-direction", dump))
        assert refused(tde("fit-direction", "nope")) == "error: there is no such file or folder: nope"
        assert "go with a file of features" in refused(tde("fit-direction", cell, "--weight", dump))
        assert "holds 4 trainings; name one" in refused(tde("fit-direction", cell.parent.parent))
        assert "no checkpoint at" in refused(tde("fit-direction", dump, "--weight", dump.with_name("none.pth")))

    def test_without_test_features_it_says_that_it_reports_validation(self, dump: Path, tde: Tde) -> None:
        arrays = {key: value for key, value in made_up()[0].items() if not key.startswith("test")}
        np.savez(dump, **arrays)
        result = tde("fit-direction", dump, "--weight", dump.with_name("net.pth"))
        assert result.exit_code == 0 and "validation data by which alpha was chosen" in " ".join(result.output.split())


class TestSweep:
    """`tde sweep` of a file of features."""

    def test_it_shows_the_accuracy_at_every_alpha(self, dump: Path, tde: Tde) -> None:
        assert tde("fit-direction", dump, "--weight", dump.with_name("net.pth")).exit_code == 0
        head = dump.with_name("tde_head.safetensors")
        result = tde("sweep", dump, "--head", head, "--max", 2, "--steps", 3)
        assert result.exit_code == 0, result.output
        arrays, weight = made_up()
        mean = torch.from_numpy(arrays["train_x"]).double().mean(0)
        x, y = torch.from_numpy(arrays["test_x"]), torch.from_numpy(arrays["test_y"])
        shown = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
        for row, alpha in zip(shown, (0.0, 1.0, 2.0), strict=True):
            wanted = (logits(x, weight, mean, alpha).argmax(1) == y).double().mean().item()
            assert (row[1].strip(), row[-2].strip()) == (f"{alpha:g}", f"{100 * wanted:.1f}")

    def test_a_head_that_is_none_or_does_not_fit(self, dump: Path, cell: Path, tde: Tde) -> None:
        assert "--head goes with a file of features" in refused(tde("sweep", dump))
        assert "no head at" in refused(tde("sweep", dump, "--head", dump.with_name("none")))
        save_file({"weight": torch.ones(2, 2)}, dump.with_name("foreign.safetensors"))
        assert "holds no head" in refused(tde("sweep", dump, "--head", dump.with_name("foreign.safetensors")))
        assert tde("fit-direction", cell).exit_code == 0
        assert "features have 12 channels, the head wants 8" in refused(
            tde("sweep", dump, "--head", cell / "tde_head.safetensors")
        )


def test_the_written_head_says_what_it_was_built_with(cell: Path, tde: Tde) -> None:
    assert tde("fit-direction", cell.parent.parent / "deconfound/seed0").exit_code == 0
    config = json.loads((cell / "results.json").read_text())["config"]["head"]
    head = load_head(cell.parent.parent / "deconfound/seed0/tde_head.safetensors")
    assert (head.normalizer, head.num_heads, head.tau) == ("deconfound", config["num_heads"], config["tau"])
