"""Accuracy per class and per shot, norms, and the choice of alpha."""

from __future__ import annotations

import math

import pytest
import torch
from tde_trainer.evaluate import Features, accuracy, alpha_grid, evaluate, feature_norms, set_alpha, sweep
from tde_trainer.methods import METHODS
from tde_trainer.metrics import group_accuracy, per_class_accuracy
from tde_trainer.network import Network
from tde_trainer.schema import HeadConfig, LossConfig

from tde_kernels import FusedTDEHead

COUNTS = torch.tensor([200, 50, 5])


@pytest.fixture
def head() -> FusedTDEHead:
    """A head whose direction favours class 0, so that TDE changes its predictions."""
    torch.manual_seed(0)
    head = METHODS["deconfound"].build_head(8, 3, HeadConfig(), LossConfig())
    head.train()(torch.randn(64, 8) + head.weight[0].detach() * 10)
    return head.eval()


def features(seed: int, n: int = 90) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(n, 8, generator=generator), torch.arange(n) % 3)


def test_accuracy_per_class_by_hand() -> None:
    predicted, target = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 1])
    assert per_class_accuracy(predicted, target, 2 + 1)[:2].tolist() == pytest.approx([2 / 3, 1 / 2])


def test_a_class_without_samples_is_nan_and_does_not_count() -> None:
    per_class = per_class_accuracy(torch.tensor([0, 1]), torch.tensor([0, 0]), 3)
    assert per_class[0] == 0.5 and per_class[1:].isnan().all()
    assert group_accuracy(per_class, COUNTS)["overall"] == 0.5


def test_an_empty_group_is_nan_not_zero() -> None:
    groups = group_accuracy(torch.tensor([0.2, 0.4]).double(), torch.tensor([101, 100]))
    assert groups["many"] == pytest.approx(0.2) and groups["medium"] == pytest.approx(0.4)
    assert math.isnan(groups["few"]) and groups["overall"] == pytest.approx(0.3)


def test_shots_are_cut_at_20_and_100() -> None:
    groups = group_accuracy(torch.tensor([1.0, 0.5, 0.25, 0.0]).double(), torch.tensor([101, 100, 20, 19]))
    assert (groups["many"], groups["medium"], groups["few"]) == (1.0, 0.375, 0.0)


def test_feature_norms_are_means_per_class() -> None:
    data = Features(torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 2, 2]))
    norms = feature_norms(data, 3)
    assert norms[0] == 5.0 and math.isnan(norms[1]) and norms[2] == 1.5


def test_the_sweep_agrees_with_inference_at_every_alpha(head: FusedTDEHead) -> None:
    data, alphas = features(1), alpha_grid(HeadConfig(alpha_max=2, alpha_steps=5))
    curve = sweep(head, data, COUNTS, alphas)
    for index, alpha in enumerate(alphas):
        assert accuracy(head, data, COUNTS, alpha)["overall"] == pytest.approx(curve["overall"][index])
    assert len(set(curve["overall"])) > 1  # alpha matters here, so the comparison means something


def test_alpha_is_the_best_on_validation_data(head: FusedTDEHead) -> None:
    val, config = features(2), HeadConfig()
    chosen = set_alpha(head, val, config)["value"]
    curve = sweep(head, val, COUNTS, alpha_grid(config))["overall"]
    assert max(curve) > curve[0] and float(head.alpha) == pytest.approx(chosen)
    assert curve[alpha_grid(config).index(round(chosen, 6))] == pytest.approx(max(curve))


def test_an_alpha_in_the_config_is_taken_as_it_is(head: FusedTDEHead) -> None:
    assert set_alpha(head, features(2), HeadConfig(alpha=1.25)) == {"value": 1.25, "chosen_by": "config"}
    assert float(head.alpha) == 1.25


def test_alpha_does_not_depend_on_the_test_data(head: FusedTDEHead) -> None:
    network, val = Network(torch.nn.Identity(), torch.nn.Identity(), head, METHODS["deconfound"]), features(2)
    results = [evaluate(network, val, test, COUNTS, HeadConfig()) for test in (features(3), features(4))]
    assert results[0]["accuracy"] != results[1]["accuracy"]
    assert results[0]["alpha"] == results[1]["alpha"]
    shuffled = Features(val.x, val.y.roll(1))
    assert evaluate(network, shuffled, features(3), COUNTS, HeadConfig())["alpha"] != results[0]["alpha"]
