"""Training of bundles: whitened PCA on the texts of a catalogue."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config import EncodeSettings, TrainSettings
from pipeline.errors import UserError
from pipeline.model.backbone import HiddenStates, blocks, load_backbone, load_tokenizer, truncate
from pipeline.model.bundle import Bundle, promote, save_bundle
from pipeline.model.compressor import fit_pca, save_compressor
from pipeline.model.encoder import Encoder, choose_device, choose_dtype
from pipeline.resources import TaskResources
from pipeline.storage import Storage
from schemas.bundle import BundleCard, CompressorCard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def train_pca(
    texts: Sequence[str],
    *,
    template: str,
    train: TrainSettings,
    encode: EncodeSettings,
    storage: Storage,
    bundle_uri: str,
    resources: TaskResources,
) -> Bundle:
    """Fit a whitened PCA on the backbone's pooled hidden states, save the bundle and make it the current one.

    Args:
        texts: rendered texts of the catalogue; identical ones count once.
        template: what they were rendered with.
        train: backbone, layers, pooling, dimensions.
        encode: device, dtype and token budget of the pass over the texts, as in the encode stage.
        storage: access to ``bundle_uri``.
        bundle_uri: folder of bundles.
        resources: cores for the pass.

    Raises:
        UserError: unknown backbone, too many layers or dimensions, too few texts.
    """
    distinct = sorted(set(texts))
    if len(distinct) <= train.dim:
        raise UserError(
            f"whitening to {train.dim} dimensions needs more than {train.dim} distinct texts, "
            f"the catalogue has {len(distinct)}"
        )
    backbone = load_backbone(train.backbone)
    tokenizer = load_tokenizer(train.backbone)
    total = len(blocks(backbone)[2])
    layers = train.layers or total
    max_tokens = min(train.max_tokens, positions(backbone) or train.max_tokens)
    truncate(backbone, layers)
    log.info("train: %d distinct texts through %d of %d layers of %s", len(distinct), layers, total, train.backbone)
    if encode.threads or resources.cpus:
        torch.set_num_threads(encode.threads or resources.cpus)
    device = choose_device(encode, resources)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.enable_truncation(max_length=max_tokens)
    encoder = Encoder(
        HiddenStates(backbone, whole=layers == total),
        tokenizer.backend_tokenizer,
        pooling=train.pooling,
        head=torch.nn.Identity(),
        device=device,
        # As the nights will run it: the compressor is fitted on the states that it is going to see.
        dtype=choose_dtype(encode, device),
        token_budget=encode.token_budget,
    )
    hidden = encoder.encode(distinct).vectors
    compressor, explained = fit_pca(hidden, dim=train.dim)
    log.info("train: %d of %d dimensions hold %.1f %% of the variance", train.dim, hidden.shape[1], 100 * explained)

    def write(folder: Path) -> BundleCard:
        # Read again: the encoder may have cast its copy, and a bundle keeps the weights it was given.
        truncate(load_backbone(train.backbone), layers).save_pretrained(folder / "backbone")
        tokenizer.save_pretrained(folder / "backbone")
        save_compressor(compressor, folder)
        return BundleCard(
            backbone=train.backbone,
            layers_kept=layers,
            backbone_layers=total,
            pooling=train.pooling,
            max_tokens=max_tokens,
            width=hidden.shape[1],
            dim=train.dim,
            normalised=True,
            template=template,
            compressor=CompressorCard(kind="pca", arguments={"width": hidden.shape[1], "dim": train.dim}),
            training={"texts": len(distinct), "fingerprint": fingerprint(distinct)},
            metrics={"explained_variance": round(explained, 6)},
            files={},
        )

    bundle = save_bundle(storage, bundle_uri, write)
    promote(storage, bundle_uri, bundle.version)
    return bundle


def positions(backbone: "PreTrainedModel") -> int | None:
    """Tokens that the backbone has positions for; RoBERTa and its like lose those up to the padding index."""
    limit: int | None = getattr(backbone.config, "max_position_embeddings", None)
    for name, module in backbone.named_modules():
        if limit and name.endswith("position_embeddings") and isinstance(getattr(module, "padding_idx", None), int):
            return limit - int(module.padding_idx) - 1
    return limit


def fingerprint(texts: Sequence[str]) -> str:
    """Hash of the training texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:32]
