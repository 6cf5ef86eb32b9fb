"""Training of bundles: MARC on the clicks of a training set, or a whitened PCA on the texts of a catalogue."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from marc_pipeline.config import EncodeSettings, TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.systems import build, new_compressor, new_marc
from marc_pipeline.model.backbone import HiddenStates, PooledStates, blocks, load_backbone, load_tokenizer, truncate
from marc_pipeline.model.budget import CPU_TOKENS
from marc_pipeline.model.bundle import Bundle, save_bundle
from marc_pipeline.model.compressor import fit_pca, save_compressor
from marc_pipeline.model.device import choose_device, choose_dtype
from marc_pipeline.model.encoder import Encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_pipeline.training import lora as tuned
from marc_pipeline.training import matching
from marc_pipeline.training.fit import Checkpoint, Progress, learn
from marc_pipeline.training.learning import LearningData, learning_data
from marc_pipeline.training.objective import Objective
from marc_pipeline.training.regression import fit_regression
from marc_pipeline.training.states import cutting_tokenizer
from marc_pipeline.training.training_set import TrainingSet
from marc_schemas.bundle import BundleCard, CompressorCard

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

MATCHING_PARTS = ("matching.", "clicked.", "skipped.", "profile.")


@dataclass(frozen=True)
class Trained:
    """A trained MARC, not yet written.

    Attributes:
        objective: compressor and matching network, with the weights that validated best.
        backbone: with its adapters, in the tuned regime; None where it is as it was.
        progress: how the training went.
        layers: blocks to keep.
        interactions: rows that the weights learned from.
    """

    objective: Objective
    backbone: "PeftModel | None"
    progress: Progress
    layers: int
    interactions: int


def train_pca(
    texts: Sequence[str],
    *,
    template: str,
    train: TrainSettings,
    encode: EncodeSettings,
    storage: Storage,
    bundle_uri: str,
    resources: TaskResources,
    layers_from: str = "configuration",
) -> Bundle:
    """Fit a whitened PCA on the backbone's pooled hidden states and save the bundle; which one is current stays.

    Args:
        texts: rendered texts of the catalogue; identical ones count once.
        template: what they were rendered with.
        train: backbone, layers, pooling, dimensions.
        encode: device, dtype and token budget of the pass over the texts, as in the encode stage.
        storage: access to ``bundle_uri``.
        bundle_uri: folder of bundles.
        resources: cores for the pass.
        layers_from: what decided how many layers are kept.

    Raises:
        UserError: unknown backbone, too many layers or dimensions, too few texts.
    """
    distinct = sorted(set(texts))
    if len(distinct) <= train.dim:
        raise UserError(
            f"whitening to {train.dim} dimensions needs more than {train.dim} distinct texts, "
            f"the catalogue has {len(distinct)}"
        )
    hidden, facts = _final_states(distinct, train=train, encode=encode, resources=resources)
    compressor, explained = fit_pca(hidden, dim=train.dim)
    log.info("train: %d of %d dimensions hold %.1f %% of the variance", train.dim, hidden.shape[1], 100 * explained)

    def write(folder: Path) -> BundleCard:
        # Read again: the encoder may have cast its copy, and a bundle keeps the weights it was given.
        _write_backbone(folder, truncate(load_backbone(train.backbone), facts.layers), train.backbone)
        save_compressor(compressor, folder)
        return BundleCard(
            backbone=train.backbone,
            layers_kept=facts.layers,
            backbone_layers=facts.total,
            pooling=train.pooling,
            max_tokens=facts.max_tokens,
            width=hidden.shape[1],
            dim=train.dim,
            normalised=True,
            template=template,
            compressor=CompressorCard(kind="pca", arguments={"width": hidden.shape[1], "dim": train.dim}),
            training={
                "regime": "pca",
                "layers_from": layers_from,
                "texts": len(distinct),
                "fingerprint": fingerprint(distinct),
            },
            metrics={"explained_variance": round(explained, 6)},
            files={},
        )

    return save_bundle(storage, bundle_uri, write)


def train_marc(
    training_set: TrainingSet,
    *,
    layers: int,
    train: TrainSettings,
    encode: EncodeSettings,
    history: int,
    resources: TaskResources,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train MARC on the training part of a training set.

    Args:
        training_set: items, interactions and hidden states; what lies behind its 80 % boundary is not looked at.
        layers: blocks of the backbone to keep.
        train: regime, dimensions, losses, optimiser.
        encode: device, dtype and token budget of passes through the backbone.
        history: length of the users' histories.
        resources: cores and GPU.
        checkpoint: where a run that may be killed leaves its state.

    Raises:
        UserError: more dimensions than the backbone has, too few items, or a loss that is not finite.
    """
    if resources.cpus:
        torch.set_num_threads(encode.threads or resources.cpus)
    data = learning_data(
        training_set.interactions.take(training_set.split.train),
        history=history,
        holdout=train.holdout,
        items=len(training_set.texts),
    )
    states = training_set.states(layers)
    backbone: PeftModel | None = None

    def made(rows: LearningData) -> Objective:
        nonlocal backbone
        if train.regime == "frozen":
            return build("marc", states=states, data=rows, dim=train.dim, seed=train.seed, train=train)
        objective, backbone = _tuned(
            training_set, rows, states, layers=layers, train=train, encode=encode, resources=resources
        )
        return objective

    objective, progress = learn(made, data, settings=train, seed=train.seed, checkpoint=checkpoint)
    log.info("train: best validation AUC %.4f at step %d of %d", progress.best, progress.best_step, progress.step)
    learned = data.whole() if train.ends_on_every_row else data
    return Trained(objective, backbone, progress, layers, len(learned.training))


def save_marc(
    trained: Trained,
    training_set: TrainingSet,
    *,
    train: TrainSettings,
    storage: Storage,
    bundle_uri: str,
    layers_from: str = "configuration",
) -> Bundle:
    """Write a trained MARC as a bundle; which one is current does not change.

    Args:
        trained: from :func:`train_marc`.
        training_set: what it was trained on.
        train: the settings that it was trained with.
        storage: access to ``bundle_uri``.
        bundle_uri: folder of bundles.
        layers_from: what decided how many layers are kept.
    """
    card, objective, layers, progress = training_set.card, trained.objective, trained.layers, trained.progress

    def write(folder: Path) -> BundleCard:
        if trained.backbone is None:
            model = truncate(load_backbone(train.backbone), layers)
        else:
            model = tuned.merged(trained.backbone)
        _write_backbone(folder, model, train.backbone)
        save_compressor(objective.compressor, folder)
        rest = {name: value for name, value in objective.state_dict().items() if name.startswith(MATCHING_PARTS)}
        save_file({name: value.contiguous() for name, value in rest.items()}, folder / matching.WEIGHTS)
        return BundleCard(
            backbone=train.backbone,
            layers_kept=layers,
            backbone_layers=card.layers,
            pooling=card.pooling,
            max_tokens=card.max_tokens,
            width=card.width,
            dim=train.dim,
            normalised=True,
            template=card.template,
            compressor=CompressorCard(
                kind="bottleneck", arguments={"width": card.width, "dim": train.dim, "hidden": train.hidden}
            ),
            training={
                "regime": train.regime,
                "layers_from": layers_from,
                "training_id": card.training_id,
                "interactions": trained.interactions,
                "until": int(training_set.interactions.times[training_set.split.train.stop - 1]),
                "seed": train.seed,
                "settings": train.model_dump(exclude={"processes", "checkpoint_every", "backbone"}),
            },
            metrics={"validation_auc": round(progress.best, 6), "steps": progress.best_step},
            files={},
        )

    return save_bundle(storage, bundle_uri, write)


@dataclass(frozen=True)
class _Truncated:
    """Layers kept and layers there are, and the tokens that a text may have."""

    layers: int
    total: int
    max_tokens: int


def _final_states(
    texts: Sequence[str], *, train: TrainSettings, encode: EncodeSettings, resources: TaskResources
) -> tuple[NDArray[np.float32], _Truncated]:
    """Pooled states [texts, D] of the last kept layer, computed as the nights will."""
    backbone = load_backbone(train.backbone)
    cutter, max_tokens = cutting_tokenizer(backbone, train)
    total = len(blocks(backbone)[2])
    layers = train.layers or total
    truncate(backbone, layers)
    log.info("train: %d distinct texts through %d of %d layers of %s", len(texts), layers, total, train.backbone)
    if encode.threads or resources.cpus:
        torch.set_num_threads(encode.threads or resources.cpus)
    device = choose_device(encode, resources)
    encoder = Encoder(
        PooledStates(HiddenStates(backbone, whole=layers == total), train.pooling),
        cutter,
        head=torch.nn.Identity(),
        device=device,
        dtype=choose_dtype(encode, device),
        token_budget=encode.token_budget,
    )
    return encoder.encode(texts).vectors, _Truncated(layers, total, max_tokens)


def _tuned(
    training_set: TrainingSet,
    data: LearningData,
    states: NDArray[np.float32],
    *,
    layers: int,
    train: TrainSettings,
    encode: EncodeSettings,
    resources: TaskResources,
) -> "tuple[Objective, PeftModel]":
    """MARC over a backbone with LoRA adapters, which comes as well; states [items, D] of the untouched one."""
    backbone = load_backbone(train.backbone)
    cutter, _ = cutting_tokenizer(backbone, train)
    tokens = [np.array(one.ids, dtype=np.int32) for one in cutter.encode_batch(training_set.encoded_texts)]
    adapted = tuned.add_lora(truncate(backbone, layers), rank=train.lora_rank, seed=train.seed)
    device = choose_device(encode, resources)
    source = tuned.TunedStates(
        adapted,
        tokens,
        torch.from_numpy(states),
        whole=layers == training_set.card.layers,
        pooling=train.pooling,
        dtype=choose_dtype(encode, device),
        token_budget=encode.token_budget or CPU_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        start = fit_regression(states, data, dim=train.dim)
        compressor, profiles = new_compressor(start, train), data.rows.profiles is not None
        objective = new_marc(source, compressor, dim=train.dim, train=train, profiles=profiles)
    return objective.to(device), adapted


def _write_backbone(folder: Path, model: "PreTrainedModel", name: str) -> None:
    model.save_pretrained(folder / "backbone")
    load_tokenizer(name).save_pretrained(folder / "backbone")


def fingerprint(texts: Sequence[str]) -> str:
    """Hash of the training texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:32]
