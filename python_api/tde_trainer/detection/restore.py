"""Trained detectors read again, from their checkpoints."""

from __future__ import annotations

from typing import Any

from tde_trainer import checkpoint
from tde_trainer.config import origin
from tde_trainer.detection.detector import build_detector
from tde_trainer.detection.reading import Reader
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import DetectionData
from tde_trainer.device import make_accelerator
from tde_trainer.kinds import DETECTION
from tde_trainer.results import Result


def reader_of(result: Result, config: DetectionConfig, data: DetectionData) -> Reader:
    """The detector of a finished training.

    Raises:
        UserError: its checkpoint is missing, corrupt, or of another detector.
    """
    detector = build_detector(config, result.method, data.class_counts, len(data.train.images), fetch=False)
    checkpoint.load(result.directory, detector, origin=origin(config, result.method, result.values["seed"]))
    accelerator = make_accelerator(config.precision)
    return Reader(detector.to(accelerator.device), data, config, accelerator)


def evaluate_cell(reader: Reader, alpha: float | None) -> dict[str, Any]:
    """A detector's rows of Table 4, by mode: without TDE, and unless ``alpha`` is None with it in either way."""
    measured = {mode: reader.average_precision(reader.data.test, found) for mode, found in reader.in_every_way(alpha)}
    return {**dict.fromkeys(DETECTION.modes), **measured}


def sweep_cell(reader: Reader, alphas: list[float]) -> dict[str, dict[str, list[float]]]:
    """The measures of Table 4 at each of ``alphas``, on test images and on validation images, where there are any."""
    data, curves = reader.data, {}
    for split, truth in (("val", data.val), ("test", data.test)):
        if truth is not None:
            points = [reader.average_precision(truth, reader.found(truth, alpha)) for alpha in alphas]
            curves[split] = {measure: [point[measure] for point in points] for measure in DETECTION.measures}
    return curves
