"""The head as a module of which every rank holds a part: what it is made of, agrees on, saves and loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tde_kernels import checks
from tde_kernels.class_parallel import collectives, state
from tde_kernels.class_parallel.collectives import Averaged, Ranks
from tde_kernels.class_parallel.shards import Shards
from tde_kernels.heads import FusedTDEHead
from tde_kernels.normalizers import Classifier


class ShardedHead(FusedTDEHead):
    """The parameters of some of the classes; see :class:`ClassParallelTDEHead`, which computes with them.

    Attributes:
        ranks: over which the classes lie; ``data_ranks`` hold the same ones.
        shards: which rank holds which classes.
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
        classes, data = _groups(group)
        # Before the module is: its weights are those of a rank
        self.ranks, self.data_ranks = Ranks.of(classes), Ranks() if data is None else Ranks.of(data)
        given = {"sample_rate": sample_rate, "seed": seed, "background_index": background_index, **head}
        given |= {"in_features": in_features, "num_classes": num_classes, "device": None}
        given |= {"dtype": str(head.get("dtype") or torch.get_default_dtype())}
        collectives.agree_over(given, self.ranks, self.data_ranks)
        checks.positive_int(num_classes, "num_classes")
        checks.finite(sample_rate, "sample_rate")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be above 0 and at most 1, got {sample_rate}")
        self.shards = Shards(num_classes, self.ranks.size)
        if min(self.shards.sizes) == 0:
            held = [len(self.shards.of(rank)) for rank in range(self.ranks.size)]
            raise ValueError(f"num_classes must give every rank a class, got {num_classes}, of which ranks get {held}")
        super().__init__(in_features, len(self.shards.of(self.ranks.rank)), **head)
        if background_index is not None:
            background_index = checks.class_index(background_index, num_classes, "background_index")
        self.background_index, self.num_classes = background_index, num_classes
        self.sample_rate, self.seed = sample_rate, seed

    def _generator(self) -> torch.Generator | None:
        """Shards differ where all ranks are seeded alike; heads that hold the same classes do not."""
        if self.weight.is_meta:
            return None
        seed = collectives.first_of(int(torch.randint(1 << 62, ())), self.data_ranks)
        return torch.Generator(self.weight.device).manual_seed(seed + self.ranks.rank)

    def extra_repr(self) -> str:
        own = self.shards.of(self.ranks.rank)
        where = f"classes {own.start} to {own.stop - 1} on rank {self.ranks.rank} of {self.ranks.size}"
        return f"{super().extra_repr()}, {where}"

    def _agree(self, call: str, x: Tensor, check: Callable[[], dict[str, Any]] = dict) -> None:
        """Checks a call's arguments, and that they go together with those of the other ranks; see the class."""
        fault: Exception | None = None
        described: dict[str, Any] = {"method": call, "mode": self.training}
        try:
            checks.features(x, self.in_features)
            described |= {"number of features": x.numel() // self.in_features, "dtype of x": str(x.dtype), **check()}
        except (TypeError, ValueError) as error:
            fault, described["error"] = error, str(error)
        if checks.readable(self.weight):
            collectives.agree(described, self.ranks, digest_on=self.weight.device)
        if fault is not None:
            raise fault

    def _classifier(self, x: Tensor, w: Tensor, scale: Tensor | None) -> Classifier:
        return checks.logits(x, w, self.num_heads, self.tau, self.gamma, self.normalizer, self.exponent, scale)

    def _parameters_here(self) -> tuple[Tensor, Tensor | None]:
        """Weights and class scales of this rank's classes; heads that hold the same average their gradients."""
        weight: Tensor = self.weight
        scale: Tensor | None = self.class_scale
        if self.data_ranks.size > 1:
            weight = Averaged.apply(weight, self.data_ranks)
            scale = None if scale is None else Averaged.apply(scale, self.data_ranks)
        return weight, scale

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = state.as_whole(destination[prefix + name], self.shards, self.ranks)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        taken = dict(state_dict)
        for name, parameter in self._parameters.items():
            if parameter is None or prefix + name not in taken:
                continue
            whole = torch.Size([self.num_classes, *parameter.shape[1:]])
            try:
                taken[prefix + name] = state.own_part(taken[prefix + name], whole, self.shards, self.ranks)
            except ValueError as error:
                errors.append(f"{prefix}{name} {error}")
                taken[prefix + name] = parameter.detach()  # nothing is copied
        super()._load_from_state_dict(taken, prefix, local_metadata, strict, missing, unexpected, errors)


def _groups(group: dist.ProcessGroup | DeviceMesh | None) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Of classes and of data."""
    if not isinstance(group, DeviceMesh):
        return group, None
    if group.ndim > 2:
        raise ValueError(f"group must be a mesh of classes, or of data and classes, got {group.ndim} dimensions")
    return group.get_group(group.ndim - 1), group.get_group(0) if group.ndim == 2 else None
