"""The module's contract: what it does in training and evaluation, what it keeps, and how one comes by it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracle import NORMALIZERS, assert_close, naive_logits, problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tde_kernels import FusedTDEHead, reference, replace_head, use_backend
from tde_kernels import functional as F

D, C = 12, 7


def head_of(**kwargs: Any) -> FusedTDEHead:
    """A head that has a direction and weights worth looking at."""
    head = FusedTDEHead(D, C, **kwargs)
    with torch.no_grad():
        head.weight.normal_()
        if head.class_scale is not None:
            head.class_scale.uniform_(0.5, 1.5)
    head.fit_direction(torch.randn(50, D) + 1)
    return head


def family(head: FusedTDEHead) -> dict[str, Any]:
    return {
        "num_heads": head.num_heads,
        "tau": head.tau,
        "gamma": head.gamma,
        "normalizer": head.normalizer,
        "exponent": head.exponent,
        "class_scale": head.class_scale,
    }


def test_defaults_and_initial_state() -> None:
    head = FusedTDEHead(64, 100)
    assert (head.num_heads, head.tau, head.gamma, head.momentum) == (2, 16.0, 1 / 32, 0.9)
    assert head.alpha == 3 and head.normalizer == "deconfound" and head.background_index is None
    assert head.weight.shape == (100, 64) and head.weight.abs().max() <= 64**-0.5
    assert head.weight.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.05)  # uniform
    assert (head.head_direction == 0).all() and head.num_updates == 0
    assert "64, 100" in repr(head) and "deconfound" in repr(head)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_training_is_eq7_and_takes_the_batch_in(normalizer: str) -> None:
    head = head_of(normalizer=normalizer, num_heads=3)
    x, before = torch.randn(4, 5, D, requires_grad=True), head.ema.clone()
    out = head(x)
    torch.testing.assert_close(out, reference.grouped_logits(x, head.weight, **family(head)))
    torch.testing.assert_close(head.ema, 0.9 * before + x.detach().mean((0, 1)))
    assert head.num_updates == 2
    out.sum().backward()
    assert x.grad is not None and all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_evaluation_is_eq8_and_takes_nothing_in(normalizer: str) -> None:
    head = head_of(normalizer=normalizer, num_heads=3, alpha=1.7).eval()
    x, state = torch.randn(4, 5, D), copy.deepcopy(head.state_dict())
    want = reference.tde_logits(x, head.weight, head.head_direction, alpha=1.7, **family(head))
    torch.testing.assert_close(head(x), want)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), head.state_dict().values(), strict=True))
    plain = reference.grouped_logits(x, head.weight, **family(head))
    assert not torch.allclose(want, plain)
    torch.testing.assert_close(head(x, alpha=0.0), plain)


@pytest.mark.parametrize("background", [0, -1])
def test_evaluation_with_a_background_is_the_log_of_eq9(background: int) -> None:
    head = head_of(background_index=background, alpha=1.2).eval()
    x = torch.randn(6, D)
    arguments = {"background_index": background, **family(head)}
    for alpha in (1.2, 0.4):
        want = reference.background_exempt(x, head.weight, head.head_direction, alpha=alpha, **arguments)
        torch.testing.assert_close(head(x, alpha=alpha).softmax(-1), want)
    with torch.no_grad():
        torch.testing.assert_close(head(x).softmax(-1), head(x).exp())
    head.train()
    torch.testing.assert_close(head(x), reference.grouped_logits(x, head.weight, **family(head)))


def test_alpha_per_call_and_its_setter() -> None:
    head, x = head_of().eval(), torch.randn(4, D)
    once = head(x, alpha=1.5)
    assert torch.equal(once, head(x, alpha=torch.tensor(1.5))) and head.alpha == 3
    assert not torch.equal(once, head(x))
    head.alpha = 1.5
    assert torch.equal(once, head(x)) and head.alpha == 1.5
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        head.alpha = float("nan")
    with pytest.raises(ValueError, match="alpha must be finite"):
        head(x, alpha=float("inf"))
    kept = head.alpha
    head.alpha = 0.0
    head.alpha = kept
    assert head.alpha == 1.5


def test_mask_says_which_rows_the_average_takes() -> None:
    head, x = FusedTDEHead(D, C), torch.randn(4, 5, D)
    mask = torch.rand(4, 5) > 0.5
    logits = head(x, mask=mask)
    torch.testing.assert_close(head.ema, x[mask].mean(0))
    head(x, mask=torch.zeros(4, 5, dtype=torch.bool))
    torch.testing.assert_close(head.ema, x[mask].mean(0))
    assert head.num_updates == 1
    assert torch.equal(logits, head(x))  # logits are of all rows


def test_a_momentum_schedule() -> None:
    head, x = FusedTDEHead(D, C), torch.ones(3, D)
    head(x)
    head.momentum = 0.5
    head(x)
    torch.testing.assert_close(head.ema, torch.full((D,), 1.5))


def test_empty_batches() -> None:
    head = head_of()
    before = head.ema.clone()
    assert head(torch.zeros(0, D)).shape == (0, C) and torch.equal(head.ema, before) and head.num_updates == 1
    head.eval()
    assert head(torch.zeros(2, 0, D)).shape == (2, 0, C)
    assert head.predict(torch.zeros(0, D), topk=2)[1].shape == (0, 2)


def test_before_the_first_update_evaluation_is_eq7() -> None:
    head, x = FusedTDEHead(D, C).eval(), torch.randn(4, D)
    torch.testing.assert_close(head(x), reference.grouped_logits(x, head.weight, **family(head)))


@pytest.mark.parametrize("normalizer", ["deconfound", "lws"])
def test_state_dict_round_trip(normalizer: str) -> None:
    head = head_of(normalizer=normalizer)
    head.alpha = 0.7
    head(torch.randn(5, D))
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    other = FusedTDEHead(D, C, normalizer=normalizer)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(5, D)
    assert torch.equal(other.eval()(x), head.eval()(x))
    assert other.num_updates == 2 and other.alpha == pytest.approx(0.7) and torch.equal(other.ema, head.ema)
    rounded = {name: a.bfloat16() if a.is_floating_point() else a for name, a in head.state_dict().items()}
    other.load_state_dict(rounded, assign=True)
    assert other.weight.dtype == torch.bfloat16 and other.ema.dtype == other.alpha.dtype == torch.float32


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(clone: Any) -> None:
    head, x = head_of(background_index=2), torch.randn(5, D)
    other = clone(head)
    assert torch.equal(other.eval()(x), head.eval()(x))
    other.train()(x)
    assert other.num_updates == 2 and head.num_updates == 1 and not torch.equal(other.ema, head.ema)


CASTS = [
    lambda h: h.half(),
    lambda h: h.bfloat16(),
    lambda h: h.to(torch.float16),
    lambda h: h.double(),
    lambda h: nn.Sequential(h).bfloat16()[0],
]


@pytest.mark.parametrize("cast", CASTS, ids=["half", "bfloat16", "to", "double", "in a module"])
def test_the_average_stays_float32(cast: Any) -> None:
    head = head_of(alpha=1.3)
    exact = head.ema.clone()
    head = cast(head)
    assert head.ema.dtype == torch.float32 and torch.equal(head.ema, exact) and head.alpha.dtype == torch.float32
    assert head.weight.dtype != torch.float32 and head.num_updates.dtype == torch.int64
    x = torch.randn(9, D).to(head.weight.dtype)
    assert head(x).dtype == x.dtype and head.eval()(x).dtype == x.dtype
    assert head.ema.dtype == torch.float32 and head.num_updates == 2
    assert {"ema", "num_updates", "tde_alpha"} <= set(dict(head.named_buffers()))


def test_float64_is_served_to_the_last_bits() -> None:
    head = head_of(dtype=torch.float64, alpha=1.5)
    x = torch.randn(9, D, dtype=torch.float64)
    p = problem(9, D, C, 2).cast(torch.float64)
    want = naive_logits(type(p)(x, head.weight.detach(), None, None, 2, "deconfound"))
    torch.testing.assert_close(head(x), want, rtol=1e-12, atol=1e-12)


def test_device_and_dtype_of_construction() -> None:
    head = FusedTDEHead(D, C, device="meta", dtype=torch.bfloat16)
    assert head.weight.device.type == head.ema.device.type == "meta" and head.ema.dtype == torch.float32
    ready = head.to_empty(device="cpu")
    ready.reset_parameters()
    assert ready.weight.isfinite().all() and ready.ema.dtype == torch.float32 and (ready.ema == 0).all()


def test_fit_direction_is_the_mean_of_a_stream() -> None:
    batches = [torch.randn(n, D) + 1 for n in (1, 40, 0, 7)]
    read = []

    def stream() -> Iterator[Tensor]:
        for batch in batches:
            read.append(len(batch))
            yield batch

    head = FusedTDEHead(D, C)
    assert head.fit_direction(stream()) is head
    assert read == [1, 40, 0, 7]
    torch.testing.assert_close(head.ema, torch.cat(batches).mean(0))
    torch.testing.assert_close(head.head_direction.view(2, -1).norm(dim=1), torch.ones(2))
    head.fit_direction(batches[1].view(4, 10, D))  # a tensor is one batch, and starts anew
    torch.testing.assert_close(head.ema, batches[1].mean(0))
    before = head.ema.clone()
    for nothing in ([], [torch.zeros(0, D)]):
        with pytest.raises(ValueError, match="batches must hold at least one feature"):
            head.fit_direction(nothing)
    with pytest.raises(ValueError, match=r"batches must have shape \[\.\.\., 12\], got \(3, 5\)"):
        head.fit_direction([torch.zeros(3, 5)])
    assert torch.equal(head.ema, before)  # nothing half done
    head.fit_direction(batches[1].bfloat16())
    assert head.ema.dtype == torch.float32


def biased_problem() -> tuple[FusedTDEHead, Tensor, Tensor]:
    """Two classes; class 0 owns the mean direction, so that samples of 1 are found at alpha 1 and not at 0."""
    head = FusedTDEHead(2, 2, num_heads=1, gamma=0.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.2, 1.0]]))
    head.fit_direction(torch.tensor([[1.0, 0.0]]))
    x = torch.tensor([[1.0, -0.5], [1.0, -0.4], [1.0, -0.3], [1.0, 0.4]])
    return head, x, torch.tensor([0, 0, 0, 1])


def test_choose_alpha() -> None:
    head, x, y = biased_problem()
    correct = {a: (head.eval()(x, alpha=a).argmax(-1) == y).tolist() for a in (0.0, 1.0, 8.0)}
    assert correct[0.0] == [True] * 3 + [False] and all(correct[1.0])
    assert head.choose_alpha(x, y, [8.0, 1.0, 0.0]) == 1.0 and head.alpha == 1.0
    assert head.choose_alpha(x, y, [1.2, 1.0, 1.1]) == 1.0  # a tie goes to the smallest
    assert head.choose_alpha(x, y, torch.tensor([0.0])) == 0.0
    assert head.choose_alpha(x, y, [0.0, 1.0], metric="accuracy") == 1.0
    calls = []

    def worst(predicted: Tensor, labels: Tensor) -> float:
        calls.append(predicted)
        assert labels is y
        return -float((predicted == labels).float().mean())

    assert head.choose_alpha(x, y, [0.0, 1.0], metric=worst) == 0.0 and len(calls) == 2


def test_metrics_differ_where_classes_do() -> None:
    """At alpha 0 the three of class 0 are right, at the other the one of class 1 and a single one of class 0."""
    head, x, y = biased_problem()
    x = x.clone()
    x[:3, 1] = torch.tensor([0.1, 0.2, -0.3])
    right = {a: (head.eval()(x, alpha=a).argmax(-1) == y).float() for a in (0.0, 1.0)}
    assert right[0.0].mean() > right[1.0].mean() and right[1.0][3] == 1 and right[1.0][:3].sum() == 1
    assert head.choose_alpha(x, y, [0.0, 1.0], metric="accuracy") == 0.0
    assert head.choose_alpha(x, y, [0.0, 1.0]) == 1.0


def test_choose_alpha_refuses() -> None:
    head, x, y = biased_problem()
    for arguments, message in [
        ((x, y, []), "alphas must not be empty"),
        ((x[:0], y[:0], [1.0]), r"x must have shape \[N, 2\] with N at least 1, got \(0, 2\)"),
        ((x[None], y[None], [1.0]), r"x must have shape \[N, 2\] with N at least 1, got \(1, 4, 2\)"),
        ((x, y, None, lambda p, y: 0.0), "alphas are needed where metric is a function"),
        ((x, y, [1.0], "harmonic_mean_of_shots"), r"class_counts \[C\] of the training set are wanted"),
        ((x, y - 100, [1.0]), r"y must be in \[0, 2\), got -100"),
        ((x, y, [1.0, float("nan")]), "alphas must be finite"),
        ((x, y + 1, [1.0]), r"y must be in \[0, 2\)"),
        ((x, y[:2], [1.0]), r"y must have shape \(4,\), got \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            head.choose_alpha(*arguments)
    with pytest.raises(ValueError, match=r"metric must be one of accuracy.*did you mean 'accuracy'"):
        head.choose_alpha(x, y, [1.0], metric="acuracy")
    assert head.alpha == 3
    with pytest.raises(ValueError, match="the head has no direction to choose an alpha for"):
        FusedTDEHead(2, 2).choose_alpha(x, y)
    with pytest.raises(ValueError, match="batches must hold finite features"):
        head.fit_direction([x, x / 0])


@pytest.mark.parametrize("background", [None, 0, 3])
def test_predict_and_alpha_sweep_follow_evaluation(background: int | None) -> None:
    head, x = head_of(background_index=background), torch.randn(3, 20, D)
    for mode in (head.train(), head.eval()):  # predictions are those of evaluation whatever the mode
        values, classes = mode.predict(x, topk=3)
        swept = mode.alpha_sweep(x, [0.0, 3.0])
    want = head(x).topk(3)
    torch.testing.assert_close(values, want.values)
    assert torch.equal(classes, want.indices)
    assert torch.equal(swept, torch.stack([head(x, alpha=a).argmax(-1) for a in (0.0, 3.0)]))
    assert head.num_updates == 1
    torch.testing.assert_close(head.predict(x, topk=2, alpha=0.5)[0], head(x, alpha=0.5).topk(2).values)
    assert head.predict(x)[1].shape[-1] == min(5, C) and FusedTDEHead(D, 3).predict(x)[1].shape[-1] == 3
    assert head.alpha_sweep(x, []).shape == (0, 3, 20)
    with pytest.raises(ValueError, match="at most the number of classes, 7, got 8"):
        head.predict(x, topk=8)


def test_loss_and_its_options() -> None:
    x, y = torch.randn(3, 4, D), torch.randint(C, (3, 4))
    y[0, 0] = -100
    counts = torch.arange(1, C + 1).float()
    head = head_of()
    logits = reference.grouped_logits(x, head.weight, **family(head))
    for options in (
        {},
        {"reduction": "none"},
        {"class_weight": 1 / counts, "label_smoothing": 0.1, "reduction": "sum"},
        {"logit_bias": counts.log()},
        {"margin": counts**-0.25, "focal_exponent": 2.0},
        {"target_b": y.flip(0), "lam": 0.4, "ignore_index": 2, "target": y.clamp_min(0)},
    ):
        options = dict(options)
        target = options.pop("target", y)
        if "target_b" in options:
            options["target_b"] = options["target_b"].clamp_min(0)
        want = reference.cross_entropy(logits, target, **options)
        torch.testing.assert_close(head.loss(x, target, **options), want)
    assert head.num_updates == 7
    assert head.eval().loss(x, y).dtype == torch.float32 and head.num_updates == 7
    head.train()
    head.loss(x, y, mask=y == 1)
    head.zero_grad()
    head.loss(x, y).backward()
    assert head.weight.grad is not None and head.weight.grad.isfinite().all()


def test_loss_of_16_bits_is_float32() -> None:
    head = head_of(dtype=torch.bfloat16)
    assert head.loss(torch.randn(5, D).bfloat16(), torch.randint(C, (5,))).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_takes_a_batch_in_once(reentrant: bool) -> None:
    head, plain = head_of(), head_of()
    plain.load_state_dict(head.state_dict())
    before, x = head.ema.clone(), torch.randn(6, D, requires_grad=True)
    out = checkpoint(head, x, use_reentrant=reentrant)
    out.square().sum().backward()
    assert head.num_updates == 2
    torch.testing.assert_close(head.ema, 0.9 * before + x.detach().mean(0))
    x_plain = x.detach().clone().requires_grad_()
    plain(x_plain).square().sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad)
    torch.testing.assert_close(head.weight.grad, plain.weight.grad)


def test_frozen_weights_and_frozen_features() -> None:
    head = head_of()
    head.weight.requires_grad_(False)
    x = torch.randn(5, D, requires_grad=True)
    head(x).sum().backward()
    assert head.weight.grad is None and x.grad is not None
    head.weight.requires_grad_(True)
    head(x.detach()).sum().backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        assert not head(x).requires_grad and head.num_updates == 4


@pytest.mark.parametrize("background", [None, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(dtype: torch.dtype, background: int | None) -> None:
    """Logits in autocast's dtype, losses and gradients in float32, an average that rounding does not touch."""
    head = head_of(background_index=background, alpha=1.0)
    x = (torch.randn(40, D) + 1).requires_grad_()
    start, upstream = head.ema.clone(), torch.randn(40, C)
    with torch.autocast("cpu", dtype):
        out = head(x)
        loss = head.loss(x, torch.zeros(40, dtype=torch.int64))
    assert out.dtype == dtype and loss.dtype == torch.float32
    torch.testing.assert_close(head.ema, 0.9 * (0.9 * start + x.detach().mean(0)) + x.detach().mean(0))
    grads = torch.autograd.grad(out, (x, head.weight), upstream.to(dtype))
    assert all(g.dtype == torch.float32 for g in grads)

    wide = [a.detach().double().requires_grad_() for a in (x, head.weight)]
    low = [a.detach().to(dtype).requires_grad_() for a in (x, head.weight)]
    want = reference.grouped_logits(*wide, **family(head))
    p = problem(40, D, C, 2)
    naive = naive_logits(type(p)(low[0], low[1], None, None, 2, "deconfound"))
    assert_close(out, naive, want)
    for got, theirs, right in zip(
        grads,
        torch.autograd.grad(naive, low, upstream.to(dtype)),
        torch.autograd.grad(want, wide, upstream.to(dtype).double()),
        strict=True,
    ):
        assert_close(got, theirs, right, "gradient")
    head.eval()
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert head(x).dtype == dtype and head(x).isfinite().all()
        assert head.predict(x, topk=2)[0].dtype == dtype


def test_autocast_training_learns() -> None:
    x = torch.randn(200, D)
    y = (x[:, :C] + 0.1 * torch.randn(200, C)).argmax(-1)
    head = FusedTDEHead(D, C)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16):
            loss = head.loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


def test_from_linear() -> None:
    linear = nn.Linear(D, C, bias=False, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = FusedTDEHead.from_linear(linear, num_heads=3, alpha=1.0)
    assert torch.equal(head.weight, linear.weight) and head.weight is not linear.weight
    assert head.num_heads == 3 and head.weight.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="bias is dropped"):
        FusedTDEHead.from_linear(nn.Linear(D, C))
    silent = nn.Linear(D, C)
    nn.init.zeros_(silent.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedTDEHead.from_linear(silent)
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv2d"):
        FusedTDEHead.from_linear(nn.Conv2d(1, 1, 1))


def test_a_linear_head_is_the_linear_layer() -> None:
    linear = nn.Linear(D, C, bias=False)
    head = FusedTDEHead.from_linear(linear, normalizer="linear", num_heads=1, tau=1.0)
    x = torch.randn(5, D)
    torch.testing.assert_close(head(x), linear(x))
    torch.testing.assert_close(head.eval()(x, alpha=0.0), linear(x))


def test_from_weight() -> None:
    weight = torch.randn(C, D, dtype=torch.float64)
    head = FusedTDEHead.from_weight(weight)
    assert torch.equal(head.weight, weight) and head.in_features == D and head.num_classes == C
    assert FusedTDEHead.from_weight(weight, dtype=torch.float32).weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"weight must have shape \[C, D\], got \(12,\)"):
        FusedTDEHead.from_weight(weight[0])
    with pytest.raises(TypeError, match="weight must be one of float64"):
        FusedTDEHead.from_weight(weight.long())


WEIGHT, EMBED = torch.randn(C, D), torch.randn(D)


def test_autocast_of_dtypes_that_no_kernel_serves() -> None:
    """The reference serves operands that a backend does not, whatever dtype they are multiplied in."""
    x, target = torch.randn(6, D), torch.zeros(6, dtype=torch.int64)
    for w_dtype, x_dtype in ((torch.float64, torch.float32), (torch.float16, torch.float16)):
        head = FusedTDEHead(D, C, dtype=w_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out, loss = head(x.to(x_dtype)), head.loss(x.to(x_dtype), target)
            assert out.dtype == torch.bfloat16 and loss.isfinite()
            assert head.eval().alpha_sweep(x.to(x_dtype), [0.0, 1.0]).shape == (2, 6)


PUBLISHED = {
    "flat": {"weight": WEIGHT, "embed": EMBED},
    "nested": {"state_dict_best": {"classifier": {"weight": WEIGHT}}, "embed": EMBED},
    "data parallel": {"state_dict": {"module.fc.weight": WEIGHT, "module.fc.bias": EMBED}, "embed": EMBED},
    "numpy": {"model": {"module.weight": WEIGHT.numpy()}, "embed": EMBED.numpy()},
    "a row": {"weight": WEIGHT, "embed": EMBED[None].numpy().astype(np.float64)},
    "a list": {"weight": WEIGHT, "embed": EMBED.tolist()},
    "a whole network": {
        "feat_model": {"conv.weight": torch.zeros(3, 3, 1, 1), "hidden.weight": torch.zeros(D, D)},
        "classifier": {"weight": WEIGHT},
        "embed": EMBED,
    },
    "a detector": {
        "roi_head.bbox_head.0.shared_fcs.1.weight": torch.zeros(D, D),
        "roi_head.bbox_head.0.fc_cls": WEIGHT,
        "roi_head.bbox_head.0.causal_embed": EMBED[None],
    },
    "beside what is no tensor": {
        "state_dict": {"fc.weight": WEIGHT},
        "embed": EMBED,
        "optimizer": torch.optim.SGD([torch.nn.Parameter(WEIGHT)], 0.1).state_dict(),
        "meta": {"CLASSES": ["a", "b"]},
    },
    "by width": {"a.weight": torch.zeros(4, 5), "b.weight": WEIGHT, "embed": EMBED, "epoch": 3},
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_load_published(case: str) -> None:
    head = FusedTDEHead.load_published(PUBLISHED[case], alpha=1.5)
    assert torch.equal(head.weight, WEIGHT) and head.num_updates == 1 and head.alpha == 1.5
    torch.testing.assert_close(head.ema, EMBED)
    x = torch.randn(4, D)
    direction = reference.head_direction(EMBED, num_heads=2)
    want = reference.tde_logits(x, WEIGHT, direction, alpha=1.5, num_heads=2, tau=16.0, gamma=1 / 32)
    torch.testing.assert_close(head.eval()(x), want)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"embed": EMBED}, "state must hold one classifier weight.*got none; its tensors are: embed"),
        ({"weight": WEIGHT}, "state must hold one moving average under 'embed', got none; its tensors are: weight"),
        ({"a.weight": WEIGHT, "b.weight": WEIGHT, "embed": EMBED}, "got 2: a.weight, b.weight"),
        ({"weight": WEIGHT, "a.embed": EMBED, "b.embed": EMBED}, "got 2: a.embed, b.embed"),
        ({"weight": WEIGHT, "embed": EMBED[:5]}, r"embed must have shape \(12,\)"),
    ],
    ids=["no weight", "no average", "two weights", "two averages", "widths"],
)
def test_load_published_refuses(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedTDEHead.load_published(state)


def test_load_published_wants_a_mapping() -> None:
    with pytest.raises(TypeError, match="state must be a mapping, got list"):
        FusedTDEHead.load_published([1])  # type: ignore[arg-type]


def test_replace_head_of_a_torchvision_network() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=10)
    weight = model.fc.weight.detach().clone()
    assert replace_head(model, alpha=1.5) is model
    assert isinstance(model.fc, FusedTDEHead) and torch.equal(model.fc.weight, weight) and model.fc.alpha == 1.5
    x = torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    assert model.fc.num_updates == 1 and model.conv1.weight.grad is not None
    assert model.eval()(x).shape == (2, 10)
    other = replace_head(torchvision.models.resnet18(), num_classes=7, num_heads=4)
    assert other.fc.weight.shape == (7, 512) and other.fc.num_heads == 4


def test_replace_head_of_a_nested_network() -> None:
    model = nn.Sequential(
        nn.Linear(3, D), nn.ModuleDict({"body": nn.ReLU(), "top": nn.Sequential(nn.Linear(D, C), nn.Dropout())})
    ).to(torch.bfloat16)
    model.eval()
    replace_head(model, num_heads=1)
    assert isinstance(model[0], nn.Linear) and isinstance(model[1]["top"][0], FusedTDEHead)
    assert model[1]["top"][0].weight.dtype == torch.bfloat16 and not model[1]["top"][0].training
    for bare in (nn.Sequential(nn.ReLU()), nn.Linear(3, 4)):
        with pytest.raises(ValueError, match=r"model must hold an nn\.Linear to replace, got a (Sequential|Linear)"):
            replace_head(bare)


def test_a_backend_by_name() -> None:
    x = torch.randn(5, D)
    head = head_of(backend="reference")
    same = head_of()
    same.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(x), same(x))
    with use_backend("reference"):
        assert torch.equal(same.eval()(x), head.eval()(x))
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        FusedTDEHead(D, C, backend="referense")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"in_features": 8.0}, TypeError, "in_features must be an int, got float"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 1, got -1"),
        ({"num_heads": 5}, ValueError, "num_heads must divide.*got 5 for 12"),
        ({"num_heads": True}, TypeError, "num_heads must be an int, got bool"),
        ({"tau": float("nan")}, ValueError, "tau must be finite, got nan"),
        ({"gamma": -0.1}, ValueError, "gamma must be finite and not negative, got -0.1"),
        ({"gamma": "1"}, TypeError, "gamma must be a number, got str"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite, got nan"),
        ({"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\], got 1.1"),
        ({"normalizer": "decofound"}, ValueError, "normalizer must be one of.*did you mean 'deconfound'"),
        ({"exponent": float("inf")}, ValueError, "exponent must be finite"),
        ({"background_index": 7}, ValueError, r"background_index must be in \[-7, 7\), got 7"),
        ({"background_index": 1.0}, TypeError, "background_index must be an int, got float"),
    ],
    ids=str,
)
def test_bad_construction(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"in_features": D, "num_classes": C, **kwargs}
    with pytest.raises(error, match=message):
        FusedTDEHead(arguments.pop("in_features"), arguments.pop("num_classes"), **arguments)


def test_bad_calls_leave_the_average_alone() -> None:
    head = head_of()
    before = head.ema.clone()
    for call, error, message in [
        (lambda: head(torch.zeros(3, D + 1)), ValueError, r"x must have shape \[\.\.\., 12\], got \(3, 13\)"),
        (lambda: head([1.0]), TypeError, "x must be a tensor, got list"),
        (lambda: head(torch.zeros(3, D).long()), TypeError, "x must be one of float64.*got int64"),
        (lambda: head(torch.zeros(3, D).bfloat16()), TypeError, "w must have the dtype of x, bfloat16, got float32"),
        (lambda: head(torch.zeros(3, D), mask=torch.ones(3)), TypeError, "mask must be bool, got float32"),
        (
            lambda: head(torch.zeros(3, D), mask=torch.ones(2, dtype=torch.bool)),
            ValueError,
            r"mask must have shape \(3,\), got \(2,\)",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(head.ema, before) and head.num_updates == 1


def test_a_bad_target_leaves_the_average_alone() -> None:
    """The step fails as a whole: no batch is taken in without its loss."""
    head = head_of()
    before = head.ema.clone()
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\)"):
        head.loss(torch.randn(3, D), torch.tensor([0, 7, 1]))
    with pytest.raises(ValueError, match="reduction must be one of"):
        head.loss(torch.randn(3, D), torch.tensor([0, 6, 1]), reduction="avg")
    with pytest.raises(TypeError, match="smoothing"):
        head.loss(torch.randn(3, D), torch.tensor([0, 6, 1]), smoothing=0.1)
    assert torch.equal(head.ema, before) and head.num_updates == 1


def test_functional_form_is_what_the_head_runs() -> None:
    head, x = head_of(), torch.randn(5, D)
    ema, count = head.ema.clone(), head.num_updates.clone()
    want = F.grouped_logits_with_ema_(x, head.weight, ema, count, momentum=0.9, **family(head))
    assert torch.equal(head(x), want) and torch.equal(head.ema, ema) and torch.equal(head.num_updates, count)
