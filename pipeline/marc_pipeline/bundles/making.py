"""Training of bundles: MARC on the clicks of a training set, or a whitened PCA on the texts of a catalogue."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from marc_pipeline.config import EncodeSettings, InteractionSettings, TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.factory import new_compressor, new_marc, new_objective
from marc_pipeline.model.backbone import PooledStates, blocks, kept_states, load_backbone, load_tokenizer, truncate
from marc_pipeline.model.budget import CPU_TOKENS
from marc_pipeline.model.bundle import Bundle, save_bundle
from marc_pipeline.model.compressor import fit_pca, save_compressor
from marc_pipeline.model.device import choose_device, choose_dtype
from marc_pipeline.model.space import space_shape
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_pipeline.training import lora as tuned
from marc_pipeline.training import matching
from marc_pipeline.training.fit import Checkpoint, Progress, learn
from marc_pipeline.training.learning import LearningData, training_part
from marc_pipeline.training.objective import Objective
from marc_pipeline.training.regression import fit_regression
from marc_pipeline.training.states import cutting_tokenizer, state_encoder
from marc_pipeline.training.training_set import TrainingSet
from marc_schemas.bundle import BundleCard, CompressorCard, LongTexts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SHAPE_ROWS = 20_000
"""About the most vectors that the shape of a space is computed from."""
MATCHING_PARTS = ("matching.", "clicked.", "skipped.", "profile.")


@dataclass(frozen=True)
class Trained:
    """A trained MARC before it is saved.

    Attributes:
        objective: compressor and matching network with the best weights.
        backbone: backbone with adapters in the tuned regime; None in the frozen regime.
        progress: progress of the training.
        layers: number of layers to keep.
        interactions: number of training rows.
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
    """Fit a whitened PCA on the backbone's pooled hidden states, and save the bundle without promoting it.

    Identical texts count once. ``layers_from`` is the basis for the number of layers; the card records it.

    Raises:
        UserError: the backbone is unknown, there are too many layers or dimensions, or too few texts.
    """
    distinct = sorted(set(texts))
    if len(distinct) <= train.dim:
        raise UserError(
            f"whitening to {train.dim} dimensions needs more than {train.dim} distinct texts, "
            f"the catalogue has {len(distinct)}"
        )
    backbone = load_backbone(train.backbone)
    tokenizer, max_tokens = cutting_tokenizer(backbone, train)
    total = len(blocks(backbone)[2])
    layers = total if train.layers is None else train.layers
    truncate(backbone, layers)
    log.info("train: %d distinct texts through %d of %d layers of %s", len(distinct), layers, total, train.backbone)
    pooled = PooledStates(kept_states(backbone, layers=layers, of=total), train.pooling)
    hidden = state_encoder(pooled, tokenizer, encode=encode, resources=resources).encode(distinct).vectors
    compressor, explained = fit_pca(hidden, dim=train.dim)
    shape = _shape(compressor, hidden)
    log.info("train: %d of %d dimensions explain %.1f %% of the variance", train.dim, hidden.shape[1], 100 * explained)

    def write(folder: Path) -> BundleCard:
        # Loaded again, because the encoder may have cast its copy, and a bundle contains the original weights.
        _write_backbone(folder, truncate(load_backbone(train.backbone), layers), train.backbone)
        save_compressor(compressor, folder)
        facts = {"regime": "pca", "layers_from": layers_from, "texts": len(distinct)}
        return _card(
            train,
            layers=layers,
            of=total,
            max_tokens=max_tokens,
            long_texts=encode.long_texts,
            template=template,
            compressor=CompressorCard(kind="pca", arguments={"width": hidden.shape[1], "dim": train.dim}),
            training={**facts, "fingerprint": fingerprint(distinct)},
            metrics={"explained_variance": round(explained, 6), **shape},
        )

    return save_bundle(storage, bundle_uri, write)


def save_layer_pca(
    training_set: TrainingSet,
    *,
    layers: int,
    train: TrainSettings,
    interactions: InteractionSettings,
    storage: Storage,
    bundle_uri: str,
) -> Bundle:
    """Save the whitened PCA of a layer as a bundle: the rival of MARC in the gate, with the vectors compared there."""
    card, states = training_set.card, training_set.states(layers, np.arange(len(training_set.item_ids)))
    learned = training_part(training_set, settings=interactions, holdout=train.holdout)
    known = learned.whole().known.numpy()
    compressor, explained = fit_pca(states[known], dim=train.dim)

    def write(folder: Path) -> BundleCard:
        _write_backbone(folder, truncate(load_backbone(train.backbone), layers), train.backbone)
        save_compressor(compressor, folder)
        return _card(
            train,
            layers=layers,
            of=card.layers,
            max_tokens=card.max_tokens,
            long_texts=card.long_texts,
            template=card.template,
            compressor=CompressorCard(kind="pca", arguments={"width": card.width, "dim": train.dim}),
            training={
                "regime": "pca", "layers_from": "gate", "texts": len(known), "training_id": card.training_id,
                "fingerprint": fingerprint([training_set.texts[item] for item in known]),
            },
            metrics={"explained_variance": round(explained, 6), **_shape(compressor, states)},
        )  # fmt: skip

    return save_bundle(storage, bundle_uri, write)


@torch.no_grad()
def _shape(compressor: torch.nn.Module, states: NDArray[np.float32]) -> dict[str, float]:
    """Return the shape of the space of a compressor's vectors, for the bundle's card."""
    compressor.eval()
    some = states[:: max(1, len(states) // SHAPE_ROWS)]
    vectors = compressor(torch.from_numpy(np.ascontiguousarray(some))).numpy()
    return {name: round(value, 6) for name, value in space_shape(vectors).model_dump().items()}


def train_marc(
    training_set: TrainingSet,
    *,
    layers: int,
    train: TrainSettings,
    encode: EncodeSettings,
    interactions: InteractionSettings,
    resources: TaskResources,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train MARC on the training part of a training set.

    Rows after the 80 % boundary of the training set are not used. A killed run resumes from ``checkpoint``.

    Raises:
        UserError: there are more dimensions than the width, or too few items, or the loss is not finite.
    """
    if resources.cpus:
        torch.set_num_threads(encode.threads or resources.cpus)
    data = training_part(training_set, settings=interactions, holdout=train.holdout)
    states = training_set.states(layers)
    backbone: PeftModel | None = None

    def made(rows: LearningData) -> Objective:
        nonlocal backbone
        if train.regime == "frozen":
            return new_objective("marc", states=states, data=rows, dim=train.dim, seed=train.seed, train=train)
        objective, backbone = _tuned(
            training_set, rows, states, layers=layers, train=train, encode=encode, resources=resources
        )
        return objective

    objective, progress = learn(made, data, settings=train, seed=train.seed, checkpoint=checkpoint)
    log.info("train: best AUC on the holdout %.4f at step %d of %d", progress.best, progress.best_step, progress.step)
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
    """Save a trained MARC as a bundle without promoting it.

    ``training_set`` and ``train`` are those of the training; ``layers_from`` is the basis for the number of layers.
    """
    card, objective, layers, progress = training_set.card, trained.objective, trained.layers, trained.progress
    shape = _shape(torch.nn.Identity(), objective.vectors().numpy(force=True)[: len(training_set.item_ids)])

    def write(folder: Path) -> BundleCard:
        if trained.backbone is None:
            model = truncate(load_backbone(train.backbone), layers)
        else:
            model = tuned.merged(trained.backbone)
        _write_backbone(folder, model, train.backbone)
        save_compressor(objective.compressor, folder)
        rest = {name: value for name, value in objective.state_dict().items() if name.startswith(MATCHING_PARTS)}
        save_file({name: value.contiguous() for name, value in rest.items()}, folder / matching.WEIGHTS)
        arguments = {"width": card.width, "dim": train.dim, "hidden": train.hidden}
        return _card(
            train,
            layers=layers,
            of=card.layers,
            max_tokens=card.max_tokens,
            long_texts=card.long_texts,
            template=card.template,
            compressor=CompressorCard(kind="bottleneck", arguments=arguments),
            training={
                "regime": train.regime,
                "layers_from": layers_from,
                "training_id": card.training_id,
                "interactions": trained.interactions,
                "until": int(training_set.interactions.times[training_set.split.train.stop - 1]),
                "seed": train.seed,
                "settings": train.model_dump(exclude={"processes", "checkpoint_every", "backbone"}),
            },
            metrics={
                "holdout_auc": round(progress.best, 6),
                "steps": progress.best_step,
                "capped": float(progress.capped),
                **shape,
            },
        )

    return save_bundle(storage, bundle_uri, write)


def _card(
    train: TrainSettings,
    *,
    layers: int,
    of: int,
    max_tokens: int,
    long_texts: LongTexts,
    template: str,
    compressor: CompressorCard,
    training: dict[str, Any],
    metrics: dict[str, float],
) -> BundleCard:
    """Return the card of a bundle with ``layers`` of the backbone's layers."""
    return BundleCard(
        backbone=train.backbone,
        layers_kept=layers,
        backbone_layers=of,
        pooling=train.pooling,
        width=compressor.arguments["width"],
        dim=train.dim,
        normalised=True,
        max_tokens=max_tokens,
        long_texts=long_texts,
        template=template,
        compressor=compressor,
        training=training,
        metrics=metrics,
        files={},
    )


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
    """Return MARC over a backbone with LoRA adapters, and this backbone; ``states`` [items, D] are the original."""
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
    """Return a hash of the training texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:32]
