"""What a second stage takes from the run of the first (`from=RUN`)."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tde_trainer import checkpoint, results
from tde_trainer.config import config_from, flatten
from tde_trainer.data import DATASETS, LongTailedData
from tde_trainer.errors import UserError
from tde_trainer.evaluate import extract
from tde_trainer.methods import METHODS, SecondStage
from tde_trainer.network import Network, build_network
from tde_trainer.schema import Config

DEFAULT_METHOD = "linear"
# Where images lie, how fast they are read and what is said of them: of no matter to what the features are.
FREE = ("data.root", "data.lists", "data.download", "data.workers", "data.note", "model.pretrained")


def stage_one_cell(run: Path, seed: int) -> Path:
    """The training of that seed, in ``run`` where that is a method's folder, else in the folder of ``linear``."""
    return (run if (run / f"seed{seed}").is_dir() else run / DEFAULT_METHOD) / f"seed{seed}"


class TrainedStage:
    """See `methods.StageOne`. The network is read when it is first asked for.

    Args:
        config: of the second stage.
        seed: of both.
        accelerator: of the second stage.

    Raises:
        UserError: there is no such training, or it is of other data or another backbone.
    """

    def __init__(self, config: Config, seed: int, accelerator: Accelerator) -> None:
        folder = stage_one_cell(Path(config.stage_one), seed)
        if not (folder / results.FILE).is_file():
            raise UserError(
                f"from={config.stage_one}: no finished training in {folder}; wanted is a run with {DEFAULT_METHOD}, or "
                f"the folder of a method in it, of seed {seed}"
            )
        self.result, self.accelerator = results.finished_cells(folder)[0], accelerator
        self._check_fits(config)

    def _check_fits(self, config: Config) -> None:
        if isinstance(METHODS[self.result.method], SecondStage):
            raise UserError(f"from={config.stage_one}: {self.result.method} is a second stage itself")
        first = config_from(self.result.values["config"])
        for section in ("data", "model"):
            ours, theirs = (flatten(asdict(getattr(c, section)), section) for c in (config, first))
            for key in ours:
                if key not in FREE and ours[key] != theirs[key]:
                    raise UserError(
                        f"from={config.stage_one}: its features do not fit: trained with {key}={theirs[key]}, while "
                        f"this is {key}={ours[key]}"
                    )

    @cached_property
    def network(self) -> Network:
        """The trained network."""
        config = config_from(self.result.values["config"])
        channels = self._data.channels
        network = build_network(config, self.result.method, channels, self._data.num_classes)
        checkpoint.load(self.result.directory, network)
        return network.to(self.accelerator.device).eval()

    @cached_property
    def _data(self) -> LongTailedData:
        config = config_from(self.result.values["config"])
        return DATASETS[config.data.name](config.data, self.result.values["seed"])

    @property
    def weight(self) -> Tensor:
        """``[C, D]``, of its classifier.

        Raises:
            UserError: it is none that is linear.
        """
        head = self.network.head
        if head.normalizer != "linear":
            raise UserError(f"from: {self.result.method} has a {head.normalizer} classifier; wanted is a linear one")
        return head.weight.detach()

    def features(self, split: str) -> tuple[Tensor, Tensor]:
        """Features ``[N, D]`` and classes ``[N]`` of ``train`` (without augmentation) or ``val``."""
        config = config_from(self.result.values["config"])
        found = extract(
            self.network, getattr(self._data, split), self._data.pipeline, config.train.batch_size, self.accelerator
        )
        return found.x, found.y


def begin_second_stage(network: Network, config: Config, seed: int, accelerator: Accelerator) -> dict[str, Any]:
    """Give an untrained ``network`` what it takes from stage 1; nothing where its method is none of two stages.

    Returns:
        What the method chose, for results.json.
    """
    if not isinstance(network.method, SecondStage):
        return {}
    first = TrainedStage(config, seed, accelerator)
    network.backbone.load_state_dict(first.network.backbone.state_dict())
    neck, head = network.neck.to(accelerator.device), network.head.to(accelerator.device)
    return {"from": str(first.result.directory), **network.method.begin(neck, head, first)}
