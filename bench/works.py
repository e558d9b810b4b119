"""Every piece of work that is measured: what it has to compute and move at least, what is right, and who does it.

To add one is to add a value here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import compiled, detector, ours, paper, products
from bench.expected import (
    averaged,
    exempted,
    logits,
    loss,
    scored_topk,
    scored_winners,
    stepped,
    top_values,
    trained,
    winning_values,
)
from bench.peers import PEERS
from bench.problem import ALPHAS, LARGEST, Make, Problem, Results, Train, forward, inference, loss_step, step
from bench.shapes import Shape
from tde_kernels.backends.product import multiplied_as

Amount = Callable[[Shape], int]
FLOAT32, BOTH = ("float32",), ("float32", "bfloat16")
HEADS = ("cifar10", "cifar100", "imagenet_lt", "inat18", "lvis")
SLOW = ("compiled_reference", "autotuned_eager", "autotuned_reference", "by_inference")  # beyond --quick


@dataclass(frozen=True)
class Work:
    """A piece of work.

    ``numbers`` are those read and written at least, in the dtype of the operands; ``written`` is the part that is
    results. ``eager`` sets what a rival may lose to rounding.
    """

    title: str
    op: str
    flops: Amount
    numbers: Amount
    written: Amount
    limits: Mapping[str, Make]
    ours: Make
    rivals: Mapping[str, Make]
    expected: Callable[[Problem], Results]
    eager: Make
    scored: Callable[[Problem, Results], Results] = lambda p, found: found
    shapes: tuple[str, ...] = HEADS
    dtypes: tuple[str, ...] = BOTH
    reference: bool = True  # whether this package's reference, uncompiled, is a rival

    def bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """The least traffic."""
        return self.numbers(shape) * dtype.itemsize

    def limit(self, dtype: torch.dtype, device: str) -> str:
        """Of ``limits``, what times are multiples of: the first, or on a CPU that is slow in ``dtype`` the last."""
        slow = device == "cpu" and multiplied_as(dtype) != dtype
        return list(self.limits)[-1 if slow else 0]


def _operands(s: Shape) -> int:
    return (s.batch + s.classes) * s.dim


def _logits(s: Shape) -> int:
    return s.batch * s.classes


def _product(s: Shape) -> int:
    return s.product_flops()


def _three_products(s: Shape) -> int:
    return 3 * s.product_flops()


TRAIN: dict[str, Train] = {
    "eager": paper.train,
    "compiled_eager": compiled.train(compiled.paper_train),
    "compiled_reference": compiled.train(compiled.reference_train),
    "autotuned_reference": compiled.train(compiled.reference_train, "max-autotune"),
}
PLAIN: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "eager": paper.plain,
    "compiled_eager": compiled.infer(compiled.paper_plain),
    "compiled_reference": compiled.infer(compiled.reference_plain),
    "autotuned_reference": compiled.infer(compiled.reference_plain, "max-autotune"),
}
TDE: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "eager": paper.tde,
    "compiled_eager": compiled.infer(paper.tde_logits),
    "compiled_reference": compiled.infer(compiled.reference_tde),
    "autotuned_reference": compiled.infer(compiled.reference_tde, "max-autotune"),
}
LOSS: dict[str, Make] = {
    "logits_first": loss_step(ours.logits_first),
    "eager": loss_step(paper.loss),
    "compiled_eager": loss_step(compiled.loss()),
    "autotuned_eager": loss_step(compiled.loss("max-autotune")),
}
_ONE_INFERENCE: dict[str, Make] = {"inference": inference(ours.tde)}

WORKS = {
    "forward": Work(
        "Training forward: Eq. 7 and the moving average, against one product",
        op="logits",
        flops=_product,
        numbers=lambda s: _operands(s) + _logits(s),
        written=_logits,
        limits=products.ONE,
        ours=forward(ours.train),
        rivals={name: forward(train) for name, train in TRAIN.items()} | {"torchvision": detector.forward},
        expected=trained,
        eager=forward(paper.train),
    ),
    "step": Work(
        "Training step: forward, moving average, and backward from a given gradient, against three products",
        op="logits",
        flops=_three_products,
        numbers=lambda s: 2 * (_operands(s) + _logits(s)),
        written=lambda s: _operands(s) + _logits(s),
        limits=products.THREE,
        ours=step(ours.train),
        rivals={name: step(train) for name, train in TRAIN.items()} | {"torchvision": detector.step},
        expected=stepped,
        eager=step(paper.train),
    ),
    "loss": Work(
        "Training step with its loss, against three products",
        op="cross_entropy",
        flops=_three_products,
        numbers=lambda s: 2 * _operands(s),
        written=_operands,
        limits=products.THREE,
        ours=loss_step(ours.loss),
        rivals=LOSS | PEERS | {"torchvision": detector.loss},
        expected=loss,
        eager=loss_step(paper.loss),
        shapes=(*HEADS, "imagenet21k", "million"),
        reference=False,
    ),
    "plain": Work(
        "Inference without a direction, against one product",
        op="logits",
        flops=_product,
        numbers=lambda s: _operands(s) + _logits(s),
        written=_logits,
        limits=products.ONE,
        ours=inference(ours.plain),
        rivals={name: inference(make) for name, make in PLAIN.items()} | {"torchvision": detector.plain},
        expected=lambda p: (logits(p, 0.0),),
        eager=inference(paper.plain),
    ),
    "inference": Work(
        "TDE inference, Eq. 8, against one product",
        op="logits",
        flops=_product,
        numbers=lambda s: _operands(s) + _logits(s),
        written=_logits,
        limits=products.ONE,
        ours=inference(ours.tde),
        rivals={name: inference(make) for name, make in TDE.items()},
        expected=lambda p: (logits(p),),
        eager=inference(paper.tde),
    ),
    "counterfactual": Work(
        "TDE inference against plain inference by the same backend",
        op="logits",
        flops=_product,
        numbers=lambda s: _operands(s) + _logits(s),
        written=_logits,
        limits={"plain": inference(ours.plain)},
        ours=inference(ours.tde),
        rivals={},
        expected=lambda p: (logits(p),),
        eager=inference(paper.tde),
    ),
    "exempt": Work(
        "Background-exempted inference, Eq. 9, against one product",
        op="background_exempt",
        flops=_product,
        numbers=lambda s: _operands(s) + _logits(s),
        written=_logits,
        limits=products.ONE,
        ours=inference(ours.exempt),
        rivals={
            "eager": inference(paper.exempt),
            "by_class": inference(paper.exempt_by_class),
            "compiled_eager": inference(compiled.infer(paper.exempted)),
        },
        expected=exempted,
        eager=inference(paper.exempt),
        shapes=("imagenet_lt", "lvis"),
    ),
    "ema": Work(
        "The moving average alone, against the mean of the features",
        op="update_ema_",
        flops=lambda s: s.batch * s.dim,
        numbers=lambda s: s.batch * s.dim,
        written=lambda s: 0,
        limits={"mean": products.mean},
        ours=ours.ema,
        rivals={"eager": paper.average, "compiled_eager": compiled.average},
        expected=lambda p: (averaged(p),),
        eager=paper.average,
        shapes=("imagenet_lt", "lvis"),
    ),
    "sweep": Work(
        f"Predictions for {len(ALPHAS)} alphas, against one TDE inference",
        op="alpha_sweep",
        flops=_product,
        numbers=_operands,
        written=lambda s: 0,
        limits=_ONE_INFERENCE,
        ours=inference(ours.sweep),
        rivals={"by_inference": inference(ours.sweep_by_inference)},
        expected=winning_values,
        eager=inference(paper.winners),
        scored=scored_winners,
        shapes=("cifar100", "imagenet_lt", "inat18", "lvis"),
        dtypes=FLOAT32,
        reference=False,
    ),
    "segments": Work(
        "The prediction for every alpha, exactly, against one TDE inference",
        op="alpha_segments",
        flops=_product,
        numbers=_operands,
        written=lambda s: 0,
        limits=_ONE_INFERENCE,
        ours=ours.segments,
        rivals={},
        expected=winning_values,
        eager=inference(paper.winners),
        scored=scored_winners,
        shapes=("cifar100", "imagenet_lt", "inat18", "lvis"),
        dtypes=FLOAT32,
        reference=False,
    ),
    "topk": Work(
        f"The {LARGEST} largest logits of Eq. 8, against one TDE inference",
        op="topk",
        flops=_product,
        numbers=_operands,
        written=lambda s: 0,
        limits=_ONE_INFERENCE,
        ours=inference(ours.topk),
        rivals={"by_inference": inference(ours.topk_by_inference)},
        expected=top_values,
        eager=inference(paper.largest),
        scored=scored_topk,
        shapes=("cifar100", "imagenet_lt", "inat18", "lvis"),
        dtypes=FLOAT32,
    ),
}
