"""Checks of arguments, for the whole package: errors name the argument, what came and what was wanted.

Values of tensors are read on the CPU alone: elsewhere that would synchronise. ``TDE_DEBUG=1`` in the environment has
them read on every device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tde_kernels.distributed import is_dtensor
from tde_kernels.normalizers import Classifier, resolve

debug = os.environ.get("TDE_DEBUG") == "1"
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {layout} one")


def _mapped() -> bool:
    """Whether a transform of ``torch.func`` is at work: a tensor may then stand for many."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation follows the computation, operation by operation."""
    return not torch.compiler.is_compiling() and (_mapped() or forward_ad._current_level >= 0)


def readable(t: Tensor) -> bool:
    """Whether to look at the values of ``t``: see the module."""
    if torch.compiler.is_compiling() or _mapped():
        return False
    return t.device.type == "cpu" or (debug and t.device.type != "meta")


def shaped(t: Tensor, shape: Sequence[int], name: str) -> None:
    tensor(t, name)
    if t.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {_shape(t)}")


def floating(t: Tensor, name: str) -> None:
    tensor(t, name)
    if t.dtype not in FLOATING:
        raise TypeError(f"{name} must be one of {', '.join(map(_name, FLOATING))}, got {_name(t.dtype)}")


def same_device(t: Tensor, like: Tensor, name: str, like_name: str) -> None:
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {t.device}")


def finite(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # not isfinite, which torch.compile cannot trace for a number it holds variable
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}")


def finite_float32(value: float, name: str) -> None:
    finite(value, name)
    if not -_LARGEST_FLOAT32 <= value <= _LARGEST_FLOAT32:
        raise ValueError(f"{name} must be finite in float32, got {value}")


def positive_int(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def int64(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into int64, got {value}")


def flag(value: bool, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def heads(dim: int, num_heads: int, name: str) -> None:
    """``num_heads`` must cut the last dimension of ``name`` into equal, non-empty groups."""
    positive_int(num_heads, "num_heads")
    if dim == 0 or dim % num_heads != 0:
        raise ValueError(f"num_heads must divide the last dimension of {name}, got {num_heads} for {dim}")


def at_most(value: int, limit: int, name: str) -> None:
    positive_int(value, name)
    if value > limit:
        raise ValueError(f"{name} must be at most the number of classes, {limit}, got {value}")


def features(x: Tensor, dim: int, name: str = "x") -> None:
    floating(x, name)
    if x.dim() == 0 or x.shape[-1] != dim:
        raise ValueError(f"{name} must have shape [..., {dim}], got {_shape(x)}")


def channels(a: Tensor, name: str) -> None:
    floating(a, name)
    if a.dim() == 0 or a.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., D] with at least one channel, got {_shape(a)}")


def class_vector(value: Tensor | None, like: Tensor, num_classes: int, name: str) -> None:
    if value is not None:
        shaped(value, (num_classes,), name)
        floating(value, name)
        same_device(value, like, name, "x")


def autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; the meta device has none, and asking it would raise."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def logits(
    x: Tensor,
    w: Tensor,
    num_heads: int,
    tau: float,
    gamma: float,
    normalizer: str,
    exponent: float,
    class_scale: Tensor | None,
) -> Classifier:
    """The arguments that every classifier takes; returns them resolved."""
    floating(w, "w")
    if is_dtensor(w) and not is_dtensor(x):
        raise ValueError(
            "w must be all of the weights, got a DTensor, of which this rank holds a part; after fully_shard, run the "
            "head inside the forward of the module that was given to it"
        )
    if w.dim() != 2 or w.shape[0] == 0:
        raise ValueError(f"w must have shape [C, D] with at least one class, got {_shape(w)}")
    features(x, w.shape[1])
    same_device(w, x, "w", "x")
    if w.dtype != x.dtype and not autocast(x):
        raise TypeError(f"w must have the dtype of x, {_name(x.dtype)}, got {_name(w.dtype)}")
    heads(x.shape[-1], num_heads, "x")
    finite(tau, "tau")
    family = resolve(normalizer, gamma=gamma, exponent=exponent)
    if family.learns_class_scale and class_scale is None:
        raise ValueError(f"class_scale [C] is wanted by normalizer={normalizer!r}, got None")
    if not family.learns_class_scale and class_scale is not None:
        raise ValueError(f"class_scale is for normalizer='lws' alone, got it with normalizer={normalizer!r}")
    class_vector(class_scale, x, w.shape[0], "class_scale")
    return Classifier(family, num_heads, tau, class_scale)


def alpha(value: float | Tensor) -> None:
    """A number or a 0-d tensor, finite in float32."""
    if not isinstance(value, Tensor):
        finite_float32(value, "alpha")
    else:
        scalar(value, "alpha")
        if readable(value):
            finite_float32(float(value.detach()), "alpha")


def scalar(value: Tensor, name: str) -> None:
    """A real 0-d tensor."""
    tensor(value, name)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {_shape(value)}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {_name(value.dtype)}")


def reachable(value: Tensor, like: Tensor, name: str) -> None:
    """Values can be moved to the device of ``like`` from any but meta, which has none."""
    if value.is_meta and not like.is_meta:
        same_device(value, like, name, "x")


def counterfactual(x: Tensor, direction: Tensor, alpha_: float | Tensor) -> None:
    shaped(direction, (x.shape[-1],), "direction")
    floating(direction, "direction")
    same_device(direction, x, "direction", "x")
    alpha(alpha_)
    if isinstance(alpha_, Tensor):
        reachable(alpha_, x, "alpha")


def alphas(values: Tensor | Sequence[float], device: torch.device) -> Tensor:
    """One-dimensional, finite alphas as a tensor on ``device``, in float64 so that none is rounded."""
    if isinstance(values, Tensor):
        tensor(values, "alphas")
        if values.is_complex():
            raise TypeError(f"alphas must be real, got {_name(values.dtype)}")
    try:
        result = torch.as_tensor(values, dtype=torch.float64)
    except OverflowError as error:
        raise ValueError(f"alphas must be finite, got {values!r}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"alphas must be a sequence of numbers, got {values!r}") from error
    if result.is_meta and device.type != "meta":
        raise ValueError(f"alphas must be on the device of x, {device}, got meta")
    if result.dim() != 1:
        raise ValueError(f"alphas must be a sequence of numbers, got shape {_shape(result)}")
    if readable(result) and not bool(result.isfinite().all()):
        raise ValueError(f"alphas must be finite, got {result.tolist()}")
    return result.to(device)


def class_index(index: int, num_classes: int, name: str) -> int:
    """An index into the classes, negative ones counted from the end; returned as non-negative."""
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"{name} must be an int, got {type(index).__name__}")
    if not -num_classes <= index < num_classes:
        raise ValueError(f"{name} must be in [{-num_classes}, {num_classes}), got {index}")
    return index % num_classes


def row_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is not None:
        shaped(mask, x.shape[:-1], "mask")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {_name(mask.dtype)}")
        same_device(mask, x, "mask", "x")


def average(ema_: Tensor, num_heads: int) -> None:
    """A moving average ``[..., D]`` that ``num_heads`` cut."""
    channels(ema_, "ema")
    heads(ema_.shape[-1], num_heads, "ema")


def momentum(value: float) -> None:
    finite(value, "momentum")
    if not 0 <= value <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {value}")


def _kept(ema_: Tensor) -> None:
    tensor(ema_, "ema")
    if ema_.dim() != 1 or ema_.shape[0] == 0:
        raise ValueError(f"ema must have shape [D], got {_shape(ema_)}")
    if not ema_.is_contiguous():
        raise ValueError(f"ema must be contiguous, got strides {ema_.stride()}")
    if not torch.compiler.is_compiling() and ema_.is_neg():
        raise ValueError("ema must lie in memory, got a view of its negative")
    if ema_.dtype != torch.float32:
        raise TypeError(f"ema must be float32, got {_name(ema_.dtype)}")


def fold(ema_: Tensor, num_updates: Tensor | None, total: Tensor, momentum_: float) -> None:
    """A moving average ``[D]`` and the feature sum ``[D + 1]`` that it takes in."""
    _kept(ema_)
    shaped(total, (ema_.shape[0] + 1,), "total")
    if total.dtype != torch.float32:
        raise TypeError(f"total must be float32, got {_name(total.dtype)}")
    same_device(total, ema_, "total", "ema")
    momentum(momentum_)
    counter(num_updates, ema_, "num_updates")


def ema(ema_: Tensor, x: Tensor, momentum_: float, mask: Tensor | None) -> None:
    _kept(ema_)
    features(x, ema_.shape[0])
    same_device(ema_, x, "ema", "x")
    momentum(momentum_)
    row_mask(mask, x)


def counter(value: Tensor | None, x: Tensor, name: str) -> None:
    if value is not None:
        shaped(value, (), name)
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {_name(value.dtype)}")
        same_device(value, x, name, "x")


def labels(value: Tensor, num_classes: int, ignore_index: int | None, shape: Sequence[int], name: str) -> None:
    """int64 class labels, of which ``ignore_index`` stands for none."""
    shaped(value, shape, name)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {_name(value.dtype)}")
    if not readable(value) or value.numel() == 0:
        return
    lowest, highest = map(int, value.aminmax())
    if lowest >= 0 and highest < num_classes:  # as they mostly are: a pass instead of six
        return
    wrong = (value < 0) | (value >= num_classes)
    if ignore_index is not None:
        wrong &= value != ignore_index
    if wrong.any():
        other = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise ValueError(f"{name} must be in [0, {num_classes}){other}, got {value[wrong][0].item()}")


def cross_entropy(
    rows: Tensor,
    num_classes: int,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    target_b: Tensor | None = None,
    lam: float | Tensor = 1.0,
    focal_exponent: float = 0.0,
    reduction: str = "mean",
) -> None:
    """The loss of ``rows [..., any]``, features or logits."""
    shape = rows.shape[:-1]
    int64(ignore_index, "ignore_index")
    for name, value in (("target", target), ("target_b", target_b)):
        if value is not None:
            labels(value, num_classes, ignore_index, shape, name)
            same_device(value, rows, name, "x")
    for name, vector in (("class_weight", class_weight), ("logit_bias", logit_bias), ("margin", margin)):
        class_vector(vector, rows, num_classes, name)
    finite(label_smoothing, "label_smoothing")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if isinstance(lam, Tensor):
        scalar(lam, "lam")
        reachable(lam, rows, "lam")
    if not isinstance(lam, Tensor) or readable(lam):
        share = float(lam.detach()) if isinstance(lam, Tensor) else lam
        finite(share, "lam")
        if not 0 <= share <= 1:
            raise ValueError(f"lam must be in [0, 1], got {share}")
    finite(focal_exponent, "focal_exponent")
    if focal_exponent < 0:
        raise ValueError(f"focal_exponent must not be negative, got {focal_exponent}")
    if not isinstance(reduction, str) or reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be one of 'none', 'mean', 'sum', got {reduction!r}")
