"""What a run trains: classifiers, detectors, or a head over many classes."""

from __future__ import annotations

from typing import Any

from tde_trainer.classification import ClassificationTask
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.task import DetectionTask
from tde_trainer.scaling.schema import ScalingConfig
from tde_trainer.scaling.task import ScalingTask
from tde_trainer.schema import Config, RunConfig
from tde_trainer.task import Task


def task_of(config: RunConfig) -> Task[Any]:
    """The task that a config describes."""
    if isinstance(config, DetectionConfig):
        return DetectionTask(config, config.data.name)
    if isinstance(config, ScalingConfig):
        return ScalingTask(config, config.data.name)
    assert isinstance(config, Config)
    return ClassificationTask(config, config.data.name)
