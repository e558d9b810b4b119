"""The head direction and alpha of a trained classifier, from features alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tde_kernels import FusedTDEHead
from tde_trainer import results
from tde_trainer.errors import UserError
from tde_trainer.evaluate import ALPHA_METRIC, Features, accuracy, alpha_grid, sweep
from tde_trainer.feature_file import FeatureFile, load_features
from tde_trainer.posthoc.head_file import FILE, load_head
from tde_trainer.posthoc.weights import classifier_weight, is_published, read_checkpoint
from tde_trainer.schema import SPLITS, HeadConfig
from tde_trainer.trained import TrainedCell


@dataclass(frozen=True)
class Family:
    """What of a head's arguments the user gave; None: as the classifier was trained, or a plain linear one."""

    normalizer: str | None = None
    num_heads: int | None = None
    tau: float | None = None
    gamma: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Of the constructor, without what the user left open."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def arguments(self, trained: FusedTDEHead | None) -> dict[str, Any]:
        """Of the constructor."""
        if trained is None or self.normalizer not in (None, trained.normalizer):
            default: dict[str, Any] = {"normalizer": "linear", "num_heads": 1, "tau": 1.0, "gamma": 0.0}
        else:
            default = {name: getattr(trained, name) for name in ("normalizer", "num_heads", "tau", "gamma", "exponent")}
        return {**default, **self.given}


@dataclass(frozen=True)
class Fitted:
    """A head with its direction and alpha, and where it should go."""

    name: str
    head: FusedTDEHead
    features: FeatureFile
    out: Path

    def summary(self) -> dict[str, Any]:
        """Accuracy without and with TDE, as `results.summarize` has it, on the split `reported`."""
        data, counts = self.features.split(self.reported), self.features.class_counts
        measured = {
            "without_tde": accuracy(self.head, data, counts, alpha=0.0),
            "with_tde": accuracy(self.head, data, counts),
        }
        return results.summarize({self.name: [{"accuracy": measured, "alpha": {"value": float(self.head.alpha)}}]})

    @property
    def reported(self) -> str:
        """The split that accuracies are of: test, or where there is none val."""
        return "test" if "test" in self.features.splits else "val"


def fit_cell(folder: Path, family: Family) -> Fitted:
    """Of a training of a run, whatever its method.

    Raises:
        UserError: it is not finished, its weight is not all that its classifier learned, or it has TDE already.
    """
    found = results.finished_cells(folder)
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} trainings; name one of them, such as {found[0].directory}")
    cell = TrainedCell(found[0])
    if cell.head.class_scale is not None:
        raise UserError(
            f"{folder}: a {cell.head.normalizer} classifier is more than its weight; it can't be taken over"
        )
    features = FeatureFile({split: cell.features(split) for split in SPLITS}, cell.class_counts)
    head = _built(cell.head.weight.detach(), family.arguments(cell.head))
    return _fitted(cell.result.method, head, features, folder / FILE)


def fit_dump(path: Path, weight: Path, key: str | None, family: Family) -> Fitted:
    """Of a file of features and the checkpoint of the network that they come from.

    A checkpoint of the paper's published code brings its own moving average, which is taken over; what is not given of
    the family is then the paper's, as it was trained with that.
    """
    features, content = load_features(path), read_checkpoint(weight)
    width = next(iter(features.splits.values())).x.shape[1]
    if is_published(content):
        try:
            head = FusedTDEHead.load_published(content, **family.given)
        except ValueError as error:
            raise UserError(f"{weight}: {error}") from error
        if tuple(head.weight.shape) != (len(features.class_counts), width):
            raise UserError(
                f"{weight} has a weight of shape {list(head.weight.shape)}, the features of {path} want "
                f"{[len(features.class_counts), width]}"
            )
        return _with_alpha(weight.stem, head, features, path.with_name(FILE))
    head = _built(classifier_weight(content, key, width, len(features.class_counts)), family.arguments(None))
    return _fitted(weight.stem, head, features, path.with_name(FILE))


def sweep_dump(path: Path, head_file: Path, config: HeadConfig) -> dict[str, Any]:
    """Accuracy against alpha on the validation and test features of a file, as `again.sweep_run` has it."""
    features, head = load_features(path), load_head(head_file)
    alphas = alpha_grid(config)
    curves = {
        split: sweep(head, _checked(head, features.split(split)), features.class_counts, alphas)
        for split in ("val", "test")
    }
    return {
        head_file.stem: {
            "alphas": alphas,
            **{
                split: {
                    group: [results.mean_and_spread([point]) for point in points] for group, points in curve.items()
                }
                for split, curve in curves.items()
            },
        }
    }


def _built(weight: Any, arguments: dict[str, Any]) -> FusedTDEHead:
    try:
        return FusedTDEHead.from_weight(weight, **arguments)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _fitted(name: str, head: FusedTDEHead, features: FeatureFile, out: Path) -> Fitted:
    head.fit_direction(features.split("train").x)
    return _with_alpha(name, head, features, out)


def _with_alpha(name: str, head: FusedTDEHead, features: FeatureFile, out: Path) -> Fitted:
    """Every alpha is tried, exactly, on validation data; test data are not seen."""
    val = _checked(head, features.split("val"))
    head.eval().choose_alpha(val.x, val.y, metric=ALPHA_METRIC)
    return Fitted(name, head, features, out)


def _checked(head: FusedTDEHead, data: Features) -> Features:
    if data.x.shape[1] != head.in_features:
        raise UserError(f"features have {data.x.shape[1]} channels, the head wants {head.in_features}")
    return data
