"""Detection on LVIS: the head as a box predictor, Cascade Mask R-CNN, data, and LVIS's evaluation."""

from tde_trainer.detection.evaluation import evaluate
from tde_trainer.detection.predictor import BoxPredictor, ForegroundTold, replace_box_predictor

__all__ = ["BoxPredictor", "ForegroundTold", "evaluate", "replace_box_predictor"]
