"""Losses of a detector's classifiers, against loops in float64 and torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tde_trainer.detection.losses import equalization_loss, softmax_equalization_loss
from tde_trainer.detection.methods import METHODS, BoxClassification
from tde_trainer.detection.schema import DetectionHeadConfig, DetectionLossConfig
from torch import Tensor
from torch.nn import functional as nnf

N, C, D = 40, 6, 8
LABELS = {
    "mixed": torch.arange(N) % (C + 1),
    "background alone": torch.zeros(N, dtype=torch.int64),
    "foreground alone": 1 + torch.arange(N) % C,
}
RARE = {
    "some": torch.tensor([False, True, False, False, True, True]),
    "none": torch.zeros(C, dtype=torch.bool),
    "all": torch.ones(C, dtype=torch.bool),
}


@pytest.fixture(params=LABELS)
def labels(request: pytest.FixtureRequest) -> Tensor:
    return LABELS[request.param]


@pytest.fixture(params=RARE)
def rare(request: pytest.FixtureRequest) -> Tensor:
    return RARE[request.param]


def drawn(classes: int) -> Tensor:
    return (3 * torch.randn(N, classes, dtype=torch.float64)).requires_grad_()


def assert_same(ours: Tensor, theirs: Tensor, logits: Tensor, **tolerance: float) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **tolerance)
    mine, others = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, others, **tolerance)


def looped_eql(logits: Tensor, labels: Tensor, rare: Tensor) -> Tensor:
    """EQL, a term at a time."""
    total = logits.new_zeros(())
    for z, label in zip(logits, labels.tolist(), strict=True):
        for j in range(C):
            y, foreground = float(label == j + 1), float(label > 0)
            weight = 1 - foreground * float(rare[j]) * (1 - y)
            p = 1 / (1 + torch.exp(-z[j]))
            total = total - weight * (y * p.log() + (1 - y) * (1 - p).log())
    return total / len(labels)


class TestEqualization:
    """EQL."""

    def test_it_is_its_definition(self, labels: Tensor, rare: Tensor) -> None:
        logits = drawn(C)
        assert_same(equalization_loss(logits, labels, rare), looped_eql(logits, labels, rare), logits)

    def test_without_rare_classes_it_is_the_cross_entropy_of_sigmoids(self, labels: Tensor) -> None:
        logits = drawn(C)
        target = nnf.one_hot(labels, C + 1)[:, 1:].double()
        plain = nnf.binary_cross_entropy_with_logits(logits, target, reduction="sum") / N
        assert_same(equalization_loss(logits, labels, RARE["none"]), plain, logits)

    def test_other_classes_spare_the_rare_and_background_does_not(self) -> None:
        logits, labels, rare = drawn(C), LABELS["mixed"], RARE["some"]
        (gradient,) = torch.autograd.grad(equalization_loss(logits, labels, rare), logits)
        others = (labels > 0)[:, None] & (nnf.one_hot(labels, C + 1)[:, 1:] == 0) & rare
        assert torch.equal(gradient == 0, others)

    def test_far_logits_stay_finite(self) -> None:
        logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
        loss = equalization_loss(logits, torch.tensor([2]), torch.tensor([False, False]))
        assert loss.item() == pytest.approx(2e4)

    def test_no_box_is_no_loss(self, rare: Tensor) -> None:
        empty = torch.empty(0, dtype=torch.int64)
        assert equalization_loss(torch.empty(0, C, requires_grad=True), empty, rare).item() == 0


def looped_softmax_eql(logits: Tensor, labels: Tensor, rare: Tensor, gone: Tensor) -> Tensor:
    """Softmax EQL, a term at a time, of what was drawn."""
    total = logits.new_zeros(())
    for z, label, drawn_for in zip(logits, labels.tolist(), gone.tolist(), strict=True):
        denominator = logits.new_zeros(())
        for j in range(C + 1):
            weight = 1 - float(j > 0 and rare[j - 1] and j != label and drawn_for[j])
            denominator = denominator + weight * z[j].exp()
        total = total + denominator.log() - z[label]
    return total / len(labels)


class TestSoftmaxEqualization:
    """Softmax EQL; it computes in float32."""

    @pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
    def test_it_is_its_definition(self, beta: float, labels: Tensor, rare: Tensor) -> None:
        logits = drawn(C + 1)
        state = torch.get_rng_state()
        ours = softmax_equalization_loss(logits, labels, rare, beta)
        torch.set_rng_state(state)
        gone = torch.rand(N, C + 1) < beta
        assert_same(ours, looped_softmax_eql(logits, labels, rare, gone), logits, rtol=2e-6, atol=1e-6)

    @pytest.mark.parametrize(("beta", "which"), [(0.0, "some"), (0.9, "none")])
    def test_where_none_may_go_it_is_cross_entropy(self, beta: float, which: str, labels: Tensor) -> None:
        logits = drawn(C + 1)
        ours = softmax_equalization_loss(logits, labels, RARE[which], beta)
        assert_same(ours, nnf.cross_entropy(logits, labels), logits, rtol=2e-6, atol=1e-6)

    def test_a_class_goes_as_often_as_beta_says(self) -> None:
        labels, rare = torch.zeros(20_000, dtype=torch.int64), torch.tensor([True])
        logits = torch.zeros(20_000, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(softmax_equalization_loss(logits, labels, rare, 0.9), logits)
        assert (gradient[:, 1] == 0).double().mean().item() == pytest.approx(0.9, abs=5 * math.sqrt(0.09 / 20_000))

    def test_no_box_is_no_loss(self, rare: Tensor) -> None:
        empty = torch.empty(0, dtype=torch.int64)
        assert softmax_equalization_loss(torch.empty(0, C + 1, requires_grad=True), empty, rare, 0.9).item() == 0


def classification(method: str, **loss: Any) -> BoxClassification:
    head = DetectionHeadConfig()
    return BoxClassification(METHODS[method], head, DetectionLossConfig(**loss), RARE["some"])


class TestOfClassifiers:
    """What a recipe's method and loss come to."""

    @pytest.mark.parametrize("method", ["linear", "cosine", "capsule", "deconfound"])
    def test_cross_entropy_is_torchs_on_the_logits(self, method: str, labels: Tensor) -> None:
        boxes, x = classification(method), torch.randn(N, D, requires_grad=True)
        predictor = boxes.predictor(D)
        assert predictor.head.num_classes == C + 1
        logits = predictor.eval().requires_grad_(True).head(x, alpha=0.0)  # log-probabilities: of the same softmax
        ours = boxes.classification_loss(predictor.train(), x, labels)
        assert_same(ours, nnf.cross_entropy(logits, labels), x, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("exponent", [0.0, 1.5, 2.0])
    @pytest.mark.parametrize("method", ["linear", "deconfound"])
    def test_focal_is_its_definition(self, method: str, exponent: float, labels: Tensor) -> None:
        boxes, x = classification(method, name="focal", focal_exponent=exponent), torch.randn(N, D, requires_grad=True)
        predictor = boxes.predictor(D)
        log_p = predictor.eval().head(x, alpha=0.0).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        ours = boxes.classification_loss(predictor.train(), x, labels)
        assert_same(ours, (-((1 - log_p.exp()) ** exponent) * log_p).mean(), x, rtol=1e-5, atol=1e-6)

    def test_eql_has_no_class_for_the_background(self) -> None:
        boxes, x, labels = classification("eql"), torch.randn(N, D), LABELS["mixed"]
        predictor = boxes.predictor(D)
        assert (predictor.head.num_classes, predictor.head.background_index) == (C, None)
        logits = x @ predictor.head.weight.T
        loss = boxes.classification_loss(predictor, x, labels)
        torch.testing.assert_close(loss, equalization_loss(logits, labels, RARE["some"]))
        scores = predictor.eval()(x)[0]
        torch.testing.assert_close(boxes.probabilities(scores), logits.sigmoid())

    def test_a_recipes_loss_beats_the_methods_own(self) -> None:
        boxes, x, labels = classification("deconfound", name="softmax_eql", softmax_eql_beta=1.0), torch.randn(N, D), 4
        predictor = boxes.predictor(D)
        logits = predictor.eval().head(x, alpha=0.0)
        target = torch.full((N,), labels)
        wanted = softmax_equalization_loss(logits, target, RARE["some"], 1.0)
        torch.testing.assert_close(boxes.classification_loss(predictor.train(), x, target), wanted)
        assert not torch.allclose(wanted, nnf.cross_entropy(logits, target))

    @pytest.mark.parametrize("loss", ["cross_entropy", "focal", "eql", "softmax_eql"])
    def test_the_direction_takes_in_the_foreground_alone(self, loss: str) -> None:
        boxes, x, labels = classification("deconfound", name=loss), torch.randn(N, D), LABELS["mixed"]
        head = (predictor := boxes.predictor(D)).head
        boxes.classification_loss(predictor, x, labels)
        torch.testing.assert_close(head.ema, x[labels > 0].mean(0))
        before = head.ema.clone()
        assert boxes.classification_loss(predictor, x, LABELS["background alone"]).isfinite()
        assert torch.equal(head.ema, before) and head.num_updates == 1

    @pytest.mark.parametrize("loss", ["cross_entropy", "focal", "eql", "softmax_eql"])
    def test_no_box_is_no_loss(self, loss: str) -> None:
        boxes, none = classification("deconfound", name=loss), torch.empty(0, dtype=torch.int64)
        predictor = boxes.predictor(D)
        value = boxes.classification_loss(predictor, torch.empty(0, D), none)
        value.backward()
        assert value.item() == 0 and predictor.head.num_updates == 0

    def test_probabilities_leave_the_background_out(self) -> None:
        boxes, x = classification("deconfound"), torch.randn(N, D)
        predictor = boxes.predictor(D).eval()
        scores = predictor(x)[0]
        torch.testing.assert_close(boxes.probabilities(scores), scores.exp()[:, 1:])
