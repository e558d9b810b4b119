"""Masks from polygons and run lengths, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import mask_api_new_cpp as mask_api
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from tde_trainer.detection.annotations import Annotation
from tde_trainer.detection.entries import Box, Segmentation

FARTHEST = 100_000  # coordinate of a polygon, in pixels


def run_lengths(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run lengths ``{size, counts}`` of a mask, whose counts are bytes or a string.

    Args:
        segmentation: polygons, whose union is the mask; or run lengths of H x W, compressed or not.
        height: H of the image.
        width: W of the image.

    Raises:
        ValueError: it is neither.
    """
    try:
        if isinstance(segmentation, list):
            # of coordinates that are not numbers or out of proportion the library never finds the end
            if not all(np.abs(part).max() <= FARTHEST for part in segmentation):
                raise ValueError(f"polygons with coordinates that are not between -{FARTHEST} and {FARTHEST}")
            return dict(mask_api.merge(mask_api.frPyObjects(segmentation, height, width)))
        lengths: dict[str, Any] = segmentation
        if isinstance(lengths["counts"], list):
            lengths = mask_api.frPyObjects(lengths, height, width)
        pixels = sum(mask_api.toUncompressedRLE([lengths])[0]["counts"])
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"no mask: {str(error).splitlines()[0]}") from error
    if pixels != height * width:  # nor here
        raise ValueError(f"no mask: run lengths of {pixels} pixels, wanted are {height} x {width}")
    return lengths


def pixels(lengths: dict[str, Any]) -> float:
    """Area of a mask, from `run_lengths`."""
    return float(coco_mask.area(lengths))


def box_of(lengths: dict[str, Any]) -> Box:
    """The box around a mask, from `run_lengths`; of an empty mask without extent."""
    left, top, width, height = map(float, coco_mask.toBbox(lengths))
    return left, top, width, height


def masks(annotations: Sequence[Annotation], height: int, width: int) -> Tensor:
    """The masks of an image's objects.

    Returns:
        ``[N, H, W]`` uint8, 1 inside.

    Raises:
        ValueError: a segmentation is damaged; the message names the annotation.
    """
    found = torch.zeros(len(annotations), height, width, dtype=torch.uint8)
    for mask, annotation in zip(found, annotations, strict=True):
        try:
            mask.copy_(decode(run_lengths(annotation.segmentation, height, width)))
        except ValueError as error:
            raise ValueError(f"annotation {annotation.id}: {error}") from error
    return found


def decode(lengths: dict[str, Any]) -> Tensor:
    """A mask from `run_lengths`, ``[H, W]`` uint8, 1 inside."""
    return torch.from_numpy(coco_mask.decode(lengths))


def encode(mask: Tensor) -> dict[str, Any]:
    """Compressed run lengths ``{size: [H, W], counts}`` of a mask ``[H, W]``, bool or 0 and 1; the counts are a string.

    So a mask stands in a submission.
    """
    encoded = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}
