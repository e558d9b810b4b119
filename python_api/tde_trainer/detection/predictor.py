"""The paper's classifier as torchvision's box predictor: one object to swap in a detector of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from tde_kernels import FusedTDEHead


class BoxPredictor(nn.Module):
    """Class scores and box regression of box features, as torchvision's ``FastRCNNPredictor`` gives them.

    In ``train()`` the scores are the logits of Eq. 7, and the head direction takes in the foreground alone; in
    ``eval()`` they are the logarithm of the background-exempted probabilities of Eq. 9, which a softmax leaves as they
    are. :func:`replace_box_predictor` puts one into a detector of torchvision.

    Args:
        in_channels: D, size of a box's feature vector.
        num_classes: C, with the background where there is one.
        background_index: the class that is background: 0, as torchvision has it, or another, negative counted from the
            end; None where no class is, as with sigmoid losses: evaluation then is Eq. 8.
        class_agnostic: one regression for all classes.
        head: further arguments of :class:`tde_kernels.FusedTDEHead`, such as num_heads, tau and alpha.

    Attributes:
        head: the classifier; ``predictor.head.alpha = 1.5`` sets the strength of TDE, 0 none.
        bbox_pred: the regression, ``[4]`` or ``[C * 4]``.
        foreground: bool ``[N]``, which boxes of the batch in training are foreground. The RoI heads set it.

    Raises:
        ValueError: the background lies outside the classes; what the head refuses.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        background_index: int | None = 0,
        class_agnostic: bool = False,
        **head: Any,
    ) -> None:
        super().__init__()
        self.head = FusedTDEHead(in_channels, num_classes, background_index=background_index, **head)
        self.bbox_pred = nn.Linear(in_channels, 4 if class_agnostic else 4 * num_classes)
        self.foreground: Tensor | None = None

    @property
    def class_agnostic(self) -> bool:
        """Whether there is one regression for all classes."""
        return self.bbox_pred.out_features == 4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[N, C]`` and deltas ``[N, 4 * C]`` of box features ``x [N, D]``, or of ``[N, D, 1, 1]``.

        Raises:
            RuntimeError: in training, where nobody told which boxes are foreground.
        """
        x = x.flatten(1)
        scores = self.head(x, mask=self._foreground(len(x))) if self.training else self.scores(x)
        deltas = self.bbox_pred(x)
        return scores, deltas.repeat(1, self.head.num_classes) if self.class_agnostic else deltas

    def scores(self, x: Tensor) -> Tensor:
        """Those of evaluation, ``[N, C]``, of ``x [N, D]``. Under autocast too they keep their 32 bits.

        In 16 bits many of the thousands that detections are chosen by would be equal.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.scores(x.float())
        scores: Tensor = self.head(x)
        return scores

    def _foreground(self, boxes: int) -> Tensor:
        if self.foreground is None or len(self.foreground) != boxes:
            told = "nothing" if self.foreground is None else f"{len(self.foreground)} boxes"
            raise RuntimeError(
                f"foreground must say which of {boxes} boxes the head direction takes in, got {told}; "
                "replace_box_predictor(model) lets torchvision's RoI heads tell"
            )
        return self.foreground


class ForegroundTold:
    """For RoI heads, before their class among the bases: tells the box predictor what was sampled as foreground."""

    box_predictor: BoxPredictor

    def select_training_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Torchvision's, whose background is 0 and whose labels below it are of boxes to ignore."""
        sampled = super().select_training_samples(*args, **kwargs)  # type: ignore[misc]
        self.box_predictor.foreground = torch.cat(sampled[2]) > 0
        return sampled


class TDERoIHeads(ForegroundTold, RoIHeads):
    """Torchvision's RoI heads, for a :class:`BoxPredictor`."""


def replace_box_predictor(
    model: nn.Module, *, num_classes: int | None = None, class_agnostic: bool = False, **head: Any
) -> nn.Module:
    """Swaps the box predictor of torchvision's Faster or Mask R-CNN for a :class:`BoxPredictor`, in place.

    Weights are taken over where the number of classes stays; the classifier's bias is dropped, as the head has none.
    Where it changes, the masks of a Mask R-CNN are of the new classes too.

    Args:
        model: such as ``maskrcnn_resnet50_fpn()``.
        num_classes: with the background, which is 0; default: the model's own.
        class_agnostic: one regression for all classes.
        head: arguments of :class:`tde_kernels.FusedTDEHead`.

    Returns:
        ``model``.

    Raises:
        TypeError: its RoI heads or its predictor are not torchvision's.
        ValueError: the background is not to be 0; what the head refuses.
    """
    if head.setdefault("background_index", 0) != 0:
        raise ValueError(f"background_index must be 0 in torchvision's RoI heads, got {head['background_index']}")
    roi_heads = getattr(model, "roi_heads", None)
    tells = isinstance(roi_heads, ForegroundTold) or type(roi_heads) is RoIHeads
    if not (isinstance(roi_heads, RoIHeads) and tells):
        raise TypeError(
            "model.roi_heads must be torchvision's RoIHeads, or a subclass with ForegroundTold as its first base, "
            f"got {type(roi_heads).__name__}"
        )
    old = roi_heads.box_predictor
    classifier, regression = getattr(old, "cls_score", None), getattr(old, "bbox_pred", None)
    if not isinstance(classifier, nn.Linear) or not isinstance(regression, nn.Linear):
        raise TypeError(
            f"model.roi_heads.box_predictor must have linear cls_score and bbox_pred, got {type(old).__name__}"
        )
    classes = classifier.out_features if num_classes is None else num_classes
    new = BoxPredictor(classifier.in_features, classes, class_agnostic=class_agnostic, **head).to(classifier.weight)
    with torch.no_grad():
        if classes == classifier.out_features:
            new.head.weight.copy_(classifier.weight)
        if new.bbox_pred.weight.shape == regression.weight.shape:
            new.bbox_pred.load_state_dict(regression.state_dict())
    roi_heads.box_predictor = new.train(old.training)
    masks = roi_heads.mask_predictor
    if isinstance(masks, MaskRCNNPredictor) and classes != classifier.out_features:
        last = masks.mask_fcn_logits
        assert isinstance(last, nn.Conv2d)
        masks.mask_fcn_logits = nn.Conv2d(last.in_channels, classes, 1).to(last.weight)
    if type(roi_heads) is RoIHeads:
        roi_heads.__class__ = TDERoIHeads  # the object stays, with all that was set on it
    return model
