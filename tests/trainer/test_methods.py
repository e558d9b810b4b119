"""Every method: its loss against the formula in float64, and what it draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tde_trainer.config import load_config
from tde_trainer.data import DATASETS, ImageDataset, LongTailedData, Pipeline
from tde_trainer.device import make_accelerator
from tde_trainer.methods import METHODS, Batch, Method, Stage
from tde_trainer.methods.class_balanced import effective_weight
from tde_trainer.network import build_network
from tde_trainer.schema import HeadConfig, LossConfig, ModelConfig
from tde_trainer.train import Training
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import SGD
from trainer_tools import FIRST_STAGE, NORMALISED, TINY

from tde_kernels import FusedTDEHead

COUNTS = torch.tensor([500, 100, 20, 5, 1])
C, D, B = len(COUNTS), 6, 32


def stage_at(done: float = 0.0, **loss: float) -> Stage:
    return Stage(COUNTS, done, LossConfig(**loss))


def head_of(method: Method, head: HeadConfig | None = None) -> FusedTDEHead:
    """A head with weights worth looking at."""
    built = method.build_head(D, C, head or HeadConfig(), LossConfig())
    with torch.no_grad():
        built.weight.normal_()
    return built


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Per sample, or the weighted mean: in float64, by the definition."""
    loss = torch.stack([row.exp().sum().log() - row[y] for row, y in zip(logits, target, strict=True)])
    return loss if weight is None else (weight[target] * loss).sum() / weight[target].sum()


def linear(x: Tensor, w: Tensor) -> Tensor:
    return x.double() @ w.double().T


def cosine(x: Tensor, w: Tensor) -> Tensor:
    return normalize(x.double()) @ normalize(w.double()).T


def class_balanced_weight(beta: float = 0.9999) -> Tensor:
    weight = torch.tensor([(1 - beta) / (1 - beta**n) for n in COUNTS.tolist()], dtype=torch.float64)
    return weight * C / weight.sum()


def margins(largest: float = 0.5) -> Tensor:
    return torch.tensor([largest * (n / min(COUNTS.tolist())) ** -0.25 for n in COUNTS.tolist()], dtype=torch.float64)


def ldam(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Logits with the margins taken off."""
    logits = cosine(x, w)
    for row, label in enumerate(y.tolist()):
        logits[row, label] -= margins()[label]
    return 30 * logits


def focal(x: Tensor, w: Tensor, y: Tensor, exponent: float) -> Tensor:
    loss = cross_entropy(linear(x, w), y)
    return ((1 - (-loss).exp()) ** exponent * loss).mean()


def multi_head(x: Tensor, w: Tensor, feature: Callable[[Tensor], Tensor], gamma: float) -> Tensor:
    """Eq. 7 and its relatives: two heads, tau 16."""
    logits = torch.zeros(len(x), len(w), dtype=torch.float64)
    for a, b in zip(x.double().chunk(2, 1), w.double().chunk(2, 1), strict=True):
        logits += 16 / 2 * (a / feature(a.norm(dim=1, keepdim=True))) @ (b / (b.norm(dim=1, keepdim=True) + gamma)).T
    return logits


def norm_itself(norm: Tensor) -> Tensor:
    return norm


def squashed(norm: Tensor) -> Tensor:
    return norm + 1


# What a batch without a second target costs, by method and stage: features, weight and target to a scalar
PLAIN: dict[str, tuple[Stage, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "linear": (stage_at(), lambda x, w, y: cross_entropy(linear(x, w), y).mean()),
    "focal": (stage_at(), lambda x, w, y: focal(x, w, y, 2)),
    "class_balanced": (stage_at(), lambda x, w, y: cross_entropy(linear(x, w), y, class_balanced_weight())),
    "ldam": (stage_at(1.0), lambda x, w, y: cross_entropy(ldam(x, w, y), y).mean()),
    "balanced_softmax": (
        stage_at(),
        lambda x, w, y: cross_entropy(linear(x, w) + COUNTS.double().log(), y).mean(),
    ),
    "logit_adjustment": (
        stage_at(logit_adjustment=1.5),
        lambda x, w, y: cross_entropy(linear(x, w) + 1.5 * (COUNTS.double() / COUNTS.sum()).log(), y).mean(),
    ),
    "cosine": (stage_at(), lambda x, w, y: cross_entropy(multi_head(x, w, norm_itself, 0), y).mean()),
    "capsule": (stage_at(), lambda x, w, y: cross_entropy(multi_head(x, w, squashed, 0), y).mean()),
    "deconfound": (stage_at(), lambda x, w, y: cross_entropy(multi_head(x, w, norm_itself, 1 / 32), y).mean()),
}


def loss_of(name: str, head: FusedTDEHead, x: Tensor, y: Tensor, stage: Stage) -> Tensor:
    return METHODS[name].loss(nn.Identity(), head, x, Batch(x, y), stage).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, D)


@pytest.fixture
def y() -> Tensor:
    """Every class, more often than once."""
    return torch.arange(B) % C


def assert_close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)


class TestLosses:
    """Against formulas written out."""

    @pytest.mark.parametrize("name", list(PLAIN))
    def test_the_loss_is_the_formula(self, name: str, x: Tensor, y: Tensor) -> None:
        stage, formula = PLAIN[name]
        head = head_of(METHODS[name])
        assert_close(loss_of(name, head, x, y, stage), formula(x, head.weight.detach(), y))

    def test_every_method_has_a_formula_here(self) -> None:
        assert {*PLAIN, "ldam_drw", "mixup", "bbn"} == set(FIRST_STAGE)

    @pytest.mark.parametrize("name", FIRST_STAGE)
    def test_the_moving_average_takes_the_batch_in_once(self, name: str, x: Tensor, y: Tensor) -> None:
        head = head_of(METHODS[name])
        second = {"target_b": y.flip(0), "lam": torch.tensor(0.25)} if name in ("mixup", "bbn") else {}
        features = torch.cat([x, x]) if name == "bbn" else x
        METHODS[name].loss(nn.Identity(), head.train(), features, Batch(features, y, **second), stage_at(0.5))
        assert head.num_updates == 1

    @pytest.mark.parametrize("exponent", [0.0, 0.5, 5.0])
    def test_focal_takes_its_exponent_from_the_recipe(self, exponent: float, x: Tensor, y: Tensor) -> None:
        head = head_of(METHODS["focal"])
        ours = loss_of("focal", head, x, y, stage_at(focal_exponent=exponent))
        assert_close(ours, focal(x, head.weight.detach(), y, exponent))

    @pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-9])
    def test_class_balanced_weights_sum_to_the_number_of_classes(self, beta: float) -> None:
        weight = effective_weight(stage_at(class_balanced_beta=beta))
        assert weight.sum().item() == pytest.approx(C)
        torch.testing.assert_close(weight.double(), class_balanced_weight(beta), rtol=1e-6, atol=0)

    def test_they_span_from_equal_to_inverse_frequency(self) -> None:
        assert effective_weight(stage_at(class_balanced_beta=0.0)).tolist() == [1.0] * C
        weight = effective_weight(stage_at(class_balanced_beta=1 - 1e-9)) * COUNTS
        assert (weight / weight[0]).tolist() == pytest.approx([1.0] * C, rel=1e-5)

    def test_the_largest_margin_is_that_of_the_smallest_class(self) -> None:
        margin = METHODS["ldam"].options(stage_at())["margin"] / 30
        assert margin.argmax() == C - 1 and margin[-1].item() == pytest.approx(0.5)
        assert margin.tolist() == pytest.approx([0.5 * n**-0.25 for n in COUNTS.tolist()])

    def test_drw_is_ldam_until_it_re_weights_from_0_8_on(self, x: Tensor, y: Tensor) -> None:
        head = head_of(METHODS["ldam_drw"])
        logits = ldam(x, head.weight.detach(), y)
        for done in (0.0, 0.79, 159 / 200):
            assert_close(loss_of("ldam_drw", head, x, y, stage_at(done)), cross_entropy(logits, y).mean())
        for done in (0.8, 160 / 200, 72 / 90, 1.0):
            weighted = cross_entropy(logits, y, class_balanced_weight())
            assert_close(loss_of("ldam_drw", head, x, y, stage_at(done)), weighted)
        assert not torch.isclose(cross_entropy(logits, y).mean(), weighted, rtol=1e-3)

    def test_logit_adjustment_by_one_is_the_balanced_softmax(self, x: Tensor, y: Tensor) -> None:
        head = head_of(METHODS["linear"])
        assert_close(
            loss_of("logit_adjustment", head, x, y, stage_at()),
            loss_of("balanced_softmax", head, x, y, stage_at()).detach(),
        )

    def test_a_class_without_training_images_does_no_harm(self, x: Tensor) -> None:
        stage = Stage(torch.tensor([500, 100, 20, 5, 0]), 0.9, LossConfig())
        for name in set(FIRST_STAGE) - {"mixup", "bbn"}:
            loss = METHODS[name].loss(nn.Identity(), head_of(METHODS[name]), x, Batch(x, torch.arange(B) % 4), stage)
            assert loss.isfinite(), name

    def test_only_normalised_methods_have_tde(self) -> None:
        assert {name for name, method in METHODS.items() if method.has_tde} == NORMALISED

    def test_methods_are_read_without_what_they_were_trained_with(self, x: Tensor) -> None:
        for name in set(FIRST_STAGE) - NORMALISED:
            head = head_of(METHODS[name]).eval()
            w = head.weight.detach()
            wanted = 30 * cosine(x, w) if name.startswith("ldam") else linear(x, w)
            assert_close(head(x, alpha=0.0), wanted)


def no_draw(power: float) -> tuple[Tensor, Tensor]:
    pytest.fail("this method draws no images of its own")


class TestMixup:
    """Images and losses of pairs."""

    def composed(self, images: Tensor, target: Tensor, **loss: float) -> tuple[Batch, Tensor, Tensor]:
        batch = METHODS["mixup"].compose(images, target, stage_at(**loss), no_draw)
        assert batch.target_b is not None and batch.lam is not None
        return batch, batch.target_b, batch.lam

    def test_images_are_mixed_as_their_targets_are(self) -> None:
        images, target = torch.randn(B, 3, 4, 4), torch.arange(B)  # so that a target tells its image
        batch, other, lam = self.composed(images, target)
        assert torch.equal(batch.target, target) and sorted(other.tolist()) == target.tolist()
        assert not torch.equal(other, target)
        torch.testing.assert_close(batch.images, lam * images + (1 - lam) * images[other])

    def test_the_share_is_one_draw_a_batch_from_beta(self) -> None:
        shares = torch.stack([self.composed(torch.zeros(2, 1), torch.arange(2))[2] for _ in range(2000)])
        assert shares.shape == (2000,) and shares.min() >= 0 and shares.max() <= 1
        quantiles = shares.quantile(torch.tensor([0.25, 0.5, 0.75]))  # Beta(1, 1) is uniform
        assert quantiles.tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.05)
        rare = [self.composed(torch.zeros(2, 1), torch.arange(2), mixup_alpha=0.01)[2].item() for _ in range(200)]
        assert sum(0.01 < share < 0.99 for share in rare) < 40

    def test_the_loss_is_that_of_both_targets(self, x: Tensor, y: Tensor) -> None:
        head, lam, other = head_of(METHODS["mixup"]), 0.3, y.roll(3)
        logits = linear(x, head.weight.detach())
        loss = METHODS["mixup"].loss(nn.Identity(), head, x, Batch(x, y, other, torch.tensor(lam)), stage_at())
        assert_close(loss, (lam * cross_entropy(logits, y) + (1 - lam) * cross_entropy(logits, other)).mean())


class TestBBN:
    """Two branches and two ways to draw."""

    def test_the_share_falls_from_one_by_the_square_of_the_epoch(self) -> None:
        def draw(power: float) -> tuple[Tensor, Tensor]:
            return torch.zeros(2, 1), torch.zeros(2).long()

        for epoch in (1, 2, 100, 200):  # of 200, counted from one
            stage = stage_at((epoch - 1) / 200)
            batch = METHODS["bbn"].compose(torch.zeros(2, 1), torch.zeros(2).long(), stage, draw)
            assert batch.lam is not None
            assert batch.lam.item() == pytest.approx(1 - ((epoch - 1) / 200) ** 2)

    def test_the_second_half_of_the_batch_is_drawn_in_reverse(self) -> None:
        images, target = torch.randn(4, 3, 2, 2), torch.arange(4)
        drawn, asked = (torch.randn(4, 3, 2, 2), target.flip(0)), []

        def draw(power: float) -> tuple[Tensor, Tensor]:
            asked.append(power)
            return drawn

        batch = METHODS["bbn"].compose(images, target, stage_at(0.5), draw)
        assert asked == [-1]
        assert torch.equal(batch.images, torch.cat([images, drawn[0]])) and batch.target_b is drawn[1]
        assert torch.equal(batch.target, target)

    @pytest.mark.parametrize("done", [0.0, 0.3, 0.995])
    def test_the_loss_is_the_formula(self, done: float, x: Tensor, y: Tensor) -> None:
        head, share = head_of(METHODS["bbn"]), 1 - done**2
        reversed_x, reversed_y = torch.randn(B, D), y.roll(2)
        both = torch.cat([x, reversed_x])
        loss = METHODS["bbn"].loss(
            nn.Identity(), head, both, Batch(both, y, reversed_y, torch.tensor(share)), stage_at(done)
        )
        features = 2 * torch.cat([share * x[:, : D // 2], (1 - share) * reversed_x[:, D // 2 :]], 1).double()
        logits = linear(features, head.weight.detach())
        wanted = share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, reversed_y)
        assert_close(loss, wanted.mean())

    def test_it_asks_for_two_branches_and_no_other_method_does(self) -> None:
        asked = {name: method.model(ModelConfig("resnet32")).branches for name, method in METHODS.items()}
        assert asked == {**dict.fromkeys(METHODS, 1), "bbn": 2}
        assert build_network(load_config("cifar10_lt"), "bbn", 3, 10).head.in_features == 128

    def test_other_backbones_have_no_branches(self) -> None:
        assert METHODS["bbn"].model(ModelConfig("small_conv")).branches == 1


class TestDraw:
    """What training draws beside its batches."""

    COUNTS = (300, 60, 5, 12, 3)

    @pytest.fixture
    def training(self) -> Training:
        """Of images that say which they are."""
        labels = torch.arange(len(self.COUNTS)).repeat_interleave(torch.tensor(self.COUNTS))
        place = torch.arange(len(labels))
        images = torch.stack([place // 256, place % 256], 1).to(torch.uint8)[:, :, None, None]
        split = ImageDataset(images, labels)
        data = LongTailedData(split, split, split, tuple("abcde"), Pipeline([0.0] * 2, [1 / 255] * 2))
        config = load_config("digits_lt", TINY)
        network = build_network(config, "bbn", data.channels, data.num_classes)
        return Training(data, network, SGD(network.parameter_groups(), 0.1), config, make_accelerator("fp32"), 0)

    def drawn(self, training: Training, count: int, power: float) -> tuple[Tensor, Tensor]:
        images, target = training._draw(count, power)
        place = (images[:, :, 0, 0] @ torch.tensor([256.0, 1.0])).round().long()
        assert torch.equal(training.data.train.labels[place], target)
        return place, target

    @pytest.mark.parametrize("power", [-1, 0, 0.5, 1])
    def test_classes_come_as_often_as_asked_for(self, power: float, training: Training) -> None:
        wanted = torch.tensor(self.COUNTS).double() ** power
        wanted /= wanted.sum()
        frequency = self.drawn(training, 20_000, power)[1].bincount(minlength=5) / 20_000
        assert ((frequency - wanted).abs() <= 4 * (wanted * (1 - wanted) / 20_000).sqrt()).all()

    def test_images_of_a_class_come_equally_often(self, training: Training) -> None:
        place, target = self.drawn(training, 60_000, 0.0)
        tail = place[target == 3].bincount()[365:377]
        assert (tail - 1000).abs().max() < 5 * math.sqrt(1000) and len(place[target == 0].unique()) == 300

    def test_it_follows_the_seed(self, training: Training) -> None:
        places = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            places.append(self.drawn(training, 50, 0.0)[0])
        assert torch.equal(places[0], places[1]) and not torch.equal(places[0], places[2])

    def test_what_is_drawn_is_augmented_too(self, training: Training) -> None:
        training.data = replace(training.data, pipeline=replace(training.data.pipeline, padding=1))
        images, _ = training._draw(900, 0.0)  # one of them black, all of one pixel
        black = (images == 0).all(1).float().mean()
        assert abs(black.item() - 8 / 9) < 0.06


def test_an_epoch_knows_what_share_of_them_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("digits_lt", [*TINY, "train.epochs=4"])
    data = DATASETS["digits_lt"](config.data, 0)
    network = build_network(config, "linear", data.channels, data.num_classes)
    training = Training(data, network, SGD(network.parameter_groups(), 0.1), config, make_accelerator("fp32"), 0)
    seen: list[Stage] = []

    def compose(method: Method, images: Tensor, target: Tensor, stage: Stage, draw: Any) -> Batch:
        seen.append(stage)
        return Batch(images, target)

    monkeypatch.setattr(type(network.method), "compose", compose)
    for epoch in range(4):
        seen.clear()
        training.epoch(epoch)
        assert {stage.done for stage in seen} == {epoch / 4} and len(seen) == len(training.loader)
        assert torch.equal(seen[0].class_counts, data.class_counts) and seen[0].config == config.loss
