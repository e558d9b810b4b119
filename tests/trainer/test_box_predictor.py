"""The head as torchvision's box predictor: swapped into its detectors, trained, evaluated, kept, and refused."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tde_trainer.detection import BoxPredictor, ForegroundTold, replace_box_predictor
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import detection as zoo
from torchvision.models.detection import roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou

from tde_kernels import reference

D, C = 12, 4  # of a predictor by itself: channels, and classes with the background
CLASSES = 5  # of a detector, with the background
SMALL: dict[str, Any] = {
    "min_size": 64,
    "max_size": 64,
    "rpn_pre_nms_top_n_train": 64,
    "rpn_post_nms_top_n_train": 32,
    "rpn_pre_nms_top_n_test": 32,
    "rpn_post_nms_top_n_test": 16,
    "box_batch_size_per_image": 16,
    "box_score_thresh": 0.0,
}
Images = tuple[list[Tensor], list[dict[str, Tensor]]]


def pictures() -> Images:
    """Two images of different sizes, of one object and of two."""
    boxes = [torch.tensor([[5.0, 8.0, 40.0, 44.0]]), torch.tensor([[2.0, 3.0, 30.0, 33.0], [30.0, 10.0, 60.0, 40.0]])]
    labels = [torch.tensor([1]), torch.tensor([3, 2])]
    sizes = [(64, 64), (48, 64)]
    masks = [torch.zeros(len(own), *size, dtype=torch.uint8) for own, size in zip(labels, sizes, strict=True)]
    for own, inside in zip(boxes, masks, strict=True):
        for mask, (left, top, right, bottom) in zip(inside, own.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
    targets = [{"boxes": b, "labels": n, "masks": m} for b, n, m in zip(boxes, labels, masks, strict=True)]
    return [torch.rand(3, *size) for size in sizes], targets


def nothing() -> Images:
    """An image that shows no object."""
    target = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    return [torch.rand(3, 64, 64)], [{**target, "masks": torch.empty(0, 64, 64, dtype=torch.uint8)}]


def predictor_of(model: nn.Module) -> BoxPredictor:
    """That of its RoI heads."""
    predictor = model.get_submodule("roi_heads.box_predictor")
    assert isinstance(predictor, BoxPredictor)
    return predictor


class Watch:
    """What passes a detector's box head, its labels in training, and its scores."""

    def __init__(self, model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        self.features, self.labels, self.scores = torch.empty(0), torch.empty(0), torch.empty(0)
        head, predictor, loss = model.get_submodule("roi_heads.box_head"), predictor_of(model), roi_heads.fastrcnn_loss
        self._hooks = [head.register_forward_hook(self._head), predictor.register_forward_hook(self._predictor)]

        def watched(logits: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]) -> Any:
            self.labels = torch.cat(labels)
            return loss(logits, deltas, labels, targets)

        patch.setattr(roi_heads, "fastrcnn_loss", watched)

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def _head(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.features = output.detach().flatten(1)

    def _predictor(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        self.scores = output[0].detach()

    @property
    def foreground_mean(self) -> Tensor:
        """Of the batch's features."""
        return self.features[self.labels > 0].mean(0)


def exempted(predictor: BoxPredictor, x: Tensor) -> Tensor:
    """Eq. 9 of features ``x [N, D]``, in float64."""
    head = predictor.head
    assert head.background_index is not None
    direction = reference.head_direction(head.ema.double(), num_heads=head.num_heads)
    return reference.background_exempt(
        x.double(),
        head.weight.detach().double(),
        direction,
        alpha=head.alpha.item(),
        background_index=head.background_index,
        num_heads=head.num_heads,
        tau=head.tau,
        gamma=head.gamma,
    )


@dataclass(frozen=True)
class Stepped:
    """A detector of torchvision's after a swap, one step of training and one evaluation."""

    model: nn.Module
    weight: Tensor  # of the classifier before the swap
    seen: dict[str, Tensor]
    losses: dict[str, Tensor]
    before: dict[str, Tensor]  # the predictor's parameters
    found: list[dict[str, Tensor]]


DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
)


@pytest.fixture(scope="module", params=DETECTORS)
def stepped(request: pytest.FixtureRequest) -> Stepped:
    torch.manual_seed(0)
    build: Callable[..., nn.Module] = getattr(zoo, request.param)
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES, **SMALL)
    weight = model.get_parameter("roi_heads.box_predictor.cls_score.weight").detach().clone()

    model = replace_box_predictor(model, alpha=1.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: value.detach().clone() for name, value in predictor_of(model).named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(model, patch)
        losses: dict[str, Tensor] = model(*pictures())
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        seen = {"mean": watch.foreground_mean, "foreground": watch.labels > 0}
        with torch.no_grad():
            found = model.eval()(pictures()[0])
        seen |= {"x": watch.features, "scores": watch.scores}
        watch.close()
    return Stepped(model, weight, seen, losses, before, found)


class TestInTorchvisionsDetectors:
    """Dropped into each of them."""

    def test_the_classifiers_weights_are_taken_over(self, stepped: Stepped) -> None:
        assert torch.equal(stepped.before["head.weight"], stepped.weight)

    def test_losses_are_finite_and_reach_every_parameter(self, stepped: Stepped) -> None:
        assert all(loss.isfinite() for loss in stepped.losses.values())
        for name, parameter in predictor_of(stepped.model).named_parameters():
            assert parameter.grad is not None and parameter.grad.any() and parameter.grad.isfinite().all(), name
            assert not torch.equal(parameter, stepped.before[name]), name

    def test_the_direction_takes_in_the_foreground(self, stepped: Stepped) -> None:
        head, foreground = predictor_of(stepped.model).head, stepped.seen["foreground"]
        assert foreground.any() and not foreground.all()
        torch.testing.assert_close(head.ema, stepped.seen["mean"])
        assert head.num_updates == 1

    def test_torchvisions_softmax_gives_the_exempted_probabilities(self, stepped: Stepped) -> None:
        wanted = exempted(predictor_of(stepped.model), stepped.seen["x"])
        scores = stepped.seen["scores"].softmax(-1)
        torch.testing.assert_close(scores.double(), wanted, rtol=1e-4, atol=1e-7)
        found = {name: torch.cat([own[name] for own in stepped.found]) for name in ("labels", "scores", "boxes")}
        assert len(found["scores"]) and found["labels"].min() >= 1 and found["boxes"].isfinite().all()
        for label, score in zip(found["labels"], found["scores"].double(), strict=True):
            assert (wanted[:, label] - score).abs().min() <= 1e-4 * score

    def test_masks_are_found_beside(self, stepped: Stepped) -> None:
        for image, found in zip(pictures()[0], stepped.found, strict=True):
            if "masks" in found:
                assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[1:])


def unswapped(num_classes: int = 3) -> zoo.FasterRCNN:
    """Torchvision's Faster R-CNN on three convolutions."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
        for before, after in ((3, 16), (16, 32), (32, 32))
    ]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = 32  # type: ignore[assignment]
    return zoo.FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((24,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
        box_head=TwoMLPHead(32 * 5**2, 32),
        box_predictor=FastRCNNPredictor(32, num_classes),
        **SMALL,
    )


def tiny() -> nn.Module:
    """That with our predictor."""
    return replace_box_predictor(unswapped(), alpha=1.0)


def shapes(count: int) -> Images:
    """A bright square (label 1) or disc (label 2) of 24 pixels, in images of 64."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    places = torch.arange(64) + 0.5
    for number in range(count):
        image, label = 0.2 * torch.rand(3, 64, 64, generator=generator), 1 + number % 2
        left, top = torch.randint(2, 38, (2,), generator=generator).tolist()
        across, down = (places - left - 12).abs(), (places - top - 12).abs()[:, None]
        inside = (across < 12) & (down < 12) if label == 1 else across**2 + down**2 < 144
        image[:, inside] = torch.tensor([0.9, 0.5, 0.1] if label == 1 else [0.1, 0.6, 0.9])[:, None]
        images.append(image)
        box = torch.tensor([[left, top, left + 24, top + 24]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([label])})
    return images, targets


class TestTraining:
    """Of a small detector."""

    def test_it_learns_to_find_shapes(self) -> None:
        model, (images, targets) = tiny(), shapes(8)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            loss = torch.stack(list(model(images, targets).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]
        with torch.no_grad():
            found = model.eval()(images)
        for own, target in zip(found, targets, strict=True):
            assert own["labels"][0] == target["labels"] and own["scores"][0] > 0.5
            assert box_iou(own["boxes"][:1], target["boxes"]) > 0.5
        assert predictor_of(model).head.num_updates == 40

    def test_a_batch_without_foreground_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny()
        head, watch = predictor_of(model).head, Watch(model, monkeypatch)
        model(*shapes(2))
        ema = head.ema.clone()
        losses = model(*nothing())
        torch.stack(list(losses.values())).sum().backward()
        assert all(loss.isfinite() for loss in losses.values()) and not watch.labels.any()
        assert torch.equal(head.ema, ema) and head.num_updates == 1
        assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)

    def test_an_image_of_nothing_beside_another_does_no_harm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny()
        watch = Watch(model, monkeypatch)
        (first, second), (full, empty) = zip(shapes(1), nothing(), strict=True)
        assert all(loss.isfinite() for loss in model(first + second, full + empty).values())
        torch.testing.assert_close(predictor_of(model).head.ema, watch.foreground_mean)

    def test_evaluation_leaves_the_direction_alone(self) -> None:
        model = tiny()
        model(*shapes(2))
        before = deepcopy(predictor_of(model).state_dict())
        model.eval()(shapes(2)[0])
        after = predictor_of(model).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class TestKeeping:
    """Copies and files."""

    @pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_is_the_same_and_trains_by_itself(self, copy: Callable[[nn.Module], nn.Module]) -> None:
        model = tiny()
        model(*shapes(2))
        other = copy(model)
        (one,), (two,) = (m.eval()(shapes(1)[0]) for m in (model, other))
        assert all(torch.equal(one[name], two[name]) for name in one)
        other.train()(*shapes(2))
        assert (predictor_of(model).head.num_updates, predictor_of(other).head.num_updates) == (1, 2)

    def test_a_state_dict_carries_direction_and_alpha(self) -> None:
        model, other = tiny(), tiny()
        model(*shapes(2))
        predictor_of(model).head.alpha = 0.7
        other.load_state_dict(model.state_dict())
        (one,), (two,) = (m.eval()(shapes(1)[0]) for m in (model, other))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert torch.equal(predictor_of(other).head.ema, predictor_of(model).head.ema)
        assert predictor_of(other).head.alpha.item() == pytest.approx(0.7)


class TestPredictor:
    """By itself."""

    @pytest.mark.parametrize("background", [0, C - 1, -1])
    def test_the_background_may_be_first_or_last(self, background: int) -> None:
        predictor = BoxPredictor(D, C, background_index=background, alpha=1.2)
        x, labels = torch.randn(30, D), torch.arange(30) % C
        predictor.foreground = labels != background % C
        logits, deltas = predictor(x)
        head = predictor.head
        family = {"num_heads": head.num_heads, "tau": head.tau, "gamma": head.gamma}
        total = reference.grouped_logits(x.double(), head.weight.detach().double(), **family)
        torch.testing.assert_close(logits.double(), total, rtol=1e-5, atol=1e-5)
        assert deltas.shape == (30, 4 * C)
        torch.testing.assert_close(head.ema, x[labels != background % C].mean(0))
        scores = predictor.eval()(x)[0]
        wanted = exempted(predictor, x)
        torch.testing.assert_close(scores.double(), wanted.log(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wanted[:, background], total.softmax(-1)[:, background])

    def test_without_a_background_evaluation_is_the_direct_effect(self) -> None:
        predictor = BoxPredictor(D, C, background_index=None, alpha=1.2)
        x = torch.randn(30, D)
        predictor.foreground = torch.ones(30, dtype=torch.bool)
        predictor(x)
        head = predictor.eval().head
        assert torch.equal(predictor(x)[0], head(x)) and not torch.allclose(head(x), head(x, alpha=0.0))

    def test_pooled_maps_are_flattened(self) -> None:
        predictor, x = BoxPredictor(D, C).eval(), torch.randn(5, D)
        assert all(map(torch.equal, predictor(x), predictor(x[:, :, None, None])))

    def test_one_regression_for_all_classes(self) -> None:
        predictor = BoxPredictor(D, C, class_agnostic=True).eval()
        deltas = predictor(torch.randn(5, D))[1].reshape(5, C, 4)
        assert predictor.bbox_pred.out_features == 4 and torch.equal(deltas, deltas[:, :1].expand(-1, C, -1))

    def test_scores_keep_their_bits_under_autocast(self) -> None:
        predictor, x = BoxPredictor(D, C, alpha=1.2), torch.randn(30, D).bfloat16()
        predictor.foreground = torch.ones(30, dtype=torch.bool)
        predictor(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            scores = predictor.eval()(x)[0]
        torch.testing.assert_close(scores.double(), exempted(predictor, x.float()).log(), rtol=1e-5, atol=1e-5)

    def test_no_box_at_all(self) -> None:
        predictor = BoxPredictor(D, C)
        predictor.foreground = torch.empty(0, dtype=torch.bool)
        scores, deltas = predictor(torch.empty(0, D))
        assert scores.shape == (0, C) and deltas.shape == (0, 4 * C) and predictor.head.num_updates == 0

    @pytest.mark.parametrize(("told", "words"), [(None, "got nothing"), (3, "got 3 boxes")])
    def test_training_wants_to_know_the_foreground(self, told: int | None, words: str) -> None:
        predictor = BoxPredictor(D, C)
        predictor.foreground = None if told is None else torch.ones(told, dtype=torch.bool)
        with pytest.raises(RuntimeError, match=f"foreground must say which of 5 boxes .*{words}"):
            predictor(torch.randn(5, D))
        assert predictor.eval()(torch.randn(5, D))[0].shape == (5, C)

    @pytest.mark.parametrize("background", [C, -C - 1, 17])
    def test_a_background_outside_the_classes_is_refused(self, background: int) -> None:
        with pytest.raises(ValueError, match="background_index"):
            BoxPredictor(D, C, background_index=background)


class OwnRoIHeads(RoIHeads):
    """Of a user, who forgot `ForegroundTold`."""


class ToldRoIHeads(ForegroundTold, RoIHeads):
    """Of a user who did not."""


class TestSwapping:
    """What is taken over, and what is refused."""

    @pytest.fixture
    def model(self) -> nn.Module:
        """Not yet swapped."""
        return unswapped()

    def test_the_model_itself_comes_back_with_all_that_was_set_on_it(self, model: nn.Module) -> None:
        heads = model.get_submodule("roi_heads")
        old = heads.box_predictor
        assert replace_box_predictor(model.eval()) is model
        new = predictor_of(model)
        assert model.roi_heads is heads and heads.score_thresh == 0.0 and not new.training
        assert torch.equal(new.head.weight, old.cls_score.weight)
        assert all(map(torch.equal, new.bbox_pred.parameters(), old.bbox_pred.parameters()))

    def test_the_number_of_classes_may_change(self, model: nn.Module) -> None:
        replace_box_predictor(model, num_classes=7, num_heads=4)
        head = predictor_of(model).head
        assert (head.num_classes, head.num_heads, head.weight.shape) == (7, 4, (7, 32))
        assert all(loss.isfinite() for loss in model(*pictures()).values())

    def test_masks_follow_the_number_of_classes(self, model: nn.Module) -> None:
        heads = model.get_submodule("roi_heads")
        heads.mask_roi_pool = MultiScaleRoIAlign(["0"], 8, 2)
        heads.mask_head, heads.mask_predictor = MaskRCNNHeads(32, (8,), 1), MaskRCNNPredictor(8, 8, 3)
        images, targets = pictures()
        for target in targets:
            target["labels"] = torch.full_like(target["labels"], 6)
        losses = replace_box_predictor(model, num_classes=7)(images, targets)
        assert losses["loss_mask"].isfinite() and heads.mask_predictor(torch.ones(1, 8, 8, 8)).shape[1] == 7

    def test_one_regression_for_all_classes(self, model: nn.Module) -> None:
        replace_box_predictor(model, class_agnostic=True)
        losses = model(*shapes(2))
        losses["loss_box_reg"].backward()
        assert predictor_of(model).bbox_pred.weight.grad.any()
        assert all(own["boxes"].shape[1] == 4 for own in model.eval()(shapes(2)[0]))

    def test_dtype_follows_the_model(self, model: nn.Module) -> None:
        replace_box_predictor(model.double())
        predictor = predictor_of(model)
        assert {value.dtype for value in predictor.parameters()} == {torch.float64}
        assert predictor.head.ema.dtype == torch.float32

    def test_own_roi_heads_tell_by_a_base(self, model: nn.Module) -> None:
        model.get_submodule("roi_heads").__class__ = ToldRoIHeads
        replace_box_predictor(model)(*shapes(2))
        assert type(model.roi_heads) is ToldRoIHeads and predictor_of(model).head.num_updates == 1

    def test_other_roi_heads_are_refused(self, model: nn.Module) -> None:
        model.get_submodule("roi_heads").__class__ = OwnRoIHeads
        with pytest.raises(TypeError, match="ForegroundTold as its first base, got OwnRoIHeads"):
            replace_box_predictor(model)

    def test_detectors_without_are_refused(self) -> None:
        model = zoo.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
        with pytest.raises(TypeError, match=r"must be torchvision's RoIHeads.* got NoneType"):
            replace_box_predictor(model)

    @pytest.mark.parametrize("predictor", [nn.Identity(), BoxPredictor(32, 3)])
    def test_other_predictors_are_refused(self, predictor: nn.Module, model: nn.Module) -> None:
        model.get_submodule("roi_heads").box_predictor = predictor
        with pytest.raises(TypeError, match=f"linear cls_score and bbox_pred, got {type(predictor).__name__}"):
            replace_box_predictor(model)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"background_index": 2}, "background_index must be 0 in torchvision's RoI heads, got 2"),
            ({"num_classes": 0}, "num_classes"),
            ({"num_heads": 5}, "num_heads"),
        ],
    )
    def test_what_the_head_refuses_leaves_the_model_whole(
        self, options: dict[str, Any], words: str, model: nn.Module
    ) -> None:
        with pytest.raises(ValueError, match=words):
            replace_box_predictor(model, **options)
        assert type(model.roi_heads) is RoIHeads and model.roi_heads.box_predictor.cls_score.out_features == 3


WORLD = 2


def check_ranks(rank: int) -> None:
    """Ranks with one object, with three, and with none."""
    model = tiny()
    network = DistributedDataParallel(model, find_unused_parameters=True)
    head, ema = predictor_of(model).head, torch.zeros(32)
    every, (no_image, no_target) = shapes(4), nothing()
    parts = [tuple(of[:1] for of in every), tuple(of[1:] for of in every)]
    for step, batches in enumerate((parts, [(no_image, no_target), parts[1]], [(no_image, no_target)] * 2)):
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(model, patch)
            torch.stack(list(network(*batches[rank]).values())).sum().backward()
            watch.close()
        pooled: list[Any] = [None] * WORLD
        dist.all_gather_object(pooled, (watch.features[watch.labels > 0], head.ema))
        features = torch.cat([own for own, _ in pooled])
        ema = head.momentum * ema + features.mean(0) if len(features) else ema
        torch.testing.assert_close(head.ema, ema)
        assert all(torch.equal(head.ema, other) for _, other in pooled)
        assert head.num_updates == min(step + 1, 2)


def worker(rank: int, port: int) -> None:
    """A process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        check_ranks(rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_two_processes_hold_one_direction() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port,), nprocs=WORLD, join=True)
