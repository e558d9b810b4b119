"""Trained detectors read again from their checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tde_trainer import again, checkpoint, results
from tde_trainer.config import config_from, load_recipe
from tde_trainer.detection.restore import reader_of
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import load_set
from tde_trainer.errors import UserError
from tde_trainer.kinds import DETECTION
from tde_trainer.table import alpha_table
from torchvision.ops import FrozenBatchNorm2d
from trainer_tools import Tde


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def own(tiny_detectors: Path) -> dict[str, Any]:
    """What the de-confounded training measured itself."""
    values: dict[str, Any] = read(tiny_detectors / "deconfound/seed0/results.json")
    return values


class TestEval:
    """`tde eval`."""

    def test_it_measures_what_the_training_measured(self, tiny_detectors: Path) -> None:
        summary = again.evaluate_runs(tiny_detectors, None)
        written = read(tiny_detectors / "results.json")
        assert summary["rows"] == written["rows"] and summary["lift"] == written["lift"]
        suffixes = ["", " + TDE", " + TDE, background too"]
        assert [row["name"] for row in summary["rows"]] == ["linear", *(f"deconfound{suffix}" for suffix in suffixes)]

    def test_the_detections_are_those_that_were_written(self, tiny_detectors: Path, own: dict[str, Any]) -> None:
        (cell,) = results.finished_cells(tiny_detectors / "deconfound/seed0")
        config = config_from(cell.values["config"])
        assert isinstance(config, DetectionConfig)
        reader = reader_of(cell, config, load_set(config.data))
        found = dict(reader.in_every_way(own["alpha"]["value"]))
        for mode in DETECTION.modes:
            written = read(cell.directory / f"detections/{mode}.json")
            assert found[mode] == written and len(written) == 100
        scores = {mode: [entry["score"] for entry in entries] for mode, entries in found.items()}
        assert len({tuple(values) for values in scores.values()}) == 3  # three ways of reading indeed

    def test_alpha_0_is_no_tde_and_needs_no_exemption(self, tiny_detectors: Path) -> None:
        plain, *others = again.evaluate_runs(tiny_detectors / "deconfound/seed0", 0.0)["rows"]
        assert len(others) == 2
        for row in others:
            assert row | {"name": plain["name"]} == plain

    def test_another_alpha_is_told(self, tiny_detectors: Path, own: dict[str, Any], tde: Tde) -> None:
        result = tde("eval", tiny_detectors / "deconfound/seed0", "alpha=7")
        assert result.exit_code == 0 and "(alpha 7.00)" in result.output and "AP_bbox" in result.output
        assert own["alpha"]["value"] in (0.5, 1.5)

    def test_it_writes_nothing(self, tiny_detectors: Path, tde: Tde) -> None:
        before = {path: path.stat().st_mtime_ns for path in tiny_detectors.rglob("*")}
        assert tde("eval", tiny_detectors / "linear/seed0").exit_code == 0
        assert {path: path.stat().st_mtime_ns for path in tiny_detectors.rglob("*")} == before

    def test_a_checkpoint_that_is_gone_is_one_line(self, tiny_detectors: Path, tmp_path: Path, tde: Tde) -> None:
        shutil.copytree(tiny_detectors / "linear/seed0", tmp_path / "cell")
        (tmp_path / "cell/checkpoint.pt").unlink()
        result = tde("eval", tmp_path / "cell")
        assert (
            result.exit_code == 2 and result.output.strip() == f"error: no checkpoint at {tmp_path}/cell/checkpoint.pt"
        )

    def test_it_fetches_no_weights(self, tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of ImageNet, with which training began, are in the checkpoint."""
        changes = ["data.name=lvis", f"data.root={tiny_shapes}", "model.name=resnet50", "model.pretrained=true"]
        config = load_recipe("shapes_lvis", [*changes, "model.representation=16"])
        assert isinstance(config, DetectionConfig)
        monkeypatch.delattr("torchvision.models._api.load_state_dict_from_url")
        monkeypatch.setattr(checkpoint, "load", lambda directory, detector, origin: None)
        cell = results.Result(tmp_path, {"method": "deconfound", "seed": 0})
        detector = reader_of(cell, config, load_set(config.data)).detector
        assert any(isinstance(module, FrozenBatchNorm2d) for module in detector.modules())


class TestSweep:
    """`tde sweep`."""

    @pytest.fixture
    def copy(self, tiny_detectors: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_detectors, tmp_path / "run"))

    def test_the_recipes_alphas_by_themselves(self, copy: Path, own: dict[str, Any], tde: Tde) -> None:
        result = tde("sweep", copy)
        assert result.exit_code == 0 and "val AP" in result.output, result.output
        (curve,) = read(copy / "sweep.json").values()
        assert curve["alphas"] == [0, 0.5, 1.5] and curve["task"] == "detection"
        tried = {row["alpha"]: row["AP"] for row in own["alpha"]["tried"]}
        assert {a: p["mean"] for a, p in zip(curve["alphas"], curve["val"]["AP"], strict=True) if a} == tried
        for mode, alpha in (("without_tde", 0), ("with_tde", own["alpha"]["value"])):
            for measure in DETECTION.measures:
                point = curve["test"][measure][curve["alphas"].index(alpha)]
                assert point == results.mean_and_spread([own["accuracy"][mode][measure]])

    def test_other_alphas_and_no_validation_images(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cell = Path(shutil.copytree(copy / "deconfound/seed0", tmp_path / "cell"))
        values = read(cell / "results.json")
        folder = Path(shutil.copytree(values["config"]["data"]["root"], tmp_path / "lvis"))
        for split, name in (("train", "train"), ("test", "val")):
            shutil.copy(folder / f"{split}.json", folder / f"lvis_v1_{name}.json")
        values["config"]["data"] |= {"name": "lvis_v1", "root": str(folder)}
        values["config"]["head"]["alpha"] = 1.0
        (cell / "results.json").write_text(json.dumps(values))
        content = torch.load(cell / "checkpoint.pt", weights_only=True)
        del content["origin"]  # what the settings that were changed would not match
        torch.save(content, cell / "checkpoint.pt")
        _, curves = again.sweep_run(cell, 4.0, 2)
        assert curves["deconfound"]["alphas"] == [0, 4] and "val" not in curves["deconfound"]
        shown = alpha_table("x", curves["deconfound"])
        assert "val" not in " ".join(str(column.header) for column in shown.columns)

    def test_linear_has_nothing_to_sweep(self, tiny_detectors: Path) -> None:
        with pytest.raises(UserError, match="holds no method with TDE"):
            again.sweep_run(tiny_detectors / "linear/seed0", None, None)


@pytest.mark.parametrize(
    "command",
    [
        ["gradcam", "RUN"],
        ["features", "RUN"],
        ["fit-direction", "RUN/linear/seed0"],
        ["grid", "shapes_lvis"],
        ["speed", "shapes_lvis"],
        ["study", "momentum", "shapes_lvis"],
        ["train", "digits_lt", "method=crt", "seeds=[0]", "from=RUN", "out=RUN/second"],
    ],
)
def test_what_is_for_classifiers_says_so(command: list[str], tiny_detectors: Path, tde: Tde) -> None:
    result = tde(*(word.replace("RUN", str(tiny_detectors)) for word in command))
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    assert line.startswith("error: ") and line.endswith("trains detectors; this is for classifiers")
