"""A tiny training set of clicks with hidden states, and the MARC bundles trained on it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import CPU_FLOAT32, MAX_TOKENS, ONE_CORE, TEMPLATE, TEXTS, save_tiny_backbone
from torch import Tensor
from torch.nn import functional

from pipeline.config import EncodeSettings, TrainSettings
from pipeline.interactions import Interactions
from pipeline.model.bundle import Bundle
from pipeline.model.encoder import load_encoder
from pipeline.model.fit import Checkpoint
from pipeline.model.states import write_states
from pipeline.model.training import Trained, save_marc, train_marc
from pipeline.storage import Storage
from pipeline.training_set import STATES, TrainingSet
from schemas.training import TrainingSetCard

STORAGE = Storage()
DIM, KEPT, HISTORY = 8, 3, 5


@dataclass(frozen=True)
class TinyTraining:
    """A tiny backbone, a training set with states, and a folder of bundles."""

    root: Path
    training_set: TrainingSet
    train: TrainSettings

    def trained(self, *, layers: int = KEPT, checkpoint: Checkpoint | None = None, **changes: Any) -> Trained:
        return train_marc(
            self.training_set,
            layers=layers,
            train=self.train.model_copy(update=changes),
            encode=CPU_FLOAT32,
            history=HISTORY,
            resources=ONE_CORE,
            checkpoint=checkpoint,
        )

    def with_interactions(self, **changes: Any) -> "TinyTraining":
        """The same backbone and states, with changed interactions."""
        interactions = replace(self.training_set.interactions, **changes)
        return replace(self, training_set=replace(self.training_set, interactions=interactions))

    def saved(self, trained: Trained, *, into: str = "bundles", **changes: Any) -> Bundle:
        train = self.train.model_copy(update=changes)
        return save_marc(trained, self.training_set, train=train, storage=STORAGE, bundle_uri=str(self.root / into))


def interactions(rows: int = 700, users: int = 12) -> Interactions:
    """Users who like one of two kinds of genre, with exceptions; several rows have the same time."""
    rng = np.random.default_rng(0)
    chosen, items = np.arange(rows) % users, rng.integers(0, len(TEXTS), rows)
    liked = (items % 5 < 2) == (chosen % 2 == 0)
    labels = liked ^ (rng.random(rows) < 0.15)
    return Interactions(chosen, items, labels.astype(np.float32), np.arange(rows, dtype=np.int64) // 2)


def tiny_training(root: Path, architecture: str, **changes: Any) -> TinyTraining:
    train = TrainSettings.model_validate(
        {
            "backbone": save_tiny_backbone(root / "backbone", architecture), "dim": DIM, "max_tokens": MAX_TOKENS,
            "hidden": 16, "batch": 128, "epochs": 2, "warm_up": 1, "learning_rate": 0.01,
            "backbone_learning_rate": 0.01, "lora_rank": 4, "max_steps": 4, **changes,
        }
    )  # fmt: skip
    facts = write_states(TEXTS, root / STATES, train=train, encode=CPU_FLOAT32, resources=ONE_CORE)
    rows = interactions()
    card = TrainingSetCard(
        training_id="tiny", ds="2026-11-20", template=TEMPLATE, backbone=train.backbone, pooling=train.pooling,
        **vars(facts), items=len(TEXTS), users=rows.n_users, interactions=len(rows), clicks=int(rows.labels.sum()),
        files={},
    )  # fmt: skip
    item_ids = [f"i{number:02d}" for number in range(len(TEXTS))]
    return TinyTraining(root, TrainingSet(root, card, item_ids, list(TEXTS), rows), train)


def encoded(bundle: Bundle, texts: list[str], *, encode: EncodeSettings = CPU_FLOAT32) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = (
        load_encoder(STORAGE, bundle.uri, bundle.version, encode, ONE_CORE).encode(texts).vectors
    )
    return vectors


def unit(vectors: Tensor) -> NDArray[np.float32]:
    return np.asarray(functional.normalize(vectors, dim=-1).numpy())
