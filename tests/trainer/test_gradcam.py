"""`tde gradcam`: maps against Grad-CAM's definition, the layer they are of, and which images are shown."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tde_trainer.config import config_from
from tde_trainer.errors import UserError
from tde_trainer.evaluate import Features
from tde_trainer.gradcam import figure, run
from tde_trainer.gradcam.figure import Shown, draw_maps
from tde_trainer.gradcam.maps import ActivationMaps, Classifier, activation_maps, last_map
from tde_trainer.gradcam.run import cells_of, choose, draw_gradcam
from tde_trainer.models import builder
from tde_trainer.network import Network, build_network
from tde_trainer.schema import ModelConfig
from torch import Tensor, nn
from trainer_tools import Tde

from tde_kernels import FusedTDEHead, reference


def network(method: str) -> Network:
    torch.manual_seed(0)
    stage_one = "runs/first" if method == "lws" else ""
    model = {"width": 4, "features": 8}
    built = build_network(config_from({"methods": [method], "stage_one": stage_one, "model": model}), method, 1, 10)
    built.head.fit_direction(torch.rand(64, 8))
    for _ in range(3):
        built.train()(torch.rand(64, 1, 8, 8))  # batch norm's running figures
    return built.eval()


def scaled(maps: Tensor) -> Tensor:
    least, most = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - least) / (most - least + 1e-7)


def by_definition(trained: Network, images: Tensor, alpha: float) -> tuple[NDArray[Any], list[int]]:
    """Channels weighted by the mean gradient of the winning logit, which here is that of the reference in float64."""
    layers = trained.backbone.double()
    maps = layers[:3](images.double()).detach().requires_grad_()
    head = trained.head
    logits = reference.tde_logits(
        layers[3:](maps),
        head.weight.double(),
        head.head_direction.double(),
        alpha=alpha,
        num_heads=head.num_heads,
        tau=head.tau,
        gamma=head.gamma,
        normalizer=head.normalizer,
        class_scale=None if head.class_scale is None else head.class_scale.double(),
    )
    winners = logits.max(-1)
    (gradient,) = torch.autograd.grad(winners.values.sum(), maps)
    small = scaled((gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1).relu())
    large = nn.functional.interpolate(small[:, None], size=images.shape[2:], mode="bilinear")[:, 0]
    return scaled(large).numpy(), winners.indices.tolist()


@pytest.mark.parametrize(
    ("method", "alpha"), [("linear", 0.0), ("deconfound", 0.0), ("deconfound", 1.5), ("capsule", 0.7), ("lws", 0.0)]
)
def test_maps_are_those_of_the_definition(method: str, alpha: float) -> None:
    trained, images = network(method), torch.rand(6, 1, 8, 8)
    maps, predicted = activation_maps(Classifier(trained, alpha), images)
    wanted, winners = by_definition(trained, images, alpha)
    assert predicted == winners
    assert maps.shape == (6, 8, 8) and maps.max() > 0.5
    np.testing.assert_allclose(maps, wanted, atol=2e-4)


def test_tde_changes_the_map_of_the_same_class() -> None:
    trained, images = network("deconfound"), torch.rand(64, 1, 8, 8)
    without, with_tde = (activation_maps(Classifier(trained, alpha), images) for alpha in (0.0, 1.0))
    same = [i for i, (a, b) in enumerate(zip(without.predicted, with_tde.predicted, strict=True)) if a == b]
    assert same and np.abs(without.maps - with_tde.maps)[same].max() > 0.05


def test_the_network_is_left_as_it_was() -> None:
    trained = network("deconfound")
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    activation_maps(Classifier(trained, 1.0), torch.rand(2, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert not any(module._forward_hooks for module in trained.modules())


@pytest.mark.parametrize(
    ("name", "branches", "size", "place"),
    [
        ("small_conv", 1, 8, "2"),
        ("resnet32", 1, 32, "branches"),
        ("resnet32", 2, 32, "branches"),
        ("resnet10", 1, 64, "layer4"),
        ("resnet10", 1, 32, "layer3"),  # the last stage has but one pixel
        ("torchvision:mobilenet_v3_small", 1, 64, "features"),
    ],
)
def test_the_layer_is_the_last_with_a_map(name: str, branches: int, size: int, place: str) -> None:
    backbone = builder(name)(ModelConfig(width=4, features=8, branches=branches), 3).module
    assert last_map(backbone, torch.rand(2, 3, size, size)) is backbone.get_submodule(place)


def test_the_map_of_two_branches_holds_both() -> None:
    backbone, features = builder("resnet32")(ModelConfig(branches=2), 3)
    assert isinstance(backbone.branches, nn.Module)
    seen: list[Tensor] = []
    backbone.branches.register_forward_hook(lambda module, given, output: seen.append(output))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images), seen[0].mean((2, 3)))
    assert seen[0].shape == (2, features, 8, 8)


class Permuted(nn.Module):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def test_channels_last_is_no_map() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 5, 3), Permuted(), nn.Flatten())
    assert last_map(backbone, torch.rand(2, 1, 8, 8)) is backbone[0]


@pytest.mark.parametrize("last", [nn.Flatten(), nn.Identity()])
def test_tokens_are_no_map(last: nn.Module) -> None:
    patches = nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.Flatten(2), nn.Linear(16, 16), last)
    with pytest.raises(UserError, match=r"convolutional backbone.* got a Sequential"):
        last_map(patches, torch.rand(2, 1, 8, 8))
    assert not any(module._forward_hooks for module in patches.modules())


def test_a_grad_cam_that_does_not_load_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(UserError, match=r"grad-cam does not load: .*tde_kernels\[train\]"):
        activation_maps(Classifier(network("linear"), 0.0), torch.rand(2, 1, 8, 8))


COUNTS = torch.tensor([200, 50, 5, 3])


def cell(alpha: float | None, counts: Tensor = COUNTS, seed: int = 0) -> Any:
    """What `choose` reads of a training, on 80 test images."""
    generator = torch.Generator().manual_seed(seed)
    head = FusedTDEHead.from_weight(torch.randn(4, 8, generator=generator)).eval()
    x, y = torch.rand(80, 8, generator=generator), torch.arange(80) % 4
    head.fit_direction(x)
    return SimpleNamespace(
        data=SimpleNamespace(test=SimpleNamespace(labels=y)),
        class_counts=counts,
        head=head,
        features=lambda split: {"test": Features(x, y)}[split],
        result=SimpleNamespace(values={"alpha": None if alpha is None else {"value": alpha}}),
    )


def test_few_shot_images_on_which_tde_has_a_say_are_chosen() -> None:
    cells = [cell(None), cell(0.8), cell(0.4, seed=1)]
    say: set[int] = set()
    for one in cells[1:]:
        x, alpha = one.features("test").x, one.result.values["alpha"]["value"]
        say |= {i for i in range(80) if one.head(x[i], alpha=alpha).argmax() != one.head(x[i], alpha=0.0).argmax()}
    few = {i for i in say if i % 4 in (2, 3)}
    assert 3 < len(few) < 40 and few != say
    everything = choose(cells, 80)
    assert everything.index.tolist() == sorted(few)
    some = choose(cells, 3)
    assert len(some.index) == 3 and set(some.index.tolist()) < few
    assert some.index.tolist() == choose(cells, 3).index.tolist()
    assert some.how == (
        f"Images: 3 of the {len(few)} test images of few-shot classes on which TDE changes the prediction, drawn at "
        "random with seed 0."
    )


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_where_tde_has_no_say_any_few_shot_image_will_do(alpha: float | None) -> None:
    chosen = choose([cell(alpha)], 80)
    assert chosen.index.tolist() == [i for i in range(80) if i % 4 in (2, 3)]
    assert "40 of the 40 test images of few-shot classes, drawn" in chosen.how


@pytest.mark.parametrize(
    ("counts", "group", "classes"), [([200, 50, 30, 40], "medium", (1, 2, 3)), ([200, 300, 150, 101], "many", range(4))]
)
def test_without_few_shot_classes_the_next_are_shown(counts: list[int], group: str, classes: Any) -> None:
    chosen = choose([cell(None, torch.tensor(counts))], 80)
    assert chosen.index.tolist() == [i for i in range(80) if i % 4 in classes]
    assert f"of {group}-shot classes, drawn" in chosen.how


def drawn(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> Figure:
    figures: list[Figure] = []
    png = figure.png
    monkeypatch.setattr(figure, "png", lambda one: figures.append(one) or png(one))
    assert draw_maps(shown).startswith(b"\x89PNG")
    return figures[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_figure_has_a_row_per_image_and_a_column_per_network(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(256, (2, channels, 8, 8), dtype=torch.uint8)
    maps = torch.rand(2, 2, 8, 8).numpy()
    columns = {"linear": ActivationMaps(maps[0], [0, 2]), "ours + TDE": ActivationMaps(maps[1], [1, 0])}
    picture = drawn(Shown(images, [1, 2], ["cat", "dog", "owl"], columns, "why " * 80), monkeypatch)
    titles = [axes.get_title() for axes in picture.axes]
    assert titles == ["image\ndog", "linear\n✗ cat", "ours + TDE\n✓ dog", "owl", "✓ owl", "✗ cat"]
    caption = picture.get_suptitle()
    assert caption.split() == ["why"] * 80 and caption.count("\n") > 2
    for place, axes in enumerate(picture.axes):
        row, column = divmod(place, 3)
        layers = [np.asarray(layer.get_array()) for layer in axes.images]
        pixels = images[row].permute(1, 2, 0).numpy() if channels == 3 else images[row, 0].numpy()
        np.testing.assert_array_equal(layers[0], pixels)
        if column:
            np.testing.assert_array_equal(layers[1], maps[column - 1, row])
        else:
            assert len(layers) == 1


def shown_by(paths: list[Path], count: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> Shown:
    caught: list[Shown] = []
    monkeypatch.setattr(run, "draw_maps", lambda shown: caught.append(shown) or b"")
    draw_gradcam(paths, count, out)
    return caught[0]


def test_a_run_is_shown_by_its_first_seeds_with_and_without_tde(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = shown_by([tiny_run], 3, tmp_path / "gradcam.png", monkeypatch)
    assert list(shown.columns) == ["linear", "deconfound", "deconfound + TDE"]
    chosen = choose(cells_of([tiny_run]), 3).index
    trained = cells_of([tiny_run / "deconfound/seed0"])[0]
    assert torch.equal(shown.images, trained.data.test.images[chosen])
    assert shown.labels == trained.data.test.labels[chosen].tolist()
    alpha = json.loads((tiny_run / "deconfound/seed0/results.json").read_text())["alpha"]["value"]
    features = trained.features("test").x[chosen]
    for name, strength in (("deconfound", 0.0), ("deconfound + TDE", alpha)):
        assert shown.columns[name].predicted == trained.head(features, alpha=strength).argmax(-1).tolist()
        assert shown.columns[name].maps.shape == (len(chosen), 8, 8)


def test_networks_of_one_method_are_told_apart_by_their_folders(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tiny_run / "linear/seed0", tiny_run / "linear/seed1"]
    shown = shown_by(folders, 2, tmp_path / "gradcam.png", monkeypatch)
    assert list(shown.columns) == [str(folder) for folder in folders]


def test_images_are_read_once_for_trainings_on_the_same_data(tiny_run: Path) -> None:
    linear, deconfound = cells_of([tiny_run])
    assert linear.data is deconfound.data
    first, second = cells_of([tiny_run / "linear/seed0", tiny_run / "linear/seed1"])
    assert first.data is not second.data  # another seed, other training images


def test_the_command_writes_the_figure(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    out = tmp_path / "figures/gradcam.png"
    result = tde("gradcam", tiny_run, "--images", 2, "--out", out)
    assert result.exit_code == 0, result.output
    caption, place = result.output.splitlines()
    assert caption.startswith("Grad-CAM for the class that each network predicts") and "with seed 0" in caption
    assert place == f"figure: {out}" and out.read_bytes().startswith(b"\x89PNG")


def test_bad_requests_are_one_line(tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_run / "linear/seed0", other)
    values = json.loads((other / "results.json").read_text())
    values["config"]["data"]["test_per_class"] -= 1
    (other / "results.json").write_text(json.dumps(values))
    out = ("--out", tmp_path / "gradcam.png")
    for arguments, message in (
        ((tiny_run, "--images", 0, *out), "--images must be at least 1, got 0"),
        ((tmp_path / "nowhere", *out), "no run at"),
        ((tiny_run, other, *out), f"{other} was tested on other images than {tiny_run}/linear/seed0"),
    ):
        result = tde("gradcam", *arguments)
        assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1
    assert not (tmp_path / "gradcam.png").exists()
