"""The head with its classes shared out over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tde_kernels import checks, distributed, metrics, reference
from tde_kernels import functional as F
from tde_kernels.backends import core, select
from tde_kernels.backends.grouped import Loss
from tde_kernels.class_parallel.collectives import (
    AllRows,
    Group,
    OwnRows,
    agree,
    gathered,
    own_rows,
    rank_in,
    ranks_of,
)
from tde_kernels.class_parallel.loss import AllLosses, OwnLosses, ShardedLosses, own_losses
from tde_kernels.class_parallel.sampling import sample
from tde_kernels.class_parallel.shards import Shards
from tde_kernels.functional import LossOptions
from tde_kernels.heads import FusedTDEHead


class ClassParallelTDEHead(FusedTDEHead):
    """:class:`tde_kernels.FusedTDEHead` for more classes than one device holds: every rank holds some of them.

    Each rank brings features of its own, as many as the others. They are gathered once; losses, predictions and the
    head direction are those that a single process would find for all of them. The loss is that of the whole batch, the
    same on every rank; gradients are such that a data-parallel network around it, which takes the mean of its ranks'
    gradients, gets those of that loss. ``weight [c, D]`` holds the rank's own classes, and its gradient is complete:
    leave the head out of ``DistributedDataParallel`` (``broadcast_buffers`` and all), or keep it beside the network.

    Args:
        in_features, num_classes, and all others: as of ``FusedTDEHead``; C is the number of all classes.
        group: over whose ranks the classes lie, a process group or a device mesh of one dimension; or of two, data and
            classes: then the heads along the first hold the same weights and average their gradients. Default: all.
        sample_rate: of a shard's classes, how many each training step looks at (Partial FC); the batch's labels always.
        seed: of the sampling.

    Raises:
        ValueError: the ranks disagree, or a rank would hold no class; on every rank.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        sample_rate: float = 1.0,
        seed: int = 0,
        background_index: int | None = None,
        **head: Any,
    ) -> None:
        checks.positive_int(num_classes, "num_classes")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be above 0 and at most 1, got {sample_rate}")
        data_group: Group = None
        if isinstance(group, DeviceMesh):
            if group.ndim > 2:
                raise ValueError(
                    f"group must be a mesh of classes, or of data and classes, got {group.ndim} dimensions"
                )
            data_group = group.get_group(0) if group.ndim == 2 else None
            group = group.get_group(group.ndim - 1)
        shards = Shards(num_classes, ranks_of(group))
        if min(shards.sizes) == 0:
            raise ValueError(f"num_classes must leave no rank of {shards.ranks} without a class, got {num_classes}")
        super().__init__(in_features, len(shards.of(rank_in(group))), **head)
        described = {"in_features": in_features, "num_classes": num_classes, "dtype": str(self.weight.dtype)}
        described |= {name: getattr(self, name) for name in ("num_heads", "tau", "gamma", "normalizer", "exponent")}
        agree(described, group)
        if background_index is not None:
            background_index = checks.class_index(background_index, num_classes, "background_index")
        self.background_index, self.num_classes = background_index, num_classes
        self.group, self.data_group, self.shards, self.sample_rate, self.seed = (
            group,
            data_group,
            shards,
            sample_rate,
            seed,
        )
        self._steps = 0
        if data_group is not None:
            for parameter in self.parameters():
                parameter.register_hook(self._averaged)

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return rank_in(self.group)

    def extra_repr(self) -> str:
        own = self.shards.of(self.rank)
        return (
            f"{super().extra_repr()}, classes {own.start} to {own.stop - 1} on rank {self.rank} of {self.shards.ranks}"
        )

    def _averaged(self, grad: Tensor) -> Tensor:
        """The mean of a gradient over the heads that hold the same classes."""
        grad = grad.contiguous()
        dist.all_reduce(grad, group=self.data_group)
        return grad / dist.get_world_size(self.data_group)

    def _take_in(self, features: Tensor, mask: Tensor | None) -> None:
        """The moving average takes in features ``[P * b, D]`` of all ranks."""
        total = F.feature_sum(features, mask, backend=self.backend)
        if self.data_group is not None:
            distributed.reduce_sum(total, self.data_group)
        reference.fold_ema_(self.ema, self.num_updates, total, self.momentum)

    def forward(self, x: Tensor, *, alpha: float | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As ``FusedTDEHead``: all logits ``[..., C]`` of this rank's features. They are sent; a loss's are not."""
        checks.features(x, self.in_features)
        rows = AllRows.apply(x.reshape(-1, self.in_features), self.group)
        if self.training:
            if self._takes_in():
                everywhere = None if mask is None else gathered(mask.reshape(-1), self.group)
                self._take_in(rows.detach(), everywhere)
            logits = self._exchanged(F.grouped_logits(rows, self.weight, **self._family))
            return logits.reshape(*x.shape[:-1], self.num_classes)
        strength = self.tde_alpha if alpha is None else alpha
        direct = self._exchanged(F.tde_logits(rows, self.weight, self.head_direction, alpha=strength, **self._family))
        if self.background_index is not None:
            total = self._exchanged(F.grouped_logits(rows, self.weight, **self._family))
            direct = reference.exempt_logits(total.float(), direct.float(), self.background_index).to(direct.dtype)
        return direct.reshape(*x.shape[:-1], self.num_classes)

    def _exchanged(self, columns: Tensor, widths: list[int] | None = None) -> Tensor:
        found: Tensor = OwnRows.apply(columns, widths or self.shards.sizes, self.group)
        return found

    def loss(self, x: Tensor, target: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Cross entropy of Eq. 7 over all classes and all ranks' features; see the class for its gradients.

        Args:
            target: int64 ``[...]``, in 0 .. C - 1.
            mask: bool ``[...]``, the rows that the moving average takes in; on all ranks or on none.
            options: as of ``FusedTDEHead.loss``, alike on all ranks; vectors are ``[C]``.

        Returns:
            Loss in float32, alike on all ranks; with ``reduction="none"`` the losses ``[...]`` of this rank's features.
        """
        checks.features(x, self.in_features)
        asked = LossOptions(**options)
        checks.cross_entropy(x, self.num_classes, target, **asked._asdict())
        checks.row_mask(mask, x)
        own = x.reshape(-1, self.in_features)
        rows = gathered(own.detach(), self.group)
        asked, target_, mask_ = self._labels_of_all(asked, target, mask)
        if self._takes_in():
            self._take_in(rows, mask_)
        loss = asked.of(target_)._replace(first=self.shards.of(self.rank).start, classes=self.num_classes)
        weight: Tensor = self.weight
        scale: Tensor | None = self.class_scale
        widths = self.shards.sizes
        if self.training and self.sample_rate < 1:
            self._steps += 1
            drawn = sample(loss, self.shards, self.rank, self.sample_rate, self._generator())
            weight, widths, loss = weight[drawn.own], drawn.sizes, drawn.loss
            scale = None if scale is None else scale[drawn.own]
        losses = self._losses(own, rows, weight, scale, widths, loss)
        if asked.reduction != "none":
            return losses.sum()
        mine: Tensor = OwnLosses.apply(losses, self.rank, self.group)
        return mine.reshape(target.shape)

    def _labels_of_all(
        self, asked: LossOptions, target: Tensor, mask: Tensor | None
    ) -> tuple[LossOptions, Tensor, Tensor | None]:
        """Targets, second targets and mask of all ranks' rows, in one message."""
        columns = [a.reshape(-1) for a in (target, asked.target_b, mask) if a is not None]
        found = list(gathered(torch.stack([column.long() for column in columns], 1), self.group).t().contiguous())
        everywhere = found.pop().bool() if mask is not None else None
        if asked.target_b is not None:
            asked = asked._replace(target_b=found.pop())
        return asked, found[0], everywhere

    def _generator(self) -> torch.Generator:
        """Of this step's sample in this shard."""
        seed = (self.seed * 1_000_003 + self._steps) * self.shards.ranks + self.rank
        return torch.Generator(self.weight.device).manual_seed(seed)

    def _losses(
        self, own: Tensor, rows: Tensor, weight: Tensor, scale: Tensor | None, widths: list[int], loss: Loss
    ) -> Tensor:
        """Losses ``[P * b]`` of all ranks' features ``rows``, of which ``own [b, D]`` are this rank's."""
        family = {**self._family, "class_scale": scale}
        dtype = F.product_dtype(own)
        backend = select("cross_entropy", own.device.type, dtype, self.backend, size=rows.numel() * weight.shape[0])
        if backend == "reference" or F.wants_grad(*loss[:7]):
            logits = F.grouped_logits(AllRows.apply(own, self.group), weight, **family)
            losses = own_losses(OwnRows.apply(logits, widths, self.group), loss, self.rank)
            found: Tensor = AllLosses.apply(losses, self.rank, self.group)
            return found
        named = {name: family[name] for name in ("num_heads", "tau", "gamma", "normalizer", "exponent")}
        classifier = checks.logits(own, weight, **named, class_scale=scale)
        loss = loss._replace(
            class_weight=core.float_vector(loss.class_weight),
            logit_bias=core.float_vector(loss.logit_bias),
            margin=core.float_vector(loss.margin),
        )
        found = ShardedLosses.apply(own, weight, scale, rows, classifier, loss, self.group, dtype, backend)
        return found

    @torch.no_grad()
    def predict(self, x: Tensor, topk: int = 5, *, alpha: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``FusedTDEHead.predict``: every rank looks for the largest among its own classes, then they are merged."""
        checks.at_most(topk, self.num_classes, "topk")
        strength = self.tde_alpha if alpha is None else alpha
        if self.background_index is not None:
            was_training = self.training
            logits = self.eval()(x, alpha=strength)
            self.train(was_training)
            return reference.lowest_topk(logits, topk)
        rows = gathered(x.reshape(-1, self.in_features), self.group)
        most = [min(topk, size) for size in self.shards.sizes]
        values, classes = F.topk(
            rows, self.weight, most[self.rank], direction=self.head_direction, alpha=strength, **self._family
        )
        classes = classes + self.shards.of(self.rank).start
        values, classes = (own_rows(found, most, self.group) for found in (values, classes))
        best, places = reference.lowest_topk(values, topk)  # shards are in order, so ties go to the lowest class
        shape = (*x.shape[:-1], topk)
        return best.reshape(shape), classes.gather(1, places).reshape(shape)

    @torch.no_grad()
    def alpha_sweep(self, x: Tensor, alphas: Tensor | Sequence[float]) -> Tensor:
        """As ``FusedTDEHead.alpha_sweep``, by one product and one message for all alphas."""
        steps = checks.alphas(alphas, x.device)
        if self.background_index is not None:
            was_training = self.training
            found = torch.stack([self.eval()(x, alpha=alpha).argmax(-1) for alpha in steps])
            self.train(was_training)
            return found
        rows = gathered(x.reshape(-1, self.in_features), self.group)
        begin = self.shards.of(self.rank).start
        family = {name: value for name, value in self._family.items() if name != "backend"}
        total, along_x, along_w = reference.effects(
            rows, self.weight, self.head_direction, checks.logits(rows, self.weight, **family)
        )
        correction = along_x @ along_w.t()
        largest = [(total - alpha * correction).max(1) for alpha in steps]
        widths = [len(steps)] * self.shards.ranks
        values, classes = (
            own_rows(torch.stack(columns, 1), widths, self.group).unflatten(1, (self.shards.ranks, -1))
            for columns in ([found.values for found in largest], [found.indices + begin for found in largest])
        )
        lowest = classes.masked_fill(values < values.amax(1, keepdim=True), self.num_classes).amin(1)
        return lowest.t().reshape(len(steps), *x.shape[:-1])

    def alpha_curve(self, *_: Any, **__: Any) -> metrics.Curve:
        """Not of a class-parallel head.

        Raises:
            ValueError: always.
        """
        raise ValueError("a class-parallel head has no exact curve; sweep alphas instead")

    @classmethod
    def from_weight(cls, weight: Tensor, **kwargs: Any) -> ClassParallelTDEHead:
        """A head with a copy of this rank's rows of ``weight [C, D]``; ``kwargs`` are the constructor's."""
        checks.floating(weight, "weight")
        if weight.dim() != 2:
            raise ValueError(f"weight must have shape [C, D], got {tuple(weight.shape)}")
        head = cls(weight.shape[1], weight.shape[0], **{"device": weight.device, "dtype": weight.dtype, **kwargs})
        own = head.shards.of(head.rank)
        with torch.no_grad():
            head.weight.copy_(weight[own.start : own.stop])
        return head

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Weights as a ``DTensor`` of all classes, so that a distributed checkpoint fits any number of ranks."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._parameters.items():
            if parameter is not None and self.shards.ranks > 1:
                destination[prefix + name] = self._as_whole(destination[prefix + name])

    def _as_whole(self, local: Tensor) -> DTensor:
        group = self.group or dist.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, local.device.type)
        shape = torch.Size([self.num_classes, *local.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes this rank's classes out of weights of all classes, whole or as a ``DTensor``."""
        own, taken = self.shards.of(self.rank), dict(state_dict)
        for name, parameter in self._parameters.items():
            whole = taken.get(prefix + name)
            if parameter is None or whole is None:
                continue
            if isinstance(whole, DTensor):
                local = whole.to_local()
                whole = local if local.shape == parameter.shape else whole.full_tensor()
            if whole.shape[:1] == (self.num_classes,):
                whole = whole[own.start : own.stop]
            taken[prefix + name] = whole
        super()._load_from_state_dict(taken, prefix, *rest)
