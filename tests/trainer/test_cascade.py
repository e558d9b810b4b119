"""Cascade Mask R-CNN: a direction for each stage, what is reported of images, and the ways of reading it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from tde_trainer.detection import cascade
from tde_trainer.detection.cascade import CascadeRoIHeads
from tde_trainer.detection.detector import build_detector, read_with
from tde_trainer.detection.losses import equalization_loss
from tde_trainer.detection.models import BACKBONES
from tde_trainer.detection.predictor import BoxPredictor
from tde_trainer.detection.schema import DetectionConfig, DetectionDataConfig, DetectionLossConfig, DetectorConfig
from tde_trainer.errors import UserError
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import batched_nms, clip_boxes_to_image

from tde_kernels import reference

COUNTS = torch.tensor([50, 20, 3, 1])  # images of each class, of 60: with a share of 0.1 two are rare
SIDE = 64
Images = tuple[list[Tensor], list[dict[str, Tensor]]]


def detector(method: str = "deconfound", loss: str = "", **model: Any) -> GeneralizedRCNN:
    """A small one in training, its weights following from the seed."""
    torch.manual_seed(0)
    sizes = {"representation": 16, "proposals": 24, "box_batch": 16, "score_threshold": 0.0, **model}
    config = DetectionConfig(
        data=DetectionDataConfig(min_size=SIDE, max_size=SIDE),
        model=DetectorConfig(**{"name": "small", **sizes}),
        loss=DetectionLossConfig(name=loss, rare_share=0.1),
    )
    return build_detector(config, method, COUNTS, 60)


def heads_of(model: GeneralizedRCNN) -> CascadeRoIHeads:
    return cast(CascadeRoIHeads, model.roi_heads)


def scene(height: int, width: int, labels: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """An image with an object for every label; none is an image of nothing."""
    boxes = torch.tensor([[4.0 + 9 * n, 6.0, 26.0 + 9 * n, 30.0] for n in range(len(labels))]).reshape(-1, 4)
    masks = torch.zeros(len(labels), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    target = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}
    return torch.rand(3, height, width), target


def batch(*labels: list[int]) -> Images:
    """Of images that differ in size."""
    sizes = [(64, 64), (48, 80), (70, 50)]
    scenes = [scene(*sizes[place % 3], own) for place, own in enumerate(labels)]
    return [image for image, _ in scenes], [target for _, target in scenes]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


class Watch:
    """What passes the stages in one forward: boxes, features, labels and scores, an entry for each stage."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        self.boxes: list[list[Tensor]] = []
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.scores: list[Tensor] = []
        for stage in heads_of(model).stages:
            stage.box_roi_pool.register_forward_pre_hook(lambda _, given: self.boxes.append(given[1]))
            stage.box_head.register_forward_hook(lambda _, __, x: self.features.append(x.detach()))
            stage.box_predictor.head.register_forward_hook(lambda _, __, z: self.scores.append(z.detach()))
            stage.select_training_samples = self._sampled(stage.select_training_samples)

    def _sampled(self, select: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            sampled = select(*arguments)
            self.labels.append(torch.cat(sampled[2]))
            return sampled

        return watched


def trained() -> GeneralizedRCNN:
    """After two steps, in evaluation: its directions are not those of one batch."""
    model = detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for labels in ([1, 2], [3]):
        total(model(*batch(labels, [4]))).backward()
        optimizer.step()
    return model.eval()


class TestTraining:
    """Losses and directions."""

    def test_every_stage_has_a_direction_of_its_own(self) -> None:
        model = detector()
        watch = Watch(model)
        model(*batch([1, 2], [4], []))
        heads = [predictor.head for predictor in heads_of(model).predictors]
        assert len(heads) == len(watch.features) == 3
        for head, x, labels in zip(heads, watch.features, watch.labels, strict=True):
            assert (labels > 0).any() and (labels == 0).any()
            torch.testing.assert_close(head.ema, x[labels > 0].mean(0))
            assert head.num_updates == 1
        assert not any(torch.allclose(one.ema, two.ema) for one, two in zip(heads, heads[1:] + heads[:1], strict=True))

    def test_losses_are_finite_and_reach_every_parameter(self) -> None:
        model = detector()
        losses = model(*batch([1, 2], [4]))
        named = {f"loss_{part}_{stage}" for part in ("classifier", "box") for stage in range(3)}
        assert named | {"loss_mask", "loss_objectness", "loss_rpn_box_reg"} == losses.keys()
        total(losses).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or "fpn" in name or "mask" in name, name

    def test_stages_count_as_the_cascade_weighs_them(self) -> None:
        found = []
        for weights in ((1.0, 0.5, 0.25), (1.0, 1.0, 1.0)):
            model = detector()
            assert heads_of(model).weights == (1.0, 0.5, 0.25)
            heads_of(model).weights = weights
            torch.manual_seed(1)
            found.append(model(*batch([1, 2], [4])))
        for part in ("classifier", "box"):
            for stage, weight in enumerate((1.0, 0.5, 0.25)):
                name = f"loss_{part}_{stage}"
                torch.testing.assert_close(found[0][name], weight * found[1][name])

    def test_stages_ask_for_more_and_more_overlap(self) -> None:
        stages = heads_of(detector()).stages
        assert [stage.proposal_matcher.high_threshold for stage in stages] == [0.5, 0.6, 0.7]
        assert [stage.proposal_matcher.low_threshold for stage in stages] == [0.5, 0.6, 0.7]
        assert [stage.box_coder.weights for stage in stages] == [(f, f, f / 2, f / 2) for f in (10.0, 20.0, 30.0)]
        assert all(stage.box_predictor.class_agnostic for stage in stages)

    @pytest.mark.parametrize("method", ["linear", "focal", "eql", "softmax_eql", "cosine", "capsule", "deconfound"])
    @pytest.mark.parametrize("labels", [([], [1]), ([], [])], ids=["one image empty", "all empty"])
    def test_images_of_nothing_do_no_harm(self, labels: Any, method: str) -> None:
        model = detector(method)
        losses = model(*batch(*labels))
        total(losses).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        for predictor in heads_of(model).predictors:
            assert predictor.head.num_updates == int(any(labels)) and predictor.head.ema.isfinite().all()

    def test_targets_must_be_given(self) -> None:
        with pytest.raises(ValueError, match="targets must be given in training, got None"):
            heads_of(detector())({}, [torch.zeros(1, 4)], [(SIDE, SIDE)])

    def test_the_sigmoid_loss_has_no_background(self) -> None:
        model = detector("eql")
        watch, heads = Watch(model), heads_of(model)
        losses = model(*batch([1, 2], [4]))
        rare = torch.tensor([False, False, True, True])
        for stage, weight in enumerate(heads.weights):
            assert watch.scores[stage].shape[1] == len(COUNTS)
            wanted = weight * equalization_loss(watch.scores[stage], watch.labels[stage], rare)
            torch.testing.assert_close(losses[f"loss_classifier_{stage}"], wanted)


def scores_of(model: GeneralizedRCNN, image: Tensor) -> tuple[Watch, Tensor, dict[str, Tensor]]:
    """What passes the stages, the sorted probabilities that were reported, and the detections."""
    heads = heads_of(model)
    heads.nms_threshold, heads.detections = 1.0, 10**6  # all boxes of all classes
    watch = Watch(model)
    with torch.no_grad():
        (found,) = model([image])
    return watch, found["scores"].sort().values, found


class TestDetecting:
    """What evaluation reports."""

    def test_scores_are_the_softmax_of_the_mean_of_log_probabilities(self) -> None:
        watch, scores, _ = scores_of(trained(), torch.rand(3, SIDE, SIDE))
        log_p = torch.stack(watch.scores)
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(log_p.shape[:2]))
        wanted = log_p.double().mean(0).softmax(-1)[:, 1:]
        assert len(scores) == wanted.numel()
        torch.testing.assert_close(scores.double(), wanted.flatten().sort().values, rtol=1e-5, atol=1e-8)

    def test_of_sigmoids_they_are_those_of_the_mean(self) -> None:
        model = detector("eql").eval()
        watch, scores, found = scores_of(model, torch.rand(3, SIDE, SIDE))
        wanted = torch.stack(watch.scores).mean(0).sigmoid()
        torch.testing.assert_close(scores, wanted.flatten().sort().values)
        assert found["labels"].unique().tolist() == [1, 2, 3, 4]

    def test_every_stage_moves_the_boxes_of_the_one_before(self) -> None:
        model = trained()
        watch, _, found = scores_of(model, torch.rand(3, SIDE, SIDE))
        moved = []
        for stage, x, boxes in zip(heads_of(model).stages, watch.features, watch.boxes, strict=True):
            decoded = stage.box_coder.decode(stage.box_predictor.bbox_pred(x).detach(), boxes)[:, 0]
            moved.append(clip_boxes_to_image(decoded, (SIDE, SIDE)))
        for (given,), wanted in zip(watch.boxes[1:], moved, strict=False):
            torch.testing.assert_close(given, wanted)
        assert not torch.allclose(moved[1], moved[2])
        torch.testing.assert_close(found["boxes"].unique(dim=0), moved[2].unique(dim=0))

    def test_images_of_any_size_have_boxes_and_masks_of_their_own(self) -> None:
        model = trained()
        images = batch([1], [2], [])[0]
        with torch.no_grad():
            found = model(images)
        for image, own in zip(images, found, strict=True):
            height, width = image.shape[1:]
            assert own["masks"].shape == (len(own["boxes"]), 1, height, width)
            assert len(own["boxes"]) and (own["boxes"] >= 0).all()
            assert (own["boxes"][:, 2] <= width + 1e-3).all() and (own["boxes"][:, 3] <= height + 1e-3).all()
            assert (own["scores"].diff() <= 0).all() and set(own["labels"].tolist()) <= {1, 2, 3, 4}

    def test_no_image_has_more_detections_than_asked_for(self) -> None:
        model = trained()
        heads_of(model).detections = 7
        with torch.no_grad():
            assert [len(own["boxes"]) for own in model(batch([1], [2])[0])] == [7, 7]

    def test_scores_below_the_threshold_are_not_reported(self) -> None:
        model, image = trained(), torch.rand(3, SIDE, SIDE)
        _, scores, _ = scores_of(model, image)
        heads_of(model).score_threshold = middle = scores.median().item()
        with torch.no_grad():
            (found,) = model([image])
        assert torch.equal(found["scores"].sort().values, scores[scores > middle])
        heads_of(model).score_threshold = 1.0
        with torch.no_grad():
            (found,) = model([image])
        assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 1, SIDE, SIDE)

    @pytest.mark.parametrize("candidates", [10_000, 60])
    def test_boxes_are_suppressed_class_by_class(self, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cascade, "CANDIDATES", candidates)
        heads = heads_of(detector())
        corners = 40 * torch.rand(50, 2)
        boxes = torch.cat([corners, corners + 20], 1)
        boxes[3, 2:] = boxes[3, :2] + 1e-4  # too small
        scores = torch.rand(50, 4)
        found = heads._kept(boxes, scores)
        all_boxes, labels = boxes.repeat_interleave(4, 0), torch.arange(1, 5).repeat(50)
        flat = scores.flatten()
        allowed = flat.argsort(descending=True)[:candidates]
        allowed = allowed[allowed // 4 != 3]
        keep = allowed[batched_nms(all_boxes[allowed], flat[allowed], labels[allowed], 0.5)]
        assert torch.equal(found["boxes"], all_boxes[keep]) and torch.equal(found["labels"], labels[keep])

    def test_without_proposals_nothing_is_found_and_nothing_lost(self) -> None:
        model = detector()
        maps = cast(dict[str, Tensor], model.backbone(torch.rand(1, 3, SIDE, SIDE)))
        none, shapes = [torch.empty(0, 4)], [(SIDE, SIDE)]
        heads = heads_of(model)
        losses = heads(maps, none, shapes, [scene(SIDE, SIDE, [])[1]])[1]
        assert all(loss.item() == 0 for loss in losses.values())
        (found,) = heads.eval()(maps, none, shapes)[0]
        assert found["boxes"].shape == (0, 4) and len(found["labels"]) == len(found["scores"]) == 0

    @pytest.mark.parametrize("shared", [False, True])
    def test_masks_may_be_of_each_class_or_of_all(self, shared: bool) -> None:
        model = detector(class_agnostic_masks=shared)
        masks = heads_of(model).masks
        assert masks is not None
        seen: list[Tensor] = []
        masks.register_forward_hook(lambda _, __, logits: seen.append(logits))
        model(*batch([1, 2], [4]))["loss_mask"].backward()
        last = cast(nn.Conv2d, masks.predictor.mask_fcn_logits)
        assert last.weight.grad is not None
        touched = last.weight.grad.flatten(1).any(1)
        assert touched.tolist() == ([True] if shared else [False, True, True, False, True])
        model.eval()
        with torch.no_grad():
            (found,) = heads_of(model)(model.backbone(torch.rand(1, 3, SIDE, SIDE)), *proposals())[0]
        of = torch.zeros_like(found["labels"]) if shared else found["labels"]
        wanted = seen[-1].sigmoid()[torch.arange(len(of)), of]
        torch.testing.assert_close(found["masks"][:, 0], wanted)


def proposals() -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Of one image, and its size."""
    corners = 30 * torch.rand(10, 2)
    return [torch.cat([corners, corners + 20], 1)], [(SIDE, SIDE)]


def equations(predictor: BoxPredictor, x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Eq. 7 and Eq. 8 in float64."""
    head = predictor.head
    operands = x.double(), head.weight.detach().double()
    family = {"num_heads": head.num_heads, "tau": head.tau, "gamma": head.gamma}
    direction = reference.head_direction(head.ema.double(), num_heads=head.num_heads)
    return reference.grouped_logits(*operands, **family), reference.tde_logits(
        *operands, direction, alpha=alpha, **family
    )


@pytest.fixture(scope="module")
def model() -> GeneralizedRCNN:
    return trained()


class TestReading:
    """Without TDE, with it, and with it for the background too."""

    @pytest.fixture
    def x(self) -> Tensor:
        return torch.randn(40, 16).relu()

    def test_alpha_0_is_no_tde(self, model: GeneralizedRCNN, x: Tensor) -> None:
        with read_with(model, 0.0):
            for predictor in heads_of(model).predictors:
                plain, _ = equations(predictor, x, 0.0)
                torch.testing.assert_close(predictor.head(x).double(), plain.log_softmax(-1), rtol=1e-5, atol=1e-5)

    def test_the_background_is_exempt(self, model: GeneralizedRCNN, x: Tensor) -> None:
        for predictor in heads_of(model).predictors:
            found = []
            for alpha in (0.0, 1.5, 3.0):
                with read_with(model, alpha):
                    found.append(predictor.head(x))
            torch.testing.assert_close(found[1][:, 0], found[0][:, 0])
            torch.testing.assert_close(found[2][:, 0], found[0][:, 0])
            assert not torch.allclose(found[1][:, 1:], found[0][:, 1:], rtol=1e-3)
            plain, direct = equations(predictor, x, 1.5)
            log_p = plain.log_softmax(-1)
            wanted = torch.log1p(-log_p[:, :1].exp()) + direct[:, 1:].log_softmax(-1)
            torch.testing.assert_close(found[1][:, 1:].double(), wanted, rtol=1e-5, atol=1e-5)

    def test_without_exemption_it_is_the_direct_effect_on_all_classes(self, model: GeneralizedRCNN, x: Tensor) -> None:
        with read_with(model, 1.5, exempt=False):
            for predictor in heads_of(model).predictors:
                _, direct = equations(predictor, x, 1.5)
                torch.testing.assert_close(predictor.head(x).double(), direct, rtol=1e-5, atol=1e-5)

    def test_the_detections_differ(self, model: GeneralizedRCNN) -> None:
        image, found = torch.rand(3, SIDE, SIDE), []
        for way in ({"alpha": 0.0}, {"alpha": 1.5}, {"alpha": 1.5, "exempt": False}):
            with torch.no_grad(), read_with(model, **way):  # type: ignore[arg-type]
                found.append(model([image])[0]["scores"])
        assert not any(torch.equal(one, two) for one, two in zip(found, found[1:] + found[:1], strict=True))

    def test_what_was_is_restored_whatever_happens(self, model: GeneralizedRCNN) -> None:
        before = [(p.head.alpha.item(), p.head.background_index) for p in heads_of(model).predictors]
        with pytest.raises(KeyError), read_with(model, 0.25, exempt=False):
            assert {p.head.background_index for p in heads_of(model).predictors} == {None}
            raise KeyError
        assert [(p.head.alpha.item(), p.head.background_index) for p in heads_of(model).predictors] == before
        assert before == [(1.5, 0)] * 3


class TestBuilding:
    """By recipe."""

    @pytest.mark.parametrize("name", BACKBONES)
    def test_every_backbone(self, name: str) -> None:
        with torch.device("meta"):
            model = detector(name=name)
        assert len(heads_of(model).predictors) == 3
        assert all(parameter.requires_grad for parameter in model.parameters())
        blocks = sum(isinstance(module, nn.Conv2d) for module in model.backbone.modules())
        least = {"small": 7, "resnet50": 53, "resnet101": 104, "resnext101_32x8d": 104, "resnext101_64x4d": 104}
        assert blocks > least[name]

    def test_resnet50_trains_and_evaluates(self) -> None:
        model = detector(name="resnet50", proposals=8)
        losses = model(*batch([1]))
        total(losses).backward()
        assert all(loss.isfinite() for loss in losses.values())
        with torch.no_grad():
            assert model.eval()([torch.rand(3, SIDE, SIDE)])[0]["masks"].shape[1:] == (1, SIDE, SIDE)

    def test_heads_that_do_not_divide_the_channels_are_the_users_error(self) -> None:
        with pytest.raises(UserError, match=r"^head of method 'deconfound': .*num_heads"):
            detector(representation=15)

    @pytest.mark.parametrize(
        ("method", "wanted"),
        [("linear", (1, 1.0, 0.0)), ("cosine", (2, 16.0, 0.0)), ("deconfound", (2, 16.0, 1 / 32))],
    )
    def test_figures_of_the_head_are_the_normalizers(self, method: str, wanted: tuple[int, float, float]) -> None:
        heads = [predictor.head for predictor in heads_of(detector(method)).predictors]
        assert [(head.num_heads, head.tau, head.gamma) for head in heads] == [wanted] * 3
