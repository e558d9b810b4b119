"""From a trained detector to the numbers of Tables 4 and 5: alpha, and average precision in every way of reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from tde_trainer.detection.annotations import Annotations
from tde_trainer.detection.detect import detect
from tde_trainer.detection.detector import read_with
from tde_trainer.detection.evaluation import score
from tde_trainer.detection.images import DetectionImages
from tde_trainer.detection.methods import METHODS
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import DetectionData
from tde_trainer.device import cpu_threads
from tde_trainer.epochs import Cell
from tde_trainer.files import dumps, write_atomic
from tde_trainer.kinds import DETECTION
from tde_trainer.ranks import of_main, together

DETECTIONS = "detections"  # folder of a cell: a submission in LVIS's format for every way of reading


def _row(truth: Annotations, found: list[dict[str, Any]], groups: tuple[str, ...]) -> dict[str, Any]:
    masks, boxes = (score(truth, found, kind, groups) for kind in ("segm", "bbox"))
    of_masks = masks.measures()
    measures = {name: of_masks[name] for name in DETECTION.measures if name != "AP_bbox"}
    return {**measures, "AP_bbox": boxes.measures()["AP"], "per_class": masks.per_class().tolist()}


class Reader:
    """Reads a detector's images, with TDE or without."""

    def __init__(
        self, detector: GeneralizedRCNN, data: DetectionData, config: DetectionConfig, accelerator: Accelerator
    ) -> None:
        self.detector, self.data, self.config, self.accelerator = detector, data, config, accelerator

    def found(self, truth: Annotations, alpha: float, *, exempt: bool = True) -> list[dict[str, Any]]:
        """The submission of a set's images, on the main process."""
        images = DetectionImages(truth, self.data.root, training=False)
        with read_with(self.detector, alpha, exempt=exempt), cpu_threads(self.config.train.threads):
            return detect(self.detector, images, self.accelerator, self.config.data.workers)

    def in_every_way(self, alpha: float | None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The submission of the test images for each mode of `DETECTION`; for plain inference alone without alpha."""
        yield "without_tde", self.found(self.data.test, 0.0)
        if alpha is not None:
            yield "with_tde", self.found(self.data.test, alpha)
            yield "with_tde_everywhere", self.found(self.data.test, alpha, exempt=False)

    def alpha(self) -> dict[str, Any]:
        """The one of the config, or else the one of its alphas by which masks are found best in validation images."""
        given = self.config.head.alpha
        if given is not None:
            return {"value": given, "chosen_by": "config"}
        val = self.data.val
        assert val is not None
        scores = {alpha: self._ap_of_masks(val, self.found(val, alpha)) for alpha in sorted(self.config.head.alphas)}
        best = max(scores, key=lambda alpha: scores[alpha])
        tried = [{"alpha": alpha, "AP": value} for alpha, value in scores.items()]
        return {"value": best, "chosen_by": "AP of masks in the validation images", "tried": tried}

    def _ap_of_masks(self, truth: Annotations, found: list[dict[str, Any]]) -> float:
        return of_main(lambda: score(truth, found, "segm", self.data.groups).measures()["AP"])

    def average_precision(self, truth: Annotations, found: list[dict[str, Any]]) -> dict[str, Any]:
        """The measures of a row of Table 4, and the AP of masks of every class; on every process."""
        return of_main(lambda: _row(truth, found, self.data.groups))


def evaluate_detector(
    detector: GeneralizedRCNN, data: DetectionData, config: DetectionConfig, cell: Cell, accelerator: Accelerator
) -> dict[str, Any]:
    """Everything a cell reports about its trained detector; its submissions are written beside."""
    reader = Reader(detector, data, config, accelerator)
    method = METHODS[cell.method]
    alpha = reader.alpha() if method.has_tde else None
    accuracy: dict[str, Any] = dict.fromkeys(DETECTION.modes)
    for mode, found in reader.in_every_way(None if alpha is None else alpha["value"]):
        with together():
            if accelerator.is_main_process:
                write_atomic(cell.directory / DETECTIONS / f"{mode}.json", dumps(found))
        accuracy[mode] = reader.average_precision(data.test, found)
    return {"alpha": alpha, "accuracy": accuracy}
