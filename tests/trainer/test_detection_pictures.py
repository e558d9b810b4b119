"""Pictures of detections, and the plot of average precision per class."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from tde_trainer.detection.class_plot import class_plot
from tde_trainer.detection.pictures import (
    FREQUENCY_COLOURS,
    Classes,
    Row,
    _free_place,
    draw_detections,
    is_right,
)
from tde_trainer.plots import png
from torch import Tensor

CLASSES = Classes(["red_star", "red_ring", "blue_cross"], ["f", "c", "r"])
TRUTH = {"boxes": torch.tensor([[10.0, 10, 30, 30], [40, 35, 60, 60]]), "labels": torch.tensor([1, 3])}


def found(boxes: list[list[float]], labels: list[int], scores: list[float], **masks: Tensor) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores),
        **masks,
    }


MASKS = torch.zeros(3, 1, 64, 64)
MASKS[0, 0, 12:29, 12:29] = 0.9
FOUND = found([[11, 11, 30, 31], [41, 35, 60, 60], [0, 0, 5, 5]], [1, 2, 3], [0.9, 0.7, 0.1], masks=MASKS)
NOTHING = found([], [], [], masks=torch.zeros(0, 1, 64, 64))
ROW = Row(torch.full((3, 64, 64), 128, dtype=torch.uint8), TRUTH, {"without TDE": FOUND, "with TDE": NOTHING})


def boxes(figure: Figure, panel: int) -> list[Rectangle]:
    return [patch for patch in figure.axes[panel].patches if isinstance(patch, Rectangle)]


def texts(figure: Figure, panel: int) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].texts]


class TestDetections:
    """A row for each image, a column for the truth and each way of detecting."""

    def test_the_picture_has_a_size(self) -> None:
        width, height = Image.open(BytesIO(png(draw_detections([ROW, ROW], CLASSES)))).size
        assert width > 1000 and 0.6 < height / width < 0.9

    def test_panels_are_images_by_columns(self) -> None:
        figure = draw_detections([ROW, ROW], CLASSES)
        titles = [axes.get_title() for axes in figure.axes]
        assert titles == ["ground truth", "without TDE", "with TDE", "", "", ""]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend[:3] == ["frequent in training", "common in training", "rare in training"]

    def test_what_is_unsure_is_not_shown(self) -> None:
        for threshold, shown in ((0.5, 2), (0.05, 3), (0.7, 2), (0.95, 0)):
            figure = draw_detections([ROW], CLASSES, threshold=threshold)
            assert [len(boxes(figure, panel)) for panel in range(3)] == [2, shown, 0]

    def test_labels_say_class_and_score_and_whether_they_are_right(self) -> None:
        figure = draw_detections([ROW], CLASSES)
        assert texts(figure, 0) == ["red star", "blue cross"]
        assert texts(figure, 1) == ["✗ red ring 0.70", "✓ red star 0.90"]  # the surest is drawn last
        wrong, right = boxes(figure, 1)
        assert right.get_linestyle() in ("-", "solid") and wrong.get_linestyle() not in ("-", "solid")
        assert (right.get_xy(), right.get_width(), right.get_height()) == ((11, 11), 19, 20)

    def test_colours_tell_the_frequency(self) -> None:
        edges = [box.get_edgecolor()[:3] for box in boxes(draw_detections([ROW], CLASSES), 0)]
        assert edges == [to_rgb(FREQUENCY_COLOURS["f"]), to_rgb(FREQUENCY_COLOURS["r"])]

    def test_the_mask_is_tinted_where_it_is(self) -> None:
        _, _, tint = (image.get_array() for image in draw_detections([ROW], CLASSES).axes[1].images)
        assert np.array_equal(np.asarray(tint)[:, :, 3] > 0, MASKS[0, 0].numpy() > 0.5)

    def test_masks_may_be_absent(self) -> None:
        bare = {name: value for name, value in FOUND.items() if name != "masks"}
        figure = draw_detections([Row(ROW.image, TRUTH, {"found": bare})], CLASSES)
        assert len(boxes(figure, 1)) == 2 and len(figure.axes[1].images) == 1

    def test_no_object_makes_every_detection_wrong(self) -> None:
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        assert texts(draw_detections([Row(ROW.image, nothing, {"found": FOUND})], CLASSES), 1)[0][0] == "✗"

    @pytest.mark.parametrize(
        ("box", "label", "right"),
        [
            ([10.0, 10, 30, 30], 1, True),
            ([10.0, 10, 30, 30], 3, False),
            ([10.0, 10, 30, 20], 1, True),  # an IoU of a half
            ([10.0, 10, 30, 19.9], 1, False),
        ],
    )
    def test_right_is_class_and_place(self, box: list[float], label: int, right: bool) -> None:
        assert is_right(found([box], [label], [1.0]), TRUTH).tolist() == [right]

    @pytest.mark.parametrize("rows", [[], [ROW, Row(ROW.image, TRUTH, {"without TDE": FOUND})]])
    def test_rows_of_other_columns_are_refused(self, rows: list[Row]) -> None:
        with pytest.raises(ValueError, match="rows of the same columns"):
            draw_detections(rows, CLASSES)

    def test_labels_keep_off_each_other_and_inside(self) -> None:
        size, image = (30.0, 6.0), (64.0, 64.0)
        over = _free_place([20, 20, 40, 40], size, image, [])
        assert over == (20, 14, 50, 20)
        assert _free_place([20, 20, 40, 40], size, image, [over]) == (20, 40, 50, 46)
        for box in ([50, 0, 60, 64], [-3, -3, 9, 9]):
            left, upper, right, lower = _free_place(box, size, image, [])
            assert left >= 0 and upper >= 0 and right <= 64 and lower <= 64


COUNTS = (0, 4, 10, 11, 100, 101, 300)
AP = {"linear": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "cosine": [0.0, 0.1, None, math.nan, 0.4, 0.9, 0.6]}
NAMES = tuple(f"class_{number}" for number in range(7))


class TestClassPlot:
    """Average precision per class against training images."""

    @pytest.fixture
    def figure(self) -> Figure:
        figure = class_plot(COUNTS, AP, NAMES)
        assert Image.open(BytesIO(png(figure))).size[0] > 1000
        return figure

    def test_every_defined_class_has_a_mark(self, figure: Figure) -> None:
        linear, cosine = (np.ma.getdata(marks.get_offsets()) for marks in figure.axes[0].collections)
        assert linear[:, 1].tolist() == pytest.approx([0, 10, 20, 30, 40, 50, 60])
        assert linear[1:, 0].tolist() == list(COUNTS[1:]) and 0 < linear[0, 0] < 1
        assert np.isfinite(cosine[:, 1]).sum() == 5

    def test_lines_are_means_over_rare_common_and_frequent_classes(self, figure: Figure) -> None:
        heights = [float(np.asarray(line.get_ydata())[0]) for line in figure.axes[0].lines]
        assert heights == pytest.approx([10, 35, 55, 5, 40, 75])

    def test_regions_and_the_greatest_change_are_named(self, figure: Figure) -> None:
        assert [text.get_text() for text in figure.axes[0].texts] == ["rare", "common", "frequent", "class 5"]

    @pytest.mark.parametrize("rows", [{}, {"linear": [0.5]}])
    def test_rows_of_another_length_are_refused(self, rows: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="rows and names of 7 classes"):
            class_plot(COUNTS, rows, NAMES)
