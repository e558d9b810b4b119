"""Second stages: what each takes from the first, what it trains, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tde_trainer.config import load_config
from tde_trainer.data import DATASETS
from tde_trainer.methods import METHODS, Batch, SecondStage, Stage
from tde_trainer.methods.ncm import Centred, class_means
from tde_trainer.methods.oltr import Memory, margin_loss
from tde_trainer.network import Network, build_network
from tde_trainer.schema import HeadConfig, LossConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trainer_tools import FIRST_STAGE, SECOND_STAGE, TINY, Tde

C, D, N = 4, 6, 40
RECIPE = ("train", "digits_lt", *TINY, "stage_two.epochs=2", "stage_two.lr=0.05")


class Trained:
    """A stage 1 made up."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(C, D, generator=generator) * torch.tensor([3.0, 1.5, 0.8, 0.3])[:, None]
        self.y = torch.arange(N) % C
        self.x = self.weight[self.y] + 2 * torch.randn(N, D, generator=generator) + 1

    def features(self, split: str) -> tuple[Tensor, Tensor]:
        half = slice(N // 2) if split == "train" else slice(N // 2, N)
        return self.x[half], self.y[half]


def begun(name: str) -> tuple[nn.Module, Any, dict[str, Any], Trained]:
    """Neck and head of a method, as they are before training, and what it chose."""
    method, first = METHODS[name], Trained()
    assert isinstance(method, SecondStage)
    neck = method.build_neck(D, C)
    head = method.build_head(neck.features, C, HeadConfig(), LossConfig())
    chosen = method.begin(neck.module, head, first)
    return neck.module.eval(), head.eval(), chosen, first


def scores(neck: nn.Module, head: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = head(neck(x), alpha=0.0)
    return logits


class TestClassifiers:
    """Against formulas written out, on features made up."""

    @pytest.mark.parametrize("name", ["joint", "lws"])
    def test_they_begin_with_the_logits_of_stage_1(self, name: str) -> None:
        neck, head, _, first = begun(name)
        torch.testing.assert_close(scores(neck, head, first.x), first.x @ first.weight.T)

    def test_crt_begins_with_a_fresh_classifier(self) -> None:
        _, head, _, first = begun("crt")
        assert head.normalizer == "linear" and not torch.allclose(head.weight, first.weight, atol=0.1)

    def test_tau_norm_takes_the_exponent_that_is_best_on_validation_data(self) -> None:
        neck, head, chosen, first = begun("tau_norm")
        x, y = first.features("val")
        weight = first.weight.double()
        accuracies = []
        for p in chosen["exponents"]:
            predicted = (x.double() @ (weight / weight.norm(dim=1, keepdim=True) ** p).T).argmax(1)
            accuracies.append(sum((predicted[y == c] == c).double().mean().item() for c in range(C)) / C)
        assert chosen["exponents"] == pytest.approx([i / 10 for i in range(21)])
        assert chosen["val"] == pytest.approx(accuracies) and len(set(accuracies)) > 2
        assert chosen["exponent"] == chosen["exponents"][accuracies.index(max(accuracies))] != 0
        wanted = first.x.double() @ (weight / weight.norm(dim=1, keepdim=True) ** chosen["exponent"]).T
        torch.testing.assert_close(scores(neck, head, first.x).double(), wanted, rtol=1e-5, atol=1e-5)

    def test_ncm_is_minus_the_squared_distance(self) -> None:
        neck, head, _, first = begun("ncm")
        x, y = first.features("train")
        mean = x.double().mean(0)

        def unit(features: Tensor) -> Tensor:
            centred = features.double() - mean
            return centred / centred.norm(dim=1, keepdim=True)

        means = torch.stack([unit(x)[y == c].mean(0) for c in range(C)])
        wanted = -((unit(first.x)[:, None] - means) ** 2).sum(-1)
        torch.testing.assert_close(scores(neck, head, first.x).double() - 1, wanted, rtol=1e-5, atol=1e-5)

    def test_ncm_leaves_nan_out_where_a_feature_is_the_mean(self) -> None:
        neck = Centred(D)
        assert neck(torch.zeros(1, D)).tolist() == [[0.0] * D + [1.0]]

    def test_class_means_are_summed_in_double(self) -> None:
        x = torch.cat([torch.full((1, 1), 2.0**25), torch.ones(32, 1), torch.full((1, 1), -(2.0**25))])
        assert class_means(x, torch.zeros(34, dtype=torch.long), 1).item() == torch.tensor(32 / 34).item()

    def test_lws_trains_its_scales_alone(self) -> None:
        _, head, _, _ = begun("lws")
        groups = METHODS["lws"].parameter_groups(nn.Linear(2, 2), nn.Identity(), head)
        assert [p for group in groups for p in group["params"]] == [head.class_scale]


class TestOLTR:
    """Memory and margin."""

    def test_centroids_are_the_class_means(self) -> None:
        neck, _, _, first = begun("oltr")
        x, y = first.features("train")
        assert isinstance(neck, Memory)
        for c in range(C):
            torch.testing.assert_close(neck.centroids[c].detach(), x[y == c].mean(0))

    def test_the_embedding_is_the_formula(self) -> None:
        neck, head, _, first = begun("decouple_oltr")
        assert isinstance(neck, Memory)
        exact = {name: p.detach().double() for name, p in neck.named_parameters()}
        x, centroids = first.x.double(), exact["centroids"]
        recalled = (x @ exact["recall.weight"].T + exact["recall.bias"]).softmax(1) @ centroids
        select = (x @ exact["select.weight"].T + exact["select.bias"]).tanh()
        nearest = torch.stack([(x - c).norm(dim=1) for c in centroids]).amin(0)
        wanted = (10 / nearest)[:, None] * (x + select * recalled)
        torch.testing.assert_close(neck(first.x).double(), wanted, rtol=1e-4, atol=1e-4)
        w = head.weight.detach().double()
        capsule = wanted / (wanted.norm(dim=1, keepdim=True) + 1)
        logits = 16 * capsule @ (w / w.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(scores(neck, head, first.x).double(), logits, rtol=1e-4, atol=1e-4)

    def test_a_feature_on_its_centroid_is_finite_with_its_gradients(self) -> None:
        neck = Memory(D, C)
        x = torch.zeros(2, D, requires_grad=True)
        (neck(x).sum() + neck.distances(x).sum()).backward()
        assert x.grad is not None and x.grad.isfinite().all() and neck(x).isfinite().all()

    @pytest.mark.parametrize("margin", [0.0, 1.0, 5.0])
    def test_the_margin_loss(self, margin: float) -> None:
        distances, target = torch.rand(7, C) * 4, torch.arange(7) % C
        rows = [
            max(0.0, row[t] - sum(d for c, d in enumerate(row) if c != t) / (C - 1) + margin)
            for row, t in zip(distances.tolist(), target.tolist(), strict=True)
        ]
        assert margin_loss(distances, target, margin).item() == pytest.approx(sum(rows) / 7, rel=1e-5)

    def test_the_loss_is_cross_entropy_and_the_weighted_margin(self) -> None:
        neck, head, _, first = begun("decouple_oltr")
        stage = Stage(torch.tensor([10] * C), 0.5, LossConfig(centroid_weight=0.3, centroid_margin=2.0))
        ours = METHODS["decouple_oltr"].loss(neck, head, first.x, Batch(first.x, first.y), stage)
        assert isinstance(neck, Memory)
        apart = margin_loss(neck.distances(first.x), first.y, 2.0)
        wanted = cross_entropy(scores(neck, head, first.x), first.y) + 0.3 * apart
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)

    def test_what_stage_1_learned_is_trained_at_a_tenth(self) -> None:
        neck, head, _, _ = begun("oltr")
        backbone = nn.Linear(2, 2)
        groups = METHODS["oltr"].parameter_groups(backbone, neck, head)
        factor = {id(p): group["lr_factor"] for group in groups for p in group["params"]}
        assert len(factor) == len([*backbone.parameters(), *neck.parameters(), *head.parameters()])
        assert isinstance(neck, Memory)
        slow = [*backbone.parameters(), neck.centroids]
        assert {i for i, f in factor.items() if f == 0.1} == {id(p) for p in slow}


@pytest.mark.parametrize("name", SECOND_STAGE)
def test_schedules(name: str) -> None:
    own = {"crt": 10, "lws": 5, "decouple_oltr": 10, "oltr": 7}.get(name, 0)
    config = load_config("digits_lt", ["train.epochs=7", f"method={name}", "from=RUN", "train.lr=0.3"])
    schedule = METHODS[name].schedule(config)
    assert (schedule.epochs, schedule.sampler) == (own, "class_aware")
    assert schedule.lr == (0.3 if name == "oltr" else 0.2)
    config.stage_two.epochs = 3
    assert METHODS[name].schedule(config).epochs == (3 if own else 0)


@pytest.fixture(scope="module")
def second(tiny_run: Path, tde: Tde, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All second stages after ``linear`` of the tiny run, its seed 1."""
    run = tmp_path_factory.mktemp("runs") / "second"
    methods = f"methods=[{','.join(SECOND_STAGE)}]"
    result = tde(*RECIPE, methods, "seeds=[1]", f"from={tiny_run}", f"out={run}")
    assert result.exit_code == 0, result.output
    return run


def state(cell: Path) -> dict[str, Tensor]:
    content: dict[str, Tensor] = torch.load(cell / "checkpoint.pt", weights_only=True)["network"]
    return content


class TestRuns:
    """Through the command line."""

    @pytest.mark.parametrize("name", SECOND_STAGE)
    def test_the_backbone_is_that_of_stage_1_and_stays_so_where_it_is_frozen(
        self, name: str, second: Path, tiny_run: Path
    ) -> None:
        ours, theirs = state(second / name / "seed1"), state(tiny_run / "linear/seed1")
        keys = [key for key in theirs if key.startswith("backbone.")]
        same = [torch.equal(ours[key], theirs[key]) for key in keys]
        assert all(same) if name != "oltr" else not any(same)
        assert any("running_mean" in key for key in keys)

    def test_results_say_what_they_come_from(self, second: Path, tiny_run: Path) -> None:
        for name in SECOND_STAGE:
            cell = json.loads((second / name / "seed1/results.json").read_text())
            assert cell["stage_two"]["from"] == str(tiny_run / "linear/seed1")
            assert cell["epochs"] == (2 if METHODS[name].schedule(load_config("digits_lt")).epochs else 0)
        assert "exponent" in json.loads((second / "tau_norm/seed1/results.json").read_text())["stage_two"]

    def test_joint_has_the_accuracy_of_stage_1(self, second: Path, tiny_run: Path) -> None:
        ours, theirs = (
            json.loads((cell / "results.json").read_text())["accuracy"]["without_tde"]
            for cell in (second / "joint/seed1", tiny_run / "linear/seed1")
        )
        assert ours == theirs

    def test_lws_keeps_the_weight_and_learns_scales(self, second: Path, tiny_run: Path) -> None:
        ours, theirs = state(second / "lws/seed1"), state(tiny_run / "linear/seed1")
        assert torch.equal(ours["head.weight"], theirs["head.weight"])
        assert not torch.equal(ours["head.class_scale"], torch.ones(10))

    def test_eval_repeats_the_accuracies_from_the_checkpoints(self, second: Path, tde: Tde) -> None:
        rows = json.loads((second / "results.json").read_text())["rows"]
        result = tde("eval", second)
        assert result.exit_code == 0, result.output
        cells = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
        assert {row[1].strip(): row[-2].strip() for row in cells} == {
            row["name"]: f"{100 * row['overall']['mean']:.1f}" for row in rows
        }

    def test_a_resumed_second_stage_ends_in_the_same_bits_without_stage_1(
        self, second: Path, tiny_run: Path, tde: Tde, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved, run = tmp_path / "first", tmp_path / "run"
        shutil.copytree(tiny_run, moved)
        command = (*RECIPE, "method=crt", "seeds=[1]", f"from={moved}", f"out={run}")
        with monkeypatch.context() as patch:
            patch.setattr("tde_trainer.progress.Reporter.epoch_done", interrupted)
            assert tde(*command).exit_code == 130
        assert tde(*command, "resume=true").exit_code == 0
        ours, whole = state(run / "crt/seed1"), state(second / "crt/seed1")
        assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in ours)

    def test_a_method_s_folder_is_a_stage_1_too(self, tiny_run: Path, tde: Tde, tmp_path: Path) -> None:
        run = tmp_path / "run"
        result = tde(*RECIPE, "method=ncm", "seeds=[0]", f"from={tiny_run / 'deconfound'}", f"out={run}")
        assert result.exit_code == 0, result.output
        cell = json.loads((run / "ncm/seed0/results.json").read_text())
        assert cell["stage_two"]["from"].endswith("deconfound/seed0")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


class TestRefusals:
    """Bad input."""

    def refused(self, tde: Tde, *arguments: str) -> str:
        result = tde(*RECIPE, *arguments)
        assert result.exit_code == 2, result.output
        return " ".join(result.stderr.split())

    def test_a_second_stage_without_a_first(self, tde: Tde) -> None:
        assert "method crt is a second stage: from=RUN" in self.refused(tde, "method=crt")

    def test_a_first_stage_with_a_first(self, tde: Tde, tiny_run: Path) -> None:
        assert "method linear is a first stage" in self.refused(tde, "method=linear", f"from={tiny_run}")

    def test_no_such_run_method_or_seed(self, tde: Tde, tiny_run: Path, tmp_path: Path) -> None:
        out = f"out={tmp_path / 'out'}"
        for run, seed in ((tmp_path, 0), (tiny_run / "cosine", 0), (tiny_run, 7)):
            said = self.refused(tde, "method=ncm", f"from={run}", f"seeds=[{seed}]", out)
            assert f"from={run}: no finished training in" in said and f"seed {seed}" in said
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("key", "value"), [("model.features", 16), ("data.ratio", 20.0), ("data.val_per_class", 6)]
    )
    def test_features_that_do_not_fit(self, tde: Tde, tiny_run: Path, key: str, value: float, tmp_path: Path) -> None:
        said = self.refused(
            tde, "method=ncm", f"from={tiny_run}", "seeds=[0]", f"{key}={value}", f"out={tmp_path / 'out'}"
        )
        assert "its features do not fit" in said and f"while this is {key}={value}" in said

    def test_a_second_stage_as_first(self, tde: Tde, second: Path, tmp_path: Path) -> None:
        said = self.refused(tde, "method=ncm", f"from={second / 'crt'}", "seeds=[1]", f"out={tmp_path / 'out'}")
        assert "crt is a second stage itself" in said

    @pytest.mark.parametrize("name", ["joint", "tau_norm", "lws"])
    def test_a_classifier_that_is_not_linear(self, name: str, tde: Tde, tiny_run: Path, tmp_path: Path) -> None:
        first = f"from={tiny_run / 'deconfound'}"
        said = self.refused(tde, f"method={name}", first, "seeds=[0]", f"out={tmp_path / 'out'}")
        assert "deconfound has a deconfound classifier; wanted is a linear one" in said


def network_of(name: str) -> Network:
    config = load_config("digits_lt", [*TINY, f"method={name}", *(["from=RUN"] if name in SECOND_STAGE else [])])
    data = DATASETS["digits_lt"](config.data, 0)
    return build_network(config, name, data.channels, data.num_classes)


@pytest.mark.parametrize("name", [*FIRST_STAGE, *SECOND_STAGE])
def test_what_wants_a_gradient_is_what_is_trained(name: str) -> None:
    network = network_of(name)
    trained = {id(p) for group in network.parameter_groups() for p in group["params"]}
    assert {id(p) for p in network.parameters() if p.requires_grad} == trained
    frozen = name in SECOND_STAGE and name != "oltr"
    assert network.train().backbone.training != frozen and network.head.training
    assert any(p.requires_grad for p in network.backbone.parameters()) != frozen
