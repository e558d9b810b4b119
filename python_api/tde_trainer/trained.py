"""A finished training looked at again: its network, its head and its features, each read when it is first asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tde_kernels import FusedTDEHead
from tde_trainer import checkpoint
from tde_trainer.config import classifiers, config_from, origin
from tde_trainer.data import DATASETS, LongTailedData
from tde_trainer.device import cpu_threads, make_accelerator
from tde_trainer.errors import UserError
from tde_trainer.evaluate import Features, extract, extract_alone
from tde_trainer.feature_file import FILE, FeatureFile, load_features, save_features
from tde_trainer.methods import METHODS, Method
from tde_trainer.network import Network, build_network
from tde_trainer.results import Result


class TrainedCell:
    """One training of a run.

    Args:
        result: its folder and results.json.
        accelerator: whose ranks share the work; default: this process does it all, whatever the others do.
    """

    def __init__(self, result: Result, accelerator: Accelerator | None = None) -> None:
        self.result = result
        self.config = classifiers(config_from(result.values["config"]), f"the run of {result.directory}")
        if result.method not in self.config.methods:
            raise UserError(f"{result.directory} is of {result.method}, which is none of its config's methods")
        self._accelerator = accelerator
        self.device = (accelerator or make_accelerator(self.config.precision)).device
        self._features: dict[str, Features] = {}

    @property
    def method(self) -> Method:
        """How it was trained."""
        return METHODS[self.result.method]

    @property
    def _origin(self) -> dict[str, Any]:
        return origin(self.config, self.result.method, self.result.values["seed"])

    @cached_property
    def data(self) -> LongTailedData:
        """The images that it was trained and tested with."""
        return DATASETS[self.config.data.name](self.config.data, self.result.values["seed"])

    @cached_property
    def class_counts(self) -> Tensor:
        """Training images of each class, ``[C]`` int64."""
        counts = self._kept.class_counts if self._kept else self.data.class_counts
        return counts.to(self.device)

    @cached_property
    def network(self) -> Network:
        """In evaluation mode, on the device."""
        # Published weights would be fetched for the checkpoint's to take their place.
        config = replace(self.config, model=replace(self.config.model, pretrained=False))
        network = build_network(config, self.result.method, self.data.channels, self.data.num_classes)
        checkpoint.load(self.result.directory, network, origin=self._origin)
        return network.to(self.device).eval()

    @cached_property
    def head(self) -> FusedTDEHead:
        """The classifier alone; where features are kept it needs neither images nor backbone."""
        if self._kept is None:
            return self.network.head
        width = next(iter(self._kept.splits.values())).x.shape[1]
        head = self.method.build_head(width, len(self._kept.class_counts), self.config.head, self.config.loss)
        checkpoint.load_part(self.result.directory, "head", head, self._origin)
        return head.to(self.device).eval()

    def features(self, split: str) -> Features:
        """Of every sample of ``train`` (without augmentation), ``val`` or ``test``: kept ones, or extracted now."""
        if split not in self._features:
            kept = self._kept.splits.get(split) if self._kept else None
            self._features[split] = self._moved(kept) if kept else self._extracted(split)
        return self._features[split]

    def keep_features(self, *splits: str) -> None:
        """Write those splits beside the checkpoint, for all who ask for features from then on."""
        found = {split: self.features(split) for split in splits}
        fingerprint = checkpoint.fingerprint(self.result.directory)
        save_features(self.result.directory / FILE, FeatureFile(found, self.class_counts, fingerprint))

    @cached_property
    def _kept(self) -> FeatureFile | None:
        path = self.result.directory / FILE
        if not path.exists():
            return None
        kept = load_features(path)
        # A training that went on, or was done anew, has left its old features behind.
        return kept if kept.checkpoint == checkpoint.fingerprint(self.result.directory) else None

    def _extracted(self, split: str) -> Features:
        images, pipeline, batch_size = getattr(self.data, split), self.data.pipeline, self.config.train.batch_size
        # A new one: accelerators share their state, and the one made last says what precision all have.
        accelerator = self._accelerator or make_accelerator(self.config.precision)
        # As in training: with other threads or another precision a product is rounded otherwise.
        with cpu_threads(self.config.train.threads), accelerator.autocast():
            if self._accelerator is None:
                return extract_alone(self.network, images, pipeline, batch_size, self.device)
            found: Features = extract(self.network, images, pipeline, batch_size, accelerator)
            return found

    def _moved(self, features: Features) -> Features:
        return Features(features.x.to(self.device), features.y.to(self.device))
