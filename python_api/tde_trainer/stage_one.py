"""What a second stage takes from the run of the first (`from=RUN`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tde_trainer import results
from tde_trainer.config import PLACES, flatten
from tde_trainer.errors import UserError
from tde_trainer.methods import SecondStage
from tde_trainer.network import Network
from tde_trainer.schema import Config
from tde_trainer.trained import TrainedCell

DEFAULT_METHOD = "linear"
# Where images lie, how fast they are read and what is said of them: of no matter to what the features are.
FREE = (*PLACES, "data.workers", "model.pretrained")


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
        self.cell = TrainedCell(results.finished_cells(folder)[0], accelerator)
        self._check_fits(config)

    def _check_fits(self, config: Config) -> None:
        if isinstance(self.cell.method, SecondStage):
            raise UserError(f"from={config.stage_one}: {self.cell.result.method} is a second stage itself")
        model = self.cell.method.model(self.cell.config.model)  # as it was built: BBN's has a branch more
        for section, wanted, trained in (
            ("data", config.data, self.cell.config.data),
            ("model", config.model, model),
        ):
            ours, theirs = flatten(asdict(wanted), section), flatten(asdict(trained), section)
            for key in ours:
                if key not in FREE and ours[key] != theirs[key]:
                    raise UserError(
                        f"from={config.stage_one}: its features do not fit: trained with {key}={theirs[key]}, while "
                        f"this is {key}={ours[key]}"
                    )

    @property
    def weight(self) -> Tensor:
        """``[C, D]``, of its classifier.

        Raises:
            UserError: it is none that is linear.
        """
        head = self.cell.head
        if head.normalizer != "linear":
            raise UserError(
                f"from: {self.cell.result.method} has a {head.normalizer} classifier; wanted is a linear one"
            )
        return head.weight.detach()

    def features(self, split: str) -> tuple[Tensor, Tensor]:
        """Features ``[N, D]`` and classes ``[N]`` of ``train`` (without augmentation) or ``val``."""
        found = self.cell.features(split)
        return found.x, found.y


def begin_second_stage(network: Network, config: Config, seed: int, accelerator: Accelerator) -> dict[str, Any]:
    """Give an untrained ``network`` what it takes from stage 1; nothing where its method is none of two stages.

    Returns:
        What the method chose, for results.json.
    """
    if not isinstance(network.method, SecondStage):
        return {}
    first = TrainedStage(config, seed, accelerator)
    network.backbone.load_state_dict(first.cell.network.backbone.state_dict())
    neck, head = network.neck.to(accelerator.device), network.head.to(accelerator.device)
    return {"from": str(first.cell.result.directory), **network.method.begin(neck, head, first)}
