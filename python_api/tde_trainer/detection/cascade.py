"""The RoI heads of Cascade Mask R-CNN, on torchvision's parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from tde_trainer.detection.methods import BoxClassification
from tde_trainer.detection.predictor import BoxPredictor

Target = dict[str, Tensor]
Shapes = Sequence[tuple[int, int]]
CANDIDATES = 10_000  # the most boxes of an image that suppression looks at: a low threshold passes boxes by the million
SMALLEST = 1e-2  # side of a box, in pixels


class MaskHead(nn.Module):
    """Pooling, convolutions and masks of the boxes that the last stage found."""

    def __init__(self, pool: nn.Module, head: nn.Module, predictor: nn.Module, *, class_agnostic: bool) -> None:
        super().__init__()
        self.pool, self.head, self.predictor = pool, head, predictor
        self.class_agnostic = class_agnostic

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: Shapes) -> Tensor:
        """Logits of masks, ``[N, 1 + C, M, M]``, or ``[N, 1, M, M]`` where all classes share one."""
        masks: Tensor = self.predictor(self.head(self.pool(features, boxes, shapes)))
        return masks

    def of(self, labels: list[Tensor]) -> list[Tensor]:
        """Which of the masks belong to those labels."""
        return [torch.zeros_like(own) for own in labels] if self.class_agnostic else labels


class Stage(RoIHeads):
    """One stage: torchvision's RoI heads, whose predictor has one regression for all classes."""

    box_roi_pool: nn.Module
    box_head: nn.Module
    box_predictor: BoxPredictor

    def features(self, maps: dict[str, Tensor], boxes: list[Tensor], shapes: Shapes) -> Tensor:
        """Of each box, ``[N, D]``."""
        x: Tensor = self.box_head(self.box_roi_pool(maps, boxes, shapes))
        return x

    def refined(self, deltas: Tensor, boxes: list[Tensor], shapes: Shapes) -> list[Tensor]:
        """The boxes moved by ``deltas [N, 4]``, inside their images."""
        moved = self.box_coder.decode(deltas, boxes).reshape(-1, 4).split([len(own) for own in boxes])
        return [clip_boxes_to_image(own, shape) for own, shape in zip(moved, shapes, strict=True)]


class CascadeRoIHeads(nn.Module):
    """Stages that refine each other's boxes, each with a classifier, and so a head direction, of its own.

    A stage is trained on what the one before it made of its boxes. At inference the scores are the mean over stages:
    of log-probabilities, where a softmax makes them, so that each stage's background is exempted by itself.

    Args:
        stages: each with its threshold and box weights.
        weights: of the stages' losses.
        classification: how boxes are classified.
        masks: the mask head, trained on the last stage's foreground; None for boxes alone.
        score_threshold: of what is kept.
        nms_threshold: overlap at which the lower of two boxes of a class goes.
        detections: of an image, at most.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        weights: Sequence[float],
        classification: BoxClassification,
        masks: MaskHead | None,
        *,
        score_threshold: float = 1e-4,
        nms_threshold: float = 0.5,
        detections: int = 300,
    ) -> None:
        super().__init__()
        self.stages: Sequence[Stage] = nn.ModuleList(stages)  # type: ignore[assignment]
        self.weights, self.classification, self.masks = tuple(weights), classification, masks
        self.score_threshold, self.nms_threshold, self.detections = score_threshold, nms_threshold, detections

    @property
    def predictors(self) -> list[BoxPredictor]:
        """One a stage."""
        return [stage.box_predictor for stage in self.stages]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Shapes,
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation, losses in training, as torchvision's ``RoIHeads`` gives them."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        if targets is None:
            raise ValueError("targets must be given in training, got None")
        return [], self._losses(features, proposals, image_shapes, targets)

    def _losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], shapes: Shapes, targets: list[Target]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self.stages, self.weights, strict=True)):
            proposals, matched, labels, wanted = stage.select_training_samples(proposals, targets)
            x = stage.features(features, proposals, shapes)
            label, target = torch.cat(labels), torch.cat(wanted)
            deltas, fg = stage.box_predictor.bbox_pred(x), label > 0
            error = nnf.smooth_l1_loss(deltas[fg], target[fg], beta=1 / 9, reduction="sum") / max(len(label), 1)
            losses[f"loss_classifier_{number}"] = weight * self.classification.classification_loss(
                stage.box_predictor, x, label
            )
            losses[f"loss_box_{number}"] = weight * error
            sampled, refined = proposals, stage.refined(deltas.detach(), proposals, shapes)
            proposals = [boxes[remove_small_boxes(boxes, SMALLEST)] for boxes in refined]
        if self.masks is not None:
            chosen = [own > 0 for own in labels]
            boxes, index = ([a[c] for a, c in zip(of, chosen, strict=True)] for of in (sampled, matched))
            losses["loss_mask"] = maskrcnn_loss(
                self.masks(features, boxes, shapes),
                boxes,
                [t["masks"] for t in targets],
                self.masks.of([t["labels"] for t in targets]),
                index,
            )
        return losses

    def _detect(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: Shapes) -> list[dict[str, Tensor]]:
        of_stages = []
        for stage in self.stages:
            x = stage.features(features, boxes, shapes)
            of_stages.append(stage.box_predictor.scores(x))
            boxes = stage.refined(stage.box_predictor.bbox_pred(x), boxes, shapes)
        probabilities = self.classification.probabilities(torch.stack(of_stages).mean(0))
        split = probabilities.split([len(own) for own in boxes])
        detections = [self._kept(own, scores) for own, scores in zip(boxes, split, strict=True)]
        if self.masks is not None:
            logits = self.masks(features, [found["boxes"] for found in detections], shapes)
            masks = maskrcnn_inference(logits, self.masks.of([found["labels"] for found in detections]))
            for found, mask in zip(detections, masks, strict=True):
                found["masks"] = mask
        return detections

    def _kept(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """The best of an image's boxes ``[N, 4]`` with their scores ``[N, C]``, suppressed class by class."""
        box, label = (scores > self.score_threshold).nonzero(as_tuple=True)
        score = scores[box, label]
        if len(score) > CANDIDATES:
            score, best = score.topk(CANDIDATES)
            box, label = box[best], label[best]
        large = remove_small_boxes(boxes[box], SMALLEST)
        found, score, label = boxes[box[large]], score[large], label[large] + 1
        keep = batched_nms(found, score, label, self.nms_threshold)[: self.detections]
        return {"boxes": found[keep], "labels": label[keep], "scores": score[keep]}
