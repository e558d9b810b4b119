"""The head as a module: de-confounded training (Eq. 7), the head direction's EMA, TDE inference (Eq. 8, Eq. 9)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from tde_kernels import checks, distributed, metrics, published, reference
from tde_kernels import functional as F
from tde_kernels.backends import check_name
from tde_kernels.normalizers import resolve


def _inside_backward() -> bool:
    """Whether autograd is running: a forward then is activation checkpointing computing a batch a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class FusedTDEHead(nn.Module):
    """A normalised multi-head classifier that removes the head direction's effect at inference.

    In ``train()``, ``head(x)`` returns the logits of Eq. 7 and the moving average of the features takes ``x`` in, in
    the same pass. In ``eval()`` it returns those of Eq. 8, or with ``background_index`` the logarithm of Eq. 9, which
    a softmax leaves as it is.

    Args:
        in_features: D, channels of a feature; a multiple of ``num_heads``.
        num_classes: C, with the background where there is one.
        num_heads: K, groups of channels that are normalised apart.
        tau: temperature; logits carry ``tau / K``.
        gamma: added to the weight norms by the deconfound normalizer.
        alpha: strength of the subtraction at inference; in ``state_dict``, free to change (``head.alpha = 1.5``).
        momentum: of the moving average, ``ema <- momentum * ema + mean(x)``. A plain attribute: a schedule may set it.
        normalizer: linear, cosine, capsule, deconfound, tau_norm or lws. The paper's linear baseline is
            ``normalizer="linear", num_heads=1, tau=1.0``; lws learns ``class_scale [C]`` besides.
        background_index: the class that is background, negative counted from the end; None where there is none.
        exponent: p of tau_norm.
        backend: reference, cpu, cuda or triton; None chooses. See :func:`tde_kernels.info`.
        device: of the weights and the moving average.
        dtype: of the weights. The moving average is float32 whatever the module is cast to.

    Threads:
        In evaluation any number may share a head. In training the losses and gradients of several threads are their
        own, but the moving average, as a batch norm's statistics, is for one at a time: a lock is the caller's.

    Shapes:
        features ``[..., in_features]`` to logits ``[..., num_classes]``.

    Attributes:
        weight: ``[C, D]`` parameter.
        class_scale: ``[C]`` parameter of lws, else None.
        ema: ``[D]`` float32 buffer, un-normalised.
        num_updates: int64 buffer, batches that the average has taken in.
    """

    _version = 1  # of state_dict; to be raised where an older version would go wrong with what this one writes
    weight: nn.Parameter
    class_scale: nn.Parameter | None
    tde_alpha: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_heads: int = 2,
        tau: float = 16.0,
        gamma: float = 1 / 32,
        alpha: float = 3.0,
        momentum: float = 0.9,
        normalizer: str = "deconfound",
        background_index: int | None = None,
        exponent: float = 1.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int(in_features, "in_features")
        checks.positive_int(num_classes, "num_classes")
        checks.heads(in_features, num_heads, "features (in_features)")
        checks.finite(tau, "tau")
        checks.finite_float32(alpha, "alpha")
        checks.momentum(momentum)
        family = resolve(normalizer, gamma=gamma, exponent=exponent)
        if background_index is not None:
            background_index = checks.class_index(background_index, num_classes, "background_index")
        if backend is not None:
            check_name(backend)
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_heads = num_heads
        self.tau = tau
        self.gamma = gamma
        self.momentum = momentum
        self.normalizer = normalizer
        self.background_index = background_index
        self.exponent = exponent
        self.backend = backend
        self._initial_alpha = float(alpha)
        self.pending_sum = distributed.PendingSum()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        scale = torch.empty(num_classes, device=device, dtype=dtype) if family.learns_class_scale else None
        self.register_parameter("class_scale", None if scale is None else nn.Parameter(scale))
        self.register_buffer("ema", torch.zeros(in_features, device=device, dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), device=device, dtype=torch.int64))
        self.register_buffer("tde_alpha", torch.full((), float(alpha), device=device, dtype=torch.float32))
        self.reset_parameters()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """``fully_shard`` gives a module it takes a class of its own; methods that read weights then gather them."""
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "set_requires_gradient_sync"):  # is an FSDPModule, whose import would take long
            for name in ("loss", "predict", "alpha_sweep", "alpha_curve"):
                setattr(cls, name, distributed.like_forward(getattr(cls, name)))

    def reset_parameters(self) -> None:
        """Weights from ``U(-1/sqrt(D), 1/sqrt(D))``, class scales 1, alpha as constructed, and no moving average."""
        self.pending_sum.forget()
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=self._generator())
        if self.class_scale is not None:
            nn.init.ones_(self.class_scale)
        self.ema.zero_()
        self.num_updates.zero_()
        self.tde_alpha.fill_(self._initial_alpha)

    def _generator(self) -> torch.Generator | None:
        """What random weights are drawn from; None: torch's own."""
        return None

    def extra_repr(self) -> str:
        background = "" if self.background_index is None else f", background_index={self.background_index}"
        return (
            f"{self.in_features}, {self.num_classes}, num_heads={self.num_heads}, tau={self.tau:g}, "
            f"gamma={self.gamma:g}, normalizer={self.normalizer!r}{background}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedTDEHead:
        """Moves the module; a cast to 16 bits leaves the moving average and alpha in float32."""
        exact = {name: getattr(self, name) for name in ("ema", "tde_alpha")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, before.to(moved.device))
        return self

    @property
    def ema(self) -> Tensor:
        """``[D]`` float32 buffer, un-normalised. Whoever reads it waits for the features of a batch on their way."""
        if self.pending_sum.under_way:
            self._settle()
        return cast(Tensor, super().__getattr__("ema"))

    @property
    def num_updates(self) -> Tensor:
        """int64 buffer, the number of batches that the average has taken in."""
        if self.pending_sum.under_way:
            self._settle()
        return cast(Tensor, super().__getattr__("num_updates"))

    def _settle(self) -> None:
        """The moving average takes in what was sent to it, if anything was."""
        received = self.pending_sum.receive()
        if received is not None:
            total, momentum = received
            F.fold_ema_(self.ema, self.num_updates, total, momentum=momentum, backend=self.backend)

    def _settle_after_backward(self, result: Tensor) -> Tensor:
        """Has the moving average take in what was sent when the backward of ``result`` ends; now, if none comes."""
        if self.pending_sum.under_way:
            if result.requires_grad and not torch.compiler.is_compiling():
                result.register_hook(lambda _: Variable._execution_engine.queue_callback(self._settle))
            else:
                self._settle()
        return result

    def __getstate__(self) -> dict[str, Any]:
        self._settle()  # what is on its way cannot be copied
        return self.__dict__.copy()

    def _save_to_state_dict(self, *args: Any) -> None:
        self._settle()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        written = local_metadata.get("version", self._version)
        if written > self._version:
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix}* is of a newer version of the head: its format is {written}, known is {self._version}"
            )
            return
        self.pending_sum.forget()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        for name in ("ema", "tde_alpha"):  # assign=True takes them over in whatever dtype they come
            setattr(self, name, getattr(self, name).float())

    @property
    def alpha(self) -> Tensor:
        """The strength of the subtraction at inference, 0-d float32; a copy, so that who keeps it can restore it."""
        return self.tde_alpha.clone()

    @alpha.setter
    def alpha(self, value: float | Tensor) -> None:
        checks.alpha(value)
        with torch.no_grad():
            self.tde_alpha.copy_(torch.as_tensor(value))

    @property
    def head_direction(self) -> Tensor:
        """``[D]`` float32, of unit norm in each head; zero before the first update."""
        return F.head_direction(self.ema, num_heads=self.num_heads, backend=self.backend)

    @property
    def _family(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "tau": self.tau,
            "gamma": self.gamma,
            "normalizer": self.normalizer,
            "exponent": self.exponent,
            "class_scale": self.class_scale,
            "backend": self.backend,
        }

    def forward(self, x: Tensor, *, alpha: float | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits ``[..., C]`` of features ``x [..., D]``: Eq. 7 in training, Eq. 8 (or log of Eq. 9) in evaluation.

        Args:
            alpha: for this call, in place of ``head.alpha``; read in evaluation alone.
            mask: bool ``[...]``, the rows that the moving average takes in; read in training alone.
        """
        if self.training:
            return self._total_logits(x, mask)
        strength = self.tde_alpha if alpha is None else alpha
        if self.background_index is None:
            return F.tde_logits(x, self.weight, self.head_direction, alpha=strength, **self._family)
        return self._exempt(x, strength)

    def _takes_in(self) -> bool:
        """Whether the batch goes into the moving average: in training, when it is seen for the first time."""
        return self.training and not _inside_backward()

    def _total_logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Eq. 7, and the moving average."""
        if not self._takes_in():
            return F.grouped_logits(x, self.weight, **self._family)
        logits = F.grouped_logits_with_ema_(
            x,
            self.weight,
            self.ema,
            self.num_updates,
            momentum=self.momentum,
            mask=mask,
            pending=self.pending_sum,
            **self._family,
        )
        return self._settle_after_backward(logits)

    def _exempt(self, x: Tensor, alpha: float | Tensor) -> Tensor:
        """The logarithm of Eq. 9."""
        assert self.background_index is not None
        return F.background_exempt(
            x,
            self.weight,
            self.head_direction,
            alpha=alpha,
            background_index=self.background_index,
            log=True,
            **self._family,
        )

    def loss(self, x: Tensor, target: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Cross entropy of Eq. 7; in training the moving average takes ``x`` in as ``head(x)`` does.

        Args:
            target: int64 ``[...]``.
            mask: bool ``[...]``, the rows that the moving average takes in.
            options: of :func:`tde_kernels.reference.cross_entropy`: class_weight, logit_bias, margin,
                label_smoothing, ignore_index, target_b, lam, focal_exponent, reduction.

        Returns:
            Loss in float32.
        """
        checks.features(x, self.in_features)
        if not self._takes_in():
            return F.grouped_cross_entropy(x, self.weight, target, **options, **self._family)
        loss = F.grouped_cross_entropy_with_ema_(
            x,
            self.weight,
            target,
            self.ema,
            self.num_updates,
            momentum=self.momentum,
            mask=mask,
            pending=self.pending_sum,
            **options,
            **self._family,
        )
        return self._settle_after_backward(loss)

    @torch.no_grad()
    def predict(
        self, x: Tensor, topk: int | None = None, *, alpha: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The ``topk`` largest scores of evaluation and their classes, both ``[..., topk]``, in descending order.

        Args:
            topk: default: 5, or all where there are fewer classes.
            alpha: as of a call.
        """
        topk = min(5, self.num_classes) if topk is None else topk
        checks.at_most(topk, self.num_classes, "topk")
        strength = self.tde_alpha if alpha is None else alpha
        if self.background_index is None:
            return F.topk(x, self.weight, topk, direction=self.head_direction, alpha=strength, **self._family)
        return reference.lowest_topk(self._exempt(x, strength), topk)

    @torch.no_grad()
    def fit_direction(self, batches: Tensor | Iterable[Tensor]) -> FusedTDEHead:
        """Sets the moving average to the mean of the features ``[..., D]`` of all ``batches``: no retraining.

        Batches are read once, one at a time. Under ``torch.distributed`` every rank brings its own.

        Raises:
            ValueError: there was no feature at all, or one that is not finite.
        """
        total = torch.zeros(self.in_features + 1, dtype=torch.float64, device=self.ema.device)
        for features in [batches] if isinstance(batches, Tensor) else batches:
            checks.features(features, self.in_features, "batches")
            total += F.feature_sum(features.to(self.ema.device))
        self._sum_over_ranks(total)
        if total[-1] == 0:
            raise ValueError("batches must hold at least one feature, got none")
        if not total.isfinite().all():
            raise ValueError("batches must hold finite features, got some that are not")
        self.ema.copy_(total[:-1] / total[-1])
        self.num_updates.fill_(1)
        return self

    def _sum_over_ranks(self, total: Tensor) -> None:
        """In place, that of each."""
        distributed.reduce_sum(total)

    @torch.no_grad()
    def alpha_sweep(self, x: Tensor, alphas: Tensor | Sequence[float]) -> Tensor:
        """The predicted class int64 ``[A, ...]`` of evaluation, for every alpha, of features ``x [..., D]``."""
        if self.background_index is None:
            return F.alpha_sweep(x, self.weight, self.head_direction, alphas, **self._family)
        steps = checks.alphas(alphas, x.device)
        found = torch.empty((len(steps), *x.shape[:-1]), dtype=torch.int64, device=x.device)
        for step, alpha in zip(found, steps, strict=True):
            step.copy_(self._exempt(x, alpha).argmax(-1))
        return found

    @torch.no_grad()
    def alpha_curve(
        self,
        x: Tensor,
        y: Tensor,
        metric: str = "mean_per_class",
        *,
        class_counts: Tensor | Sequence[int] | None = None,
    ) -> metrics.Curve:
        """The score of evaluation for every alpha, exactly (the paper's Figure 4), of features ``x [N, D]``.

        Args:
            y: int64 ``[N]``.
            metric: a name, as for :meth:`choose_alpha`.
            class_counts: as there.

        Raises:
            ValueError: the head has a background class: Eq. 9 is no line in alpha.
        """
        if self.background_index is not None:
            raise ValueError("a head with background_index has no exact curve; sweep alphas instead")
        self._check_validation(x, y)
        score = metrics.Score.named(metric, y, self.num_classes, class_counts)
        return score.curve(F.alpha_segments(x, self.weight, self.head_direction, **self._family), y)

    def _check_validation(self, x: Tensor, y: Tensor) -> None:
        checks.features(x, self.in_features)
        if x.dim() != 2 or x.shape[0] == 0:
            raise ValueError(f"x must have shape [N, {self.in_features}] with N at least 1, got {tuple(x.shape)}")
        checks.labels(y, self.num_classes, None, x.shape[:-1], "y")

    @torch.no_grad()
    def choose_alpha(
        self,
        x: Tensor,
        y: Tensor,
        alphas: Tensor | Sequence[float] | None = None,
        metric: str | Callable[[Tensor, Tensor], float] = "mean_per_class",
        *,
        class_counts: Tensor | Sequence[int] | None = None,
    ) -> float:
        """Sets ``head.alpha`` to the one that does best on validation features ``x [N, D]``.

        Never call it on test data. Of several processes each chooses by the features that it is given: give all of
        them to each, or their alphas differ. (Those of a :class:`ClassParallelTDEHead` choose together.)

        Args:
            y: int64 ``[N]``.
            alphas: those to choose from, ties to the smallest. None: every alpha from 0 on, exactly; the middle of the
                first best interval is taken (see :meth:`tde_kernels.metrics.Curve.best`).
            metric: "accuracy", "mean_per_class" (over the classes present), "harmonic_mean_of_shots" (of the means over
                classes with many, medium and few training samples: above 100, 20 to 100, below 20), or a function of
                predictions and labels, larger being better, for which alphas are needed.
            class_counts: ``[C]``, training samples of each class, for the harmonic mean.

        Returns:
            The alpha chosen.

        Raises:
            ValueError: the head has no direction yet, so that all alphas are alike.
        """
        if self.num_updates == 0:
            raise ValueError("the head has no direction to choose an alpha for: train it or call fit_direction first")
        if alphas is None:
            if not isinstance(metric, str):
                raise ValueError("alphas are needed where metric is a function, got None")
            chosen = self.alpha_curve(x, y, metric, class_counts=class_counts).best()
        else:
            self._check_validation(x, y)
            candidates = sorted(checks.alphas(alphas, torch.device("cpu")).tolist())
            if not candidates:
                raise ValueError("alphas must not be empty")
            predictions, y = self._of_all_ranks(self.alpha_sweep(x, candidates), y)
            score = metrics.resolve(metric, y, self.num_classes, class_counts)
            scores = [float(score(predicted, y)) for predicted in predictions]
            chosen = candidates[max(range(len(scores)), key=scores.__getitem__)]
        self.alpha = chosen
        return chosen

    def _of_all_ranks(self, predictions: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions ``[A, N]`` and labels ``[N]`` that alpha is chosen by, of those that are this process's."""
        return predictions, y

    @classmethod
    def from_weight(cls, weight: Tensor, **kwargs: Any) -> FusedTDEHead:
        """A head with a copy of ``weight [C, D]``; ``kwargs`` are the constructor's."""
        checks.floating(weight, "weight")
        if weight.dim() != 2:
            raise ValueError(f"weight must have shape [C, D], got {tuple(weight.shape)}")
        kwargs = {"device": weight.device, "dtype": weight.dtype, **kwargs}
        head = cls(weight.shape[1], weight.shape[0], **kwargs)
        with torch.no_grad():
            head.weight.copy_(weight)
        return head

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> FusedTDEHead:
        """A head with a copy of a linear layer's weight. A bias is dropped, with a warning if it is not zero."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if linear.bias is not None and bool(linear.bias.detach().any()):
            warnings.warn("the linear layer's bias is dropped: a normalised head has none", stacklevel=2)
        return cls.from_weight(linear.weight.detach(), **kwargs)

    @classmethod
    def load_published(cls, state: Mapping[str, Any], **kwargs: Any) -> FusedTDEHead:
        """A head from a checkpoint of the paper's published code: classifier weight and moving average.

        Args:
            state: what the checkpoint holds: the weight ``[C, D]`` under a key that ends in ``weight``, with any prefix
                or nesting, the average ``[D]`` under ``embed``; of a detector ``fc_cls`` and ``causal_embed``, of one
                with several classifiers the part that belongs to one of them.
            kwargs: the constructor's; num_heads, tau, gamma and alpha are not in such a checkpoint.

        Raises:
            ValueError: weight or average are missing, ambiguous, or do not fit each other.
        """
        weight, ema = published.read(state)
        head = cls.from_weight(weight, **kwargs)
        with torch.no_grad():
            head.ema.copy_(ema)
            head.num_updates.fill_(1)
        return head


def replace_head(model: nn.Module, *, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """Swaps the last ``nn.Linear`` of a network, in the order of registration, for a :class:`FusedTDEHead`, in place.

    The layer's weight is taken over where the number of classes stays; its bias is dropped, as the head has none.

    Args:
        model: a network of torchvision, timm or one's own.
        num_classes: of the new head; default: the layer's own.
        kwargs: the head's.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no linear layer inside.
    """
    layers = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"model must hold an nn.Linear to replace, got a {type(model).__name__} without one")
    layer = model.get_submodule(layers[-1])
    assert isinstance(layer, nn.Linear)
    if num_classes is None or num_classes == layer.out_features:
        head = FusedTDEHead.from_weight(layer.weight.detach(), **kwargs)
    else:
        kwargs = {"device": layer.weight.device, "dtype": layer.weight.dtype, **kwargs}
        head = FusedTDEHead(layer.in_features, num_classes, **kwargs)
    model.set_submodule(layers[-1], head.train(layer.training))
    return model
