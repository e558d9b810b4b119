"""What a recipe of detectors may say."""

from __future__ import annotations

from dataclasses import dataclass, field

from tde_trainer.schema import ClassifierConfig, RunConfig, ScheduleConfig, bounded


@dataclass
class DetectionDataConfig:
    """Which images, and how large they are shown."""

    name: str = "shapes_lvis"
    root: str = "data"  # folder of the images, or that shapes_lvis is drawn into
    annotations: str = ""  # folder of the annotation files; empty: the root
    min_size: int = bounded(800, 1)  # pixels of an image's shorter side
    max_size: int = bounded(1333, 1)  # and at most of its longer
    train_images: int = bounded(600, 1)  # of shapes_lvis
    workers: int = bounded(0, 0)  # processes that read images; 0: none but the trainer's
    note: str = ""  # what to say beside every figure


@dataclass
class DetectorConfig:
    """Cascade Mask R-CNN."""

    name: str = "resnet101"  # the backbone, under a feature pyramid
    pretrained: bool = False  # the backbone starts from ImageNet's weights, which are fetched
    representation: int = bounded(1024, 1)  # D, the size of a box's feature vector
    proposals: int = bounded(1000, 1)  # of the region proposal network, for an image
    box_batch: int = bounded(512, 1)  # boxes of an image that a stage is trained on
    class_agnostic_masks: bool = False  # one mask for all classes
    score_threshold: float = bounded(1e-4, 0, 1)  # low enough for rare classes
    detections: int = bounded(300, 1)  # of an image, at most


@dataclass
class DetectionHeadConfig(ClassifierConfig):
    """The classifier of every stage, Eq. 7 to 9."""

    alpha: float | None = field(default=1.5, metadata={"low": 0, "high": 1e6})  # None: chosen on validation data
    alphas: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5, 2.0])  # to choose from


@dataclass
class DetectionLossConfig:
    """Of the classifiers."""

    name: str = ""  # cross_entropy, focal, eql or softmax_eql; empty: the method's own
    focal_exponent: float = bounded(2.0, 0)
    rare_share: float = bounded(1.77e-3, 0, 1)  # eql: below this share of the images, other classes spare a class
    softmax_eql_beta: float = bounded(0.9, 0, 1)  # how often softmax_eql does


@dataclass
class DetectionTrainConfig(ScheduleConfig):
    """The schedule, and how often images are shown."""

    repeat_threshold: float = bounded(1e-3, 0, 1)  # share of images below which a class's are repeated; 0: none are


@dataclass
class DetectionConfig(RunConfig):
    """A whole recipe of detectors."""

    task: str = "detection"
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    model: DetectorConfig = field(default_factory=DetectorConfig)
    head: DetectionHeadConfig = field(default_factory=DetectionHeadConfig)
    loss: DetectionLossConfig = field(default_factory=DetectionLossConfig)
    train: DetectionTrainConfig = field(default_factory=DetectionTrainConfig)
