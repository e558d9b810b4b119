"""What a detector of torchvision computes in place of the head: the class scores of its ``FastRCNNPredictor``.

Of that module the scores alone are comparable, a linear layer with a bias; its other half regresses boxes. As other
rivals that know a linear head alone it gets operands that are normalised already, so that its logits are Eq. 7's and
can be checked. It keeps no moving average, and its gradients, for those operands, its weight and its bias, are no
results. Of Eq. 9 it knows nothing: at inference it is a rival of plain logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from bench.peers import needs, normalised
from bench.problem import Problem, Results, Run


def _class_scores(p: Problem) -> tuple[nn.Linear, Tensor]:
    """The linear layer with the head's weight, normalised, and the features."""
    needs("torchvision")
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    x, w = normalised(p)
    scores: nn.Linear = FastRCNNPredictor(p.shape.dim, p.shape.classes).cls_score.to(w)
    with torch.no_grad():
        scores.weight.copy_(w)
        scores.bias.zero_()
    return scores, x


def forward(p: Problem) -> Run:
    """A training forward."""
    scores, x = _class_scores(p)
    return lambda: (scores(x),)


def step(p: Problem) -> Run:
    """A training forward, and the backward from a given gradient of its logits."""
    return _backward(p, lambda z: z, p.grad)


def loss(p: Problem) -> Run:
    """Cross entropy, as torchvision's ``fastrcnn_loss`` takes it, and its gradients."""
    return _backward(p, lambda z: nnf.cross_entropy(z, p.target), None)


def _backward(p: Problem, of: Callable[[Tensor], Tensor], grad: Tensor | None) -> Run:
    scores, x = _class_scores(p)

    def run() -> Results:
        value = of(scores(x))
        torch.autograd.grad(value, (x, scores.weight, scores.bias), grad)
        return (value.detach(),)

    return run


def plain(p: Problem) -> Run:
    """Inference: the logits, without a graph."""
    return torch.no_grad()(forward(p))
