"""What a recipe may say: the dataclasses are the schema, their defaults the defaults, their metadata the bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "val", "test")  # of every data set
SEED_STRIDE = 1_000_003  # more than any number of epochs times ranks: no two seeds share random numbers
LARGEST_SEED = 2**32 // SEED_STRIDE - 1  # its whole stride is below 2**32, where numpy's seeds end


def bounded(default: float, low: float, high: float = math.inf) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class DataConfig:
    """Which data, and how long its tail is."""

    name: str = "digits_lt"
    root: str = "data"  # folder of the data set
    format: str = "torchvision"  # how it lies there: as torchvision keeps it, or "folder", an ImageFolder tree
    download: bool = False  # fetch what is missing (torchvision format)
    ratio: float = bounded(50.0, 1)  # images of the first class over images of the last
    n_max: int = bounded(5000, 1)  # training images of the first class, and of every class before the cut (CIFAR)
    subset_seed: int = bounded(0, 0, 2**32 - 1)  # which images are kept; 0: the published ones (CIFAR)
    image_size: int = bounded(32, 1)  # that images are resampled to
    skip_corrupt: bool = False  # leave out images that cannot be read
    lists: str = ""  # folder of the list files (imagenet_lt, places_lt, list_lt); empty: the root
    workers: int = bounded(0, 0)  # processes that read images (data sets of list files); 0: none but the trainer's
    val_per_class: int = bounded(20, 1)
    test_per_class: int = bounded(40, 1)  # digits_lt; elsewhere all that validation leaves
    note: str = ""  # what to say beside every figure: of copies, or of another source


@dataclass
class ModelConfig:
    """The backbone."""

    name: str = "small_conv"
    width: int = bounded(32, 1)  # of small_conv: channels of the first convolution
    features: int = bounded(64, 1)  # of small_conv: D, the size of the feature vector
    branches: int = bounded(1, 1)  # of resnet32: parallel last blocks, each 64 features
    pretrained: bool = False  # timm: and torchvision: networks start from published weights, which are fetched


@dataclass
class ClassifierConfig:
    """The classifier of Eq. 7."""

    num_heads: int = bounded(2, 1)
    tau: float = bounded(16.0, 0)
    gamma: float = bounded(1 / 32, 0)
    momentum: float = bounded(0.9, 0, 1)


@dataclass
class HeadConfig(ClassifierConfig):
    """The classifier of Eq. 7 and 8. A method may override what defines it, as `linear` does tau."""

    alpha: float | None = field(default=None, metadata={"low": 0, "high": 1e6})  # None: chosen on validation data
    alpha_max: float = bounded(3.0, 0, 1e6)  # the sweep covers 0 .. alpha_max
    alpha_steps: int = bounded(31, 2)


@dataclass
class LossConfig:
    """Figures of the methods that have any; the defaults are their papers'."""

    focal_exponent: float = bounded(2.0, 0)
    mixup_alpha: float = bounded(1.0, 1e-3)
    class_balanced_beta: float = bounded(0.9999, 0, 1 - 1e-9)
    ldam_margin: float = bounded(0.5, 0)  # of the smallest class, in units of the cosine
    ldam_scale: float = bounded(30.0, 0)
    drw_from: float = bounded(0.8, 0, 1)  # share of the epochs after which DRW weights classes
    logit_adjustment: float = bounded(1.0, 0)
    centroid_weight: float = bounded(0.01, 0)  # of oltr's margin loss
    centroid_margin: float = bounded(5.0, 0)  # between the distances to a sample's own centroid and to the others


@dataclass
class ScheduleConfig:
    """SGD with momentum, linear warm-up, then cosine decay to zero or steps."""

    epochs: int = bounded(60, 1)
    batch_size: int = bounded(64, 1)  # of all processes together
    lr: float = bounded(0.1, 0)
    momentum: float = bounded(0.9, 0, 1)
    weight_decay: float = bounded(5e-4, 0)
    warmup_epochs: float = bounded(5, 0)
    decay: str = "cosine"  # or "steps"
    milestones: list[float] = field(default_factory=lambda: [0.6, 0.8])  # shares of the epochs at which lr steps down
    step_factor: float = bounded(0.01, 0, 1)
    threads: int = bounded(0, 0)  # CPU threads; 0: as many as torch takes


@dataclass
class TrainConfig(ScheduleConfig):
    """The schedule of a classifier, and how its images are drawn and its backbone computed."""

    compile: bool = False  # the backbone, by torch.compile
    sync_batchnorm: bool = False  # batch norm over the batch of all GPUs, not of each
    channels_last: bool = False  # keep images and the backbone's weights in that memory format
    sampler: str = "instance"  # what is drawn as often: images; or "class_aware", "square_root", "progressive"


@dataclass
class StageTwoConfig:
    """How methods of a second stage are trained, where that differs from `TrainConfig`."""

    epochs: int | None = field(default=None, metadata={"low": 1, "high": math.inf})  # None: the method's own
    lr: float = bounded(0.2, 0)


@dataclass
class RunConfig:
    """What every recipe says, whatever it trains."""

    methods: list[str] = field(default_factory=lambda: ["linear", "cosine", "deconfound"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: ScheduleConfig = field(default_factory=ScheduleConfig)
    schedule: str = ""  # one of the recipe's `schedules`, which set some of the rest
    precision: str = "fp32"
    out: str = ""  # run directory; empty: runs/<recipe>
    resume: bool = False
    overwrite: bool = False


@dataclass
class Config(RunConfig):
    """A whole recipe of classifiers."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stage_two: StageTwoConfig = field(default_factory=StageTwoConfig)
    stage_one: str = ""  # `from=RUN`: the run whose networks a second stage begins with
