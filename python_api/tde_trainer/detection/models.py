"""Cascade Mask R-CNN on a feature pyramid."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign

from tde_trainer.detection.cascade import CascadeRoIHeads, MaskHead, Stage
from tde_trainer.detection.methods import BoxClassification
from tde_trainer.detection.schema import DetectionDataConfig, DetectorConfig
from tde_trainer.fetch import published_weights

POOLED = 7  # bins of a box, a side
# For each stage the overlap that makes a box foreground, the weights of its regression, and its loss's
STAGES = (
    (0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)


class Pyramid(nn.Module):
    """A small network for small images: maps at a quarter, an eighth and a sixteenth of their size.

    Attributes:
        out_channels: of every map.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.out_channels = 2 * width
        self.stem = nn.Sequential(_block(3, width, 2), _block(width, width, 2), _block(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(_block(before, after, 2), _block(after, after))
            for before, after in ((width, 2 * width), (2 * width, 4 * width))
        )
        self.fpn = FeaturePyramidNetwork([width, 2 * width, 4 * width], self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of ``images [B, 3, H, W]`` by name, the finest first."""
        maps = [self.stem(images)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        found: dict[str, Tensor] = self.fpn({str(level): x for level, x in enumerate(maps)})
        return found


def _block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def _resnet(name: str) -> Callable[[bool, bool], nn.Module]:
    def build(pretrained: bool, fetch: bool) -> nn.Module:
        """Published statistics of batch norm are kept as they are, and with them the first two stages' weights."""
        fetched = pretrained and fetch
        with published_weights(name) if fetched else nullcontext():
            backbone: nn.Module = resnet_fpn_backbone(
                backbone_name=name,
                weights="DEFAULT" if fetched else None,
                norm_layer=FrozenBatchNorm2d if pretrained else nn.BatchNorm2d,
                trainable_layers=3 if pretrained else 5,
            )
        return backbone

    return build


# The maps of an image that boxes are pooled from, the sizes of anchors on all of its maps
_FOUR, _LARGE = ("0", "1", "2", "3"), (32, 64, 128, 256, 512)
_THREE, _SMALL = ("0", "1", "2"), (16, 32, 64)
BACKBONES: dict[str, tuple[Callable[[bool, bool], nn.Module], tuple[str, ...], tuple[int, ...]]] = {
    "resnet50": (_resnet("resnet50"), _FOUR, _LARGE),
    "resnet101": (_resnet("resnet101"), _FOUR, _LARGE),
    "resnext101_32x8d": (_resnet("resnext101_32x8d"), _FOUR, _LARGE),
    "resnext101_64x4d": (_resnet("resnext101_64x4d"), _FOUR, _LARGE),
    "small": (lambda pretrained, fetch: Pyramid(), _THREE, _SMALL),
}


def cascade_mask_rcnn(
    model: DetectorConfig, data: DetectionDataConfig, classification: BoxClassification, *, fetch: bool = True
) -> GeneralizedRCNN:
    """An untrained detector.

    Args:
        model: backbone and sizes.
        data: how large images are shown.
        classification: the classifier of its stages, and for how many classes.
        fetch: ImageNet's weights, where the model asks for them; False where a checkpoint's take their place.

    Raises:
        ValueError: what the head refuses.
    """
    build, levels, sizes = BACKBONES[model.name]
    backbone = build(model.pretrained, fetch)
    channels = cast(int, backbone.out_channels)
    anchors = AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * model.proposals, "testing": model.proposals},
        post_nms_top_n={"training": model.proposals, "testing": model.proposals},
        nms_thresh=0.7,
    )
    stages = [
        Stage(
            MultiScaleRoIAlign(levels, POOLED, sampling_ratio=2),
            TwoMLPHead(channels * POOLED**2, model.representation),
            classification.predictor(model.representation),
            fg_iou_thresh=overlap,
            bg_iou_thresh=overlap,
            batch_size_per_image=model.box_batch,
            positive_fraction=0.25,
            bbox_reg_weights=weights,
            score_thresh=0.0,  # what these three say is the cascade's to say
            nms_thresh=1.0,
            detections_per_img=0,
        )
        for overlap, weights, _ in STAGES
    ]
    width = min(256, channels)
    masks = MaskHead(
        MultiScaleRoIAlign(levels, 2 * POOLED, sampling_ratio=2),
        MaskRCNNHeads(channels, (width,) * 4, dilation=1),
        MaskRCNNPredictor(width, width, 1 if model.class_agnostic_masks else len(classification.rare) + 1),
        class_agnostic=model.class_agnostic_masks,
    )
    heads = CascadeRoIHeads(
        stages,
        [weight for _, _, weight in STAGES],
        classification,
        masks,
        score_threshold=model.score_threshold,
        detections=model.detections,
    )
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    transform = GeneralizedRCNNTransform(data.min_size, data.max_size, mean, std)
    return GeneralizedRCNN(backbone, rpn, heads, transform)
