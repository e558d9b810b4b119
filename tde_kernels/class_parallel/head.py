"""The head with its classes shared out over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tde_kernels import checks, distributed, metrics, reference
from tde_kernels import functional as F
from tde_kernels.backends import select
from tde_kernels.backends.grouped import Loss
from tde_kernels.class_parallel import inference
from tde_kernels.class_parallel.collectives import AllRows, OwnRows, agree_over, gathered
from tde_kernels.class_parallel.loss import AllLosses, OwnLosses, ShardedLosses, own_losses
from tde_kernels.class_parallel.module import ShardedHead
from tde_kernels.class_parallel.sampling import Draw, sample
from tde_kernels.functional import LossOptions


class ClassParallelTDEHead(ShardedHead):
    """:class:`tde_kernels.FusedTDEHead` for more classes than one device holds: every rank holds some of them.

    Each rank brings features of its own, as many as the others, and all call the same methods in the same order.
    Features are gathered once; losses, predictions and the head direction are those that a single process would find
    for all of them. The loss is that of the whole batch, the same on every rank; gradients of features are such that a
    data-parallel network before the head, which takes the mean of its ranks' gradients, gets those of that loss.

    ``weight [c, D]``, and ``class_scale [c]``, hold the rank's own classes, and their gradients are complete: keep the
    head out of ``DistributedDataParallel`` and ``fully_shard``; ``torch.compile`` leaves it as it is. A norm over all
    parameters, as for clipping, is to be summed over the ranks for these. ``state_dict`` has them as a ``DTensor`` of
    all classes, and takes such a one of any number of ranks, or plain tensors of all classes, as those of
    ``FusedTDEHead`` are. What an optimizer keeps of them is each rank's own.

    The arguments of ``FusedTDEHead``, C being the number of all classes, are alike on all ranks; so are these.

    Args:
        group: over whose ranks the classes lie, a process group or a device mesh of one dimension; or of two, data and
            classes. Then the heads along the first hold the same classes and average their gradients, each loss being
            that of its own row of the mesh; their directions are of all features. Default: all processes.
        sample_rate: of a shard's classes, how many each training step looks at (Partial FC), besides the labels: at
            least as many as a batch has labels. Logits and predictions are of all classes.
        seed: of the sampling.

    Raises:
        ValueError: the ranks disagree, a rank would hold no class, or ``torch.distributed`` was launched and is not
            initialised; on every rank. So do methods whose arguments are wrong on one rank alone, or do not go
            together, on the CPU; elsewhere with ``TDE_DEBUG=1`` in the environment, for looking waits for the device.
    """

    def _take_in(self, rows: Tensor, mask: Tensor | None) -> None:
        """The moving average takes in features ``[P * b, D]`` of all ranks, which each of them sums alike."""
        total = F.feature_sum(rows, mask, backend=self.backend)
        if self.data_ranks.size > 1:
            distributed.reduce_sum(total, self.data_ranks.group)
        reference.fold_ema_(self.ema, self.num_updates, total, self.momentum)

    def _sum_over_ranks(self, total: Tensor) -> None:
        for ranks in (self.ranks, self.data_ranks):
            if ranks.size > 1:
                distributed.reduce_sum(total, ranks.group)

    def _all_rows(self, x: Tensor) -> Tensor:
        """``[P * b, D]`` of every rank's features."""
        rows: Tensor = AllRows.apply(x.reshape(-1, self.in_features), self.ranks)
        return rows

    def _own_logits(self, columns: Tensor, x: Tensor) -> Tensor:
        """``[..., C]`` of this rank's features ``x [..., D]``, from the columns ``[P * b, c]`` of its classes."""
        logits: Tensor = OwnRows.apply(columns, self.shards.sizes, self.ranks)
        return logits.reshape(*x.shape[:-1], self.num_classes)

    @torch.compiler.disable
    def forward(self, x: Tensor, *, alpha: float | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As ``FusedTDEHead``: all logits ``[..., C]`` of this rank's features. They are sent; a loss's are not."""
        if not self.training:
            return self._evaluated(x, alpha)

        def check() -> dict[str, Any]:
            checks.row_mask(mask, x)
            self._classifier(x, self.weight, self.class_scale)
            return {"use of a mask": mask is not None}

        self._agree("forward", x, check)
        rows = self._all_rows(x)
        if self._takes_in():
            everywhere = None if mask is None else gathered(mask.reshape(-1).byte(), self.ranks).bool()
            self._take_in(rows.detach(), everywhere)
        weight, scale = self._parameters_here()
        return self._own_logits(F.grouped_logits(rows, weight, **{**self._family, "class_scale": scale}), x)

    def _evaluated(self, x: Tensor, alpha: float | Tensor | None) -> Tensor:
        """Logits of Eq. 8, or the logarithm of Eq. 9."""
        self._agree("forward", x, lambda: {"alpha": self._checked(x, alpha)})
        rows, strength = self._all_rows(x), self.tde_alpha if alpha is None else alpha
        weight, scale = self._parameters_here()
        direction = self.head_direction
        if self.background_index is None:
            family = {**self._family, "class_scale": scale}
            return self._own_logits(F.tde_logits(rows, weight, direction, alpha=strength, **family), x)
        total, along_x, along_w = reference.effects(rows, weight, direction, self._classifier(rows, weight, scale))
        direct = total - strength * reference.product(along_x, along_w)
        total, direct = (self._own_logits(columns, x) for columns in (total, direct))  # not rounded: differences follow
        return reference.exempt_logits(total, direct, self.background_index).to(F.product_dtype(x))

    def _checked(self, x: Tensor, alpha: float | Tensor | None) -> float | str | None:
        """alpha as far as ranks can be asked to agree on it."""
        self._classifier(x, self.weight, self.class_scale)
        checks.alpha(self.tde_alpha if alpha is None else alpha)
        return "a tensor" if isinstance(alpha, Tensor) else alpha

    @torch.compiler.disable
    def loss(self, x: Tensor, target: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Cross entropy of Eq. 7 over all classes and all ranks' features; see the class for its gradients.

        Args:
            x: ``[..., D]``, as many on all ranks.
            target: int64 ``[...]``, in 0 .. C - 1.
            mask: bool ``[...]``, the rows that the moving average takes in; on all ranks or on none.
            options: as of ``FusedTDEHead.loss``, alike on all ranks; vectors are ``[C]``, and the gradient of a learnt
                one is for a data-parallel mean.

        Returns:
            Loss in float32, alike on all ranks; with ``reduction="none"`` the losses ``[...]`` of this rank's features.
        """
        asked = LossOptions(**options)
        self._agree("loss", x, lambda: self._checked_loss(x, target, mask, asked))
        own = x.reshape(-1, self.in_features)
        rows = gathered(own.detach(), self.ranks)
        reduction = asked.reduction
        asked, targets, masks = self._labels_of_all(asked, target, mask)
        if self._takes_in():
            self._take_in(rows, masks)
        dtype = F.product_dtype(x)
        loss = asked.of(targets, torch.float64 if dtype == torch.float64 else torch.float32)
        loss = loss._replace(first=self.shards.of(self.ranks.rank).start, classes=self.num_classes)
        losses = self._losses(own, rows, loss, dtype)
        if reduction != "none":
            return losses.sum()
        mine: Tensor = OwnLosses.apply(losses, self.ranks)
        return mine.reshape(target.shape)

    def _checked_loss(self, x: Tensor, target: Tensor, mask: Tensor | None, asked: LossOptions) -> dict[str, Any]:
        checks.cross_entropy(x, self.num_classes, target, **asked._asdict())
        checks.row_mask(mask, x)
        self._classifier(x, self.weight, self.class_scale)
        alike = {name: "a tensor" if isinstance(a, Tensor) else a for name, a in asked._asdict().items()}
        return alike | {"use of a mask": mask is not None, "backend": self._backend(x)}

    def _backend(self, x: Tensor) -> str:
        size = self.ranks.size * x.numel() * self.weight.shape[0]
        return select("cross_entropy", x.device, F.product_dtype(x), self.backend, operands=(x, self.weight), size=size)

    def _labels_of_all(
        self, asked: LossOptions, target: Tensor, mask: Tensor | None
    ) -> tuple[LossOptions, Tensor, Tensor | None]:
        """Targets, second targets and mask of all ranks' rows, in one message."""
        columns = [a.reshape(-1).long() for a in (target, asked.target_b, mask) if a is not None]
        found = list(gathered(torch.stack(columns, 1), self.ranks).t().contiguous())
        everywhere = found.pop().bool() if mask is not None else None
        if asked.target_b is not None:
            asked = asked._replace(target_b=found.pop())
        return asked, found[0], everywhere

    def _losses(self, own: Tensor, rows: Tensor, loss: Loss, dtype: torch.dtype) -> Tensor:
        """Losses ``[P * b]`` of all ranks' features ``rows``, of which ``own [b, D]`` are this rank's."""
        backend = self._backend(own)
        logits_stored = backend == "reference" or F.wants_grad(*loss[:7])
        (weight, scale), widths = self._parameters_here(), self.shards.sizes
        if self.training and self.sample_rate < 1:
            draw = Draw(self.sample_rate, self.seed, self.num_updates, all_vectors=logits_stored)
            drawn = sample(loss, self.shards, self.ranks.rank, draw)
            weight, widths, loss = weight[drawn.own], drawn.sizes, drawn.loss
            scale = None if scale is None else scale[drawn.own]
        if logits_stored:
            everyone = AllRows.apply(own, self.ranks)
            columns = F.grouped_logits(everyone, weight, **{**self._family, "class_scale": scale})
            losses = own_losses(OwnRows.apply(columns, widths, self.ranks), loss, self.ranks.rank)
            found: Tensor = AllLosses.apply(losses, self.ranks)
            return found
        classifier = self._classifier(own, weight, scale)
        found = ShardedLosses.apply(own, weight, scale, rows, classifier, loss, self.ranks, dtype, backend)
        return found

    @torch.no_grad()
    def predict(
        self, x: Tensor, topk: int | None = None, *, alpha: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``FusedTDEHead.predict``, of this rank's features; logits are not sent but where there is a background."""
        topk = min(5, self.num_classes) if topk is None else topk

        def check() -> dict[str, Any]:
            checks.at_most(topk, self.num_classes, "topk")
            return {"topk": topk, "alpha": self._checked(x, alpha)}

        self._agree("predict", x, check)
        if self.background_index is not None:
            return reference.lowest_topk(self._evaluated(x, alpha), topk)
        strength = self.tde_alpha if alpha is None else alpha
        most = min(topk, self.weight.shape[0])
        direction = self.head_direction
        values, places = F.topk(
            self._all_rows(x), self.weight, most, direction=direction, alpha=strength, **self._family
        )
        classes = places + self.shards.of(self.ranks.rank).start
        values, classes = inference.merged_topk(values, classes, topk, self.shards, self.ranks)
        shape = (*x.shape[:-1], topk)
        return values.reshape(shape), classes.reshape(shape)

    @torch.no_grad()
    def alpha_sweep(self, x: Tensor, alphas: Tensor | Sequence[float]) -> Tensor:
        """As ``FusedTDEHead.alpha_sweep``, of this rank's features, by one product and one message for all alphas."""

        def check() -> dict[str, Any]:
            return {"number of alphas": len(checks.alphas(alphas, x.device)), "alpha": self._checked(x, None)}

        self._agree("alpha_sweep", x, check)
        steps = checks.alphas(alphas, x.device)
        shape = (len(steps), *x.shape[:-1])
        if self.background_index is not None:
            found = [self._evaluated(x, alpha).argmax(-1) for alpha in steps]
            return torch.stack(found) if found else torch.empty(shape, dtype=torch.int64, device=x.device)
        classifier = self._classifier(x, self.weight, self.class_scale)
        rows = self._all_rows(x)
        values, places = inference.winners(rows, self.weight, self.head_direction, classifier, steps)
        classes = places + self.shards.of(self.ranks.rank).start
        return inference.merged_winners(values, classes, self.ranks).reshape(shape)

    def _check_validation(self, x: Tensor, y: Tensor) -> None:
        def check() -> dict[str, Any]:
            super(ClassParallelTDEHead, self)._check_validation(x, y)
            return {}

        self._agree("choose_alpha", x, check)

    def _of_all_ranks(self, predictions: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        agree_over({"number of labels": len(y)}, self.ranks, self.data_ranks)
        everywhere = gathered(gathered(torch.cat([predictions, y[None]]).t(), self.ranks), self.data_ranks)
        *found, labels = everywhere.t()
        return torch.stack(found), labels

    def alpha_curve(self, *_: Any, **__: Any) -> metrics.Curve:
        """Not of a class-parallel head.

        Raises:
            ValueError: always.
        """
        raise ValueError("a class-parallel head has no exact curve; choose among alphas instead")

    @classmethod
    def from_weight(cls, weight: Tensor, **kwargs: Any) -> ClassParallelTDEHead:
        """A head with a copy of this rank's rows of ``weight [C, D]``; ``kwargs`` are the constructor's."""
        checks.floating(weight, "weight")
        if weight.dim() != 2:
            raise ValueError(f"weight must have shape [C, D], got {tuple(weight.shape)}")
        head = cls(weight.shape[1], weight.shape[0], **{"device": weight.device, "dtype": weight.dtype, **kwargs})
        own = head.shards.of(head.ranks.rank)
        with torch.no_grad():
            head.weight.copy_(weight[own.start : own.stop])
        return head
