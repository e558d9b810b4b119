"""Samplers by class: how often each is drawn, in which order, and that nothing but seed and epoch decides."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from tde_trainer.device import make_accelerator
from tde_trainer.samplers import SAMPLERS, ClassSampler, class_shares, classes_in_turn, images_of
from torch import Tensor
from torch.utils.data import DataLoader

COUNTS = [60, 25, 9, 2]
LABELS = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))[torch.randperm(96, generator=torch.manual_seed(0))]
BY_CLASS = SAMPLERS[1:]


def drawn(name: str, seed: int = 0, epoch: int = 0, epochs: int = 10, labels: Tensor = LABELS) -> list[int]:
    sampler = ClassSampler(name, labels, seed, epochs)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("done", [0.0, 0.25, 1.0])
def test_shares_are_the_formulas(done: float) -> None:
    counts = torch.tensor(COUNTS)
    roots = sum(math.sqrt(n) for n in COUNTS)
    assert class_shares("square_root", counts, done).tolist() == pytest.approx([math.sqrt(n) / roots for n in COUNTS])
    progressive = [(1 - done) * n / 96 + done / 4 for n in COUNTS]
    assert class_shares("progressive", counts, done).tolist() == pytest.approx(progressive)


@pytest.mark.parametrize("name", ["square_root", "progressive"])
def test_classes_are_drawn_by_their_shares(name: str) -> None:
    labels = LABELS.repeat(100)
    found = labels[torch.tensor(drawn(name, epoch=5, labels=labels))].bincount(minlength=4)
    share = class_shares(name, labels.bincount(), 0.5)
    spread = (len(labels) * share * (1 - share)).sqrt()
    assert ((found - len(labels) * share).abs() < 5 * spread).all()


def test_the_class_aware_sampler_takes_every_class_in_turn_four_at_a_time() -> None:
    classes = LABELS[torch.tensor(drawn("class_aware"))]
    assert classes.bincount().tolist() == [24] * 4
    groups = classes.view(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert (groups[:, 0].view(-1, 4).sort().values == torch.arange(4)).all()


def test_the_last_turn_may_be_cut_short() -> None:
    classes = classes_in_turn(3, 26, torch.Generator())
    assert len(classes) == 26 and classes[:24].bincount().tolist() == [8, 8, 8]


@pytest.mark.parametrize("name", BY_CLASS)
def test_an_epoch_has_as_many_images_and_shows_all_of_a_class_before_one_again(name: str) -> None:
    chosen = torch.tensor(drawn(name))
    assert len(chosen) == len(ClassSampler(name, LABELS, 0, 10)) == 96
    for label, count in enumerate(COUNTS):
        times = chosen[LABELS[chosen] == label].bincount(minlength=96)[label == LABELS]
        assert times.max() - times.min() <= 1 and len(times) == count


def test_images_are_of_the_classes_asked_for_also_where_some_are_asked_for_never() -> None:
    classes = torch.tensor([2, 0, 2, 2, 0, 3, 3, 3])
    chosen = images_of(classes, LABELS, torch.Generator())
    assert torch.equal(LABELS[chosen], classes)


@pytest.mark.parametrize("name", BY_CLASS)
def test_seed_and_epoch_decide(name: str) -> None:
    torch.manual_seed(1)
    first = drawn(name, seed=3, epoch=2)
    torch.manual_seed(2)
    assert drawn(name, seed=3, epoch=2) == first
    assert drawn(name, seed=3, epoch=3) != first and drawn(name, seed=4, epoch=2) != first


def test_no_two_seeds_share_an_epoch() -> None:
    assert drawn("class_aware", seed=0, epoch=9, epochs=10) != drawn("class_aware", seed=1, epoch=0, epochs=10)


def test_it_keeps_its_order_in_a_prepared_loader() -> None:
    accelerator: Accelerator = make_accelerator("fp32")
    sampler = ClassSampler("progressive", LABELS, 0, 4)
    loader = accelerator.prepare(DataLoader(torch.arange(96), 8, sampler=sampler))
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        sampler.set_epoch(epoch)
        seen = torch.cat(list(islice(loader, 12))).tolist()
        assert seen == drawn("progressive", epoch=epoch, epochs=4)
