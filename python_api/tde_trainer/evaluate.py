"""From features to the numbers of the tables: alpha, accuracies, the sweep, the norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tde_kernels import FusedTDEHead
from tde_trainer.data import Images, Pipeline, make_loader
from tde_trainer.data.base import UNREADABLE
from tde_trainer.metrics import GROUPS, group_accuracy, per_class_accuracy
from tde_trainer.network import Network
from tde_trainer.schema import HeadConfig

ALPHA_METRIC = "mean_per_class"


@dataclass(frozen=True)
class Features:
    """A data set as the network sees it: ``x [N, D]`` and classes ``y [N]``."""

    x: Tensor
    y: Tensor


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # one pass is not worth compiling for
def extract(
    network: torch.nn.Module, images: Images, pipeline: Pipeline, batch_size: int, accelerator: Accelerator
) -> Features:
    """Features of every image that can be read, on every rank; each computes its part of a batch."""
    ranks = accelerator.num_processes
    divisible = -(-batch_size // ranks) * ranks
    loader = accelerator.prepare(make_loader(images.evaluated(), divisible))
    return _joined(accelerator.gather_for_metrics(part) for part in _batches(network, loader, pipeline))


@torch.no_grad()
def extract_alone(
    network: torch.nn.Module, images: Images, pipeline: Pipeline, batch_size: int, device: torch.device
) -> Features:
    """The same on this process, whatever the others do, by a network on ``device``."""
    loader = ((x.to(device), y.to(device)) for x, y in make_loader(images.evaluated(), batch_size))
    return _joined(_batches(network, loader, pipeline))


def _batches(
    network: torch.nn.Module, loader: Iterable[tuple[Tensor, Tensor]], pipeline: Pipeline
) -> Iterator[tuple[Tensor, Tensor]]:
    network.eval()
    for images, target in loader:
        yield network(pipeline(images, training=False)).float(), target


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> Features:
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    readable = y != UNREADABLE
    return Features(x[readable], y[readable])


def alpha_grid(config: HeadConfig) -> list[float]:
    """The alphas of a sweep, ``0 .. alpha_max``, as short decimals."""
    return [round(a, 6) for a in torch.linspace(0, config.alpha_max, config.alpha_steps, dtype=torch.float64).tolist()]


def set_alpha(head: FusedTDEHead, val: Features, config: HeadConfig) -> dict[str, Any]:
    """Take alpha from the config, or else choose it on validation data; says which. Sees no test data."""
    if config.alpha is not None:
        head.alpha = config.alpha
        return {"value": config.alpha, "chosen_by": "config"}
    value = head.choose_alpha(val.x, val.y, alpha_grid(config), metric=ALPHA_METRIC)
    return {"value": float(value), "chosen_by": f"{ALPHA_METRIC} accuracy on the validation split"}


@torch.no_grad()
def accuracy(head: FusedTDEHead, data: Features, class_counts: Tensor, alpha: float | None = None) -> dict[str, Any]:
    """Accuracies of the head in evaluation mode at ``alpha`` (the head's own if None; 0: without TDE)."""
    logits = head(data.x) if alpha is None else head(data.x, alpha=alpha)
    per_class = per_class_accuracy(logits.argmax(-1), data.y, len(class_counts))
    return {**group_accuracy(per_class, class_counts), "per_class": per_class.tolist()}


@torch.no_grad()
def sweep(head: FusedTDEHead, data: Features, class_counts: Tensor, alphas: list[float]) -> dict[str, list[float]]:
    """Accuracy of every group in `GROUPS` at every alpha (Figure 4 of the paper)."""
    curve: dict[str, list[float]] = {group: [] for group in GROUPS}
    for predicted in head.alpha_sweep(data.x, alphas):
        point = group_accuracy(per_class_accuracy(predicted, data.y, len(class_counts)), class_counts)
        for group in GROUPS:
            curve[group].append(point[group])
    return curve


def feature_norms(data: Features, num_classes: int) -> list[float]:
    """Mean norm of the feature vectors of each class (Figure 1b of the paper); NaN for a class without samples."""
    norms = data.x.float().norm(dim=-1).double()
    totals = torch.zeros(num_classes, dtype=torch.float64, device=norms.device).index_add_(0, data.y, norms)
    return (totals / data.y.bincount(minlength=num_classes)).tolist()


def weight_norms(head: FusedTDEHead) -> list[float]:
    """Norm of each class weight (Figure 6 of the paper)."""
    norms: list[float] = head.weight.detach().float().norm(dim=-1).tolist()
    return norms


def evaluate(
    network: Network, val: Features, test: Features, class_counts: Tensor, config: HeadConfig
) -> dict[str, Any]:
    """Everything a cell reports about its trained network."""
    head, alphas = network.head.eval(), alpha_grid(config)
    result: dict[str, Any] = {
        "alpha": None,
        "accuracy": {"without_tde": accuracy(head, test, class_counts, alpha=0.0), "with_tde": None},
        "sweep": None,
        "feature_norm": feature_norms(test, len(class_counts)),
        "weight_norm": weight_norms(head),
    }
    if network.method.has_tde:
        result["alpha"] = set_alpha(head, val, config)
        result["accuracy"]["with_tde"] = accuracy(head, test, class_counts)
        # The test curve is for display; alpha is already fixed.
        curves = {name: sweep(head, data, class_counts, alphas) for name, data in (("val", val), ("test", test))}
        result["sweep"] = {"alphas": alphas, **curves}
    return result
