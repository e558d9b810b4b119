"""Schedules: what they set, what beats them, and the learning rate that comes of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tde_trainer.config import load_config
from tde_trainer.epochs import learning_rate
from tde_trainer.errors import UserError

RECIPES = pytest.mark.parametrize("recipe", ["cifar10_lt", "cifar100_lt"])


@RECIPES
def test_the_papers_schedule_is_the_default(recipe: str) -> None:
    config = load_config(recipe)
    train = config.train
    assert (config.schedule, train.epochs, train.batch_size, train.warmup_epochs) == ("paper", 90, 512, 0)
    assert (train.decay, train.lr, train.momentum, train.weight_decay) == ("cosine", 0.2, 0.9, 5e-4)
    assert (config.model.name, config.model.branches) == ("resnet32", 1)


@RECIPES
def test_the_published_schedule_is_the_one_of_the_authors_code(recipe: str) -> None:
    config = load_config(recipe, ["schedule=published"])
    train = config.train
    assert (config.schedule, train.epochs, train.batch_size, train.warmup_epochs) == ("published", 200, 256, 5)
    assert (train.decay, train.milestones, train.step_factor) == ("steps", [0.6, 0.8], 0.01)
    assert (train.lr, train.weight_decay, config.model.branches) == (0.2, 5e-4, 2)


def test_an_override_beats_the_schedule() -> None:
    config = load_config("cifar10_lt", ["train.epochs=3", "schedule=published", "model.branches=1"])
    assert (config.train.epochs, config.model.branches, config.train.batch_size) == (3, 1, 256)


def test_an_unknown_schedule_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown schedule 'publshed'; did you mean 'published'\?"):
        load_config("cifar10_lt", ["schedule=publshed"])


def test_a_recipe_without_schedules_has_none_to_choose() -> None:
    with pytest.raises(UserError, match="recipe digits_lt has no schedules to choose from"):
        load_config("digits_lt", ["schedule=paper"])


def test_schedules_that_are_no_mapping_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("schedules: 3\n")
    with pytest.raises(UserError, match="has no schedules to choose from"):
        load_config(str(path), ["schedule=short"])


def test_a_recipe_of_ones_own_may_have_schedules(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 0.3, epochs: 9}\nschedules: {short: {train: {epochs: 2}}}\n")
    assert load_config(str(path)).train.epochs == 9
    config = load_config(str(path), ["schedule=short"])
    assert (config.train.epochs, config.train.lr, config.schedule) == (2, 0.3, "short")


def test_what_a_schedule_sets_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("schedule: short\nschedules: {short: {train: {epoch: 2}}}\n")
    with pytest.raises(UserError, match=r"unknown key 'train.epoch'; did you mean 'train.epochs'\?"):
        load_config(str(path))


def test_the_papers_learning_rate_is_a_cosine_from_its_first_step_on() -> None:
    config, steps = load_config("cifar10_lt").train, 25  # 12,406 images by 512
    total = 90 * steps
    assert learning_rate(0, steps, config) == 0.2
    assert learning_rate(total // 3, steps, config) == pytest.approx(0.15)
    assert learning_rate(total // 2, steps, config) == pytest.approx(0.1)
    rates = [learning_rate(step, steps, config) for step in range(total)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] == pytest.approx(0.2 * (math.pi / total) ** 2 / 4, rel=1e-3)


@pytest.mark.parametrize("steps", [7, 49, 43, 100])
def test_the_published_learning_rate_warms_up_and_steps_down_twice(steps: int) -> None:
    config = load_config("cifar10_lt", ["schedule=published"]).train
    for step in range(5 * steps):
        assert learning_rate(step, steps, config) == pytest.approx(0.2 * (step + 1) / (5 * steps))
    for first, last, rate in ((5, 120, 0.2), (120, 160, 2e-3), (160, 200, 2e-5)):
        for step in (first * steps, first * steps + 1, last * steps - 1):
            assert learning_rate(step, steps, config) == pytest.approx(rate)


def test_a_warm_up_that_ends_within_a_step_does_not_pass_the_full_rate() -> None:
    config = load_config("cifar10_lt", ["train.warmup_epochs=0.25", "train.epochs=3"]).train
    rates = [learning_rate(step, 10, config) for step in range(30)]
    assert rates[:2] == pytest.approx([0.2 / 2.5, 0.4 / 2.5]) and rates[2] == max(rates) == 0.2


def test_a_training_shorter_than_its_warm_up_ends_at_the_full_rate() -> None:
    config = load_config("cifar10_lt", ["schedule=published", "train.epochs=3"]).train
    assert learning_rate(3 * 10 - 1, 10, config) == pytest.approx(0.2)
