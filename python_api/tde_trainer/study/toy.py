"""Figure 7 of the paper, trained: four ways with a one-dimensional example of two classes, one of them rare.

The backbone scales and shifts the input into two dimensions and the classifier normalises that in one group, so that a
feature is an angle: one dimension again. A feature of one dimension itself would not do, as Eq. 7 and Eq. 8 would see
its sign alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from tde_kernels import FusedTDEHead

HEAD, TAIL = 0, 1
WAYS = {
    "conventional": "conventional",
    "one_stage": "one-stage re-balancing",
    "two_stage": "two-stage re-balancing",
    "tde": "TDE",
}


@dataclass(frozen=True)
class Setting:
    """The two classes and how a classifier is trained; every other number is a default of `FusedTDEHead`.

    ``positive`` features come out of a softplus, as those of a network that ends in a ReLU are positive too; others
    have either sign.
    """

    head_count: int = 1000
    tail_count: int = 20
    val_per_class: int = 50
    test_per_class: int = 5000
    std: float = 0.8
    steps: int = 300
    batch_size: int = 128
    lr: float = 0.02
    positive: bool = True


@dataclass(frozen=True)
class Draw:
    """Inputs ``x [N, 1]`` and classes ``y [N]``."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Classifier:
    """A backbone with four weights, and a normalised classifier without bias."""

    backbone: nn.Sequential
    head: FusedTDEHead

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """``[N, 2]`` of unit norm."""
        return normalize(self.backbone(x))

    @torch.no_grad()
    def margin(self, features: Tensor) -> Tensor:
        """``[N]``, the head class's logit less the tail class's, at the classifier's own alpha."""
        logits: Tensor = self.head(features)
        return logits[:, HEAD] - logits[:, TAIL]

    @torch.no_grad()
    def normal(self) -> Tensor:
        """``[2]``: the margin without TDE is the product of a feature of unit norm with it."""
        logits: Tensor = self.head(torch.eye(2), alpha=0.0)
        return logits[:, HEAD] - logits[:, TAIL]

    def direct(self, features: Tensor) -> Tensor:
        """Features without their projection on the head direction: what Eq. 8 leaves for the classifier."""
        direction = self.head.head_direction
        return features - self.head.alpha * (features @ direction)[:, None] * direction


@dataclass(frozen=True)
class Trained:
    """The four ways by their names in `WAYS`, and what they are tested on."""

    ways: dict[str, Classifier]
    test: Draw


def draw(head_count: int, tail_count: int, std: float) -> Draw:
    """The head class around +1, the tail class around -1."""
    y = torch.tensor([HEAD] * head_count + [TAIL] * tail_count)
    return Draw((1.0 - 2.0 * y + std * torch.randn(len(y)))[:, None], y)


def simulate(setting: Setting, seed: int) -> Trained:
    """Draw the data of a seed and train all four ways from one initialisation; torch's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train = draw(setting.head_count, setting.tail_count, setting.std)
        val = draw(setting.val_per_class, setting.val_per_class, setting.std)
        test = draw(setting.test_per_class, setting.test_per_class, setting.std)
        untrained = _untrained(setting.positive)
        conventional, one_stage = copy.deepcopy(untrained), copy.deepcopy(untrained)
        _train(conventional, train, setting, balanced=False)
        _train(one_stage, train, setting, balanced=True)
        two_stage = copy.deepcopy(conventional)
        two_stage.backbone.requires_grad_(False)
        _train(two_stage, train, setting, balanced=True)
        tde = copy.deepcopy(conventional)
        tde.head.choose_alpha(tde.features(val.x), val.y)
    return Trained(dict(zip(WAYS, (conventional, one_stage, two_stage, tde), strict=True)), test)


def _untrained(positive: bool) -> Classifier:
    """One rising feature for the head class, one falling for the tail class.

    From random weights some seeds never leave the state where all features lie at one angle.
    """
    affine = nn.Linear(1, 2)
    head = FusedTDEHead(2, 2, num_heads=1, alpha=0.0)
    affine.weight.data = torch.tensor([[1.0], [-1.0]])
    affine.bias.data = torch.zeros(2)
    head.weight.data = torch.eye(2)
    return Classifier(nn.Sequential(affine, nn.Softplus() if positive else nn.Identity()), head)


def _train(classifier: Classifier, data: Draw, setting: Setting, *, balanced: bool) -> None:
    """SGD on what is not frozen; ``balanced`` draws both classes equally often, the same few tail samples again."""
    modules = (classifier.backbone, classifier.head)
    free = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    optimizer = Adam(free, setting.lr)
    schedule = CosineAnnealingLR(optimizer, setting.steps)
    chance = 1 / torch.bincount(data.y)[data.y] if balanced else torch.ones(len(data.y))
    classifier.head.train()
    for _ in range(setting.steps):
        batch = torch.multinomial(chance, setting.batch_size, replacement=True)
        optimizer.zero_grad()
        classifier.head.loss(classifier.backbone(data.x[batch]), data.y[batch]).backward()
        optimizer.step()
        schedule.step()
    classifier.head.eval()


def measure(trained: Trained) -> dict[str, Any]:
    """Accuracy and boundary of each way, alpha, and how far TDE reaches.

    Returns:
        ``ways``: of each, ``accuracy`` on the balanced test draw, ``head`` and ``tail`` recall, ``boundary`` as an
        input, None without one; ``alpha``; ``boundary_projection``: the cosine between the head direction and the
        feature on the conventional boundary, None without one. Where it is not positive, subtracting the projection
        moves the boundary away from the head class.
    """
    tde = trained.ways["tde"]
    at = boundary(trained.ways["conventional"])
    on_boundary = None if at is None else (tde.features(torch.tensor([[at]])) @ tde.head.head_direction).item()
    ways = {name: _measure_way(way, trained.test) for name, way in trained.ways.items()}
    return {"ways": ways, "alpha": tde.head.alpha.item(), "boundary_projection": on_boundary}


def _measure_way(way: Classifier, test: Draw) -> dict[str, float | None]:
    is_head = way.margin(way.features(test.x)) > 0
    head = is_head[test.y == HEAD].double().mean().item()
    tail = (~is_head[test.y == TAIL]).double().mean().item()
    return {"accuracy": (head + tail) / 2, "head": head, "tail": tail, "boundary": boundary(way)}


def boundary(way: Classifier) -> float | None:
    """The input where the decision changes, to a thousandth; None where it does not within -5 .. 5."""
    x = torch.linspace(-5, 5, 10_001)[:, None]
    is_head = way.margin(way.features(x)) > 0
    changes = (is_head[1:] != is_head[:-1]).nonzero()
    return x[changes[0]].item() if len(changes) == 1 else None


def angles(features: Tensor, normal: Tensor) -> Tensor:
    """``[N]`` degrees from the boundary with that normal, which is at 0, the head class's side positive."""
    across = features @ normal
    along = features @ torch.stack([-normal[1], normal[0]])
    # A line has two ends; the boundary is the one that the features pass.
    along = along * along[across.abs().argmin()].sign()
    return torch.atan2(across, along).rad2deg()
