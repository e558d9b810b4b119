"""From images to a submission in LVIS's format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.ops import box_convert

from tde_trainer.detection.images import DetectionImages, Example, collate
from tde_trainer.detection.masks import encode
from tde_trainer.progress import watched
from tde_trainer.ranks import on_main

INSIDE = 0.5  # probability from which on a pixel belongs to a mask


def as_float(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Images ``[3, H, W]`` uint8 as torchvision's detectors take them: float32 in 0 .. 1."""
    return [image.to(device, non_blocking=True).float() / 255 for image in images]


@torch.no_grad()
def detect(
    detector: nn.Module, images: DetectionImages, accelerator: Accelerator, workers: int
) -> list[dict[str, Any]]:
    """What a detector finds, on the main process in the order of the ranks; each looks at its part of the images.

    Returns:
        An entry for each box: ``image_id``, ``category_id``, ``bbox [x, y, width, height]`` in pixels, ``score`` and,
        of a detector with masks, ``segmentation``, compressed run lengths.
    """
    detector.eval()
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader: DataLoader[Example] = DataLoader(Subset(images, own), collate_fn=collate, num_workers=workers)
    found: list[dict[str, Any]] = []
    for index, (batch, _) in watched(zip(own, loader, strict=True), "images", len(own)):
        with accelerator.autocast():
            (output,) = detector(as_float(batch, accelerator.device))
        found.extend(_entries(images, index, output))
    return on_main(found)


def _entries(images: DetectionImages, index: int, output: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    annotations = images.annotations
    image = annotations.images[index].id
    boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
    labels, scores = output["labels"].tolist(), output["scores"].tolist()
    masks = output["masks"][:, 0] > INSIDE if "masks" in output else None
    for number, (box, label, score) in enumerate(zip(boxes, labels, scores, strict=True)):
        category = annotations.categories[label - 1].id
        segmentation = {} if masks is None else {"segmentation": encode(masks[number])}
        yield {"image_id": image, "category_id": category, "bbox": box, "score": score, **segmentation}
