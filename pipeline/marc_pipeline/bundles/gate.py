"""The gate before promotion: verifies the files of a bundle, and its vectors of a sample of the catalogue."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from marc_pipeline.config import Settings
from marc_pipeline.errors import CorruptFile, Unencodable, UserError
from marc_pipeline.model.bundle import Bundle, check_bundle, local_bundle, open_bundle
from marc_pipeline.model.compressor import load_compressor
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.model.space import degenerate, space_shape
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage, join
from marc_pipeline.training.training_set import TrainingSet

UNIT_TOLERANCE = 1e-3
MIN_SPREAD = 1e-3
SAME_COSINE = 0.98
"""Least mean cosine of the encoder's vectors and those of the training; only the rounding of number types differs."""


def damage(settings: Settings, version: str, *, storage: Storage) -> list[str]:
    """Return one line per problem with the files of a bundle that was promoted earlier."""
    try:
        return check_bundle(storage, open_bundle(storage, join(settings.bundle_uri, version)))
    except UserError as error:
        return [str(error)]


def made_from(bundle: Bundle, training_set: TrainingSet) -> bool:
    """Return whether the bundle's vectors follow from the training set's states: its backbone is not tuned."""
    facts = bundle.card.training
    return facts.get("training_id") == training_set.card.training_id and facts.get("regime") != "tuned"


@torch.no_grad()
def vectors_of_states(folder: Path, bundle: Bundle, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the vectors [n, d] that the compressor of a local bundle makes from hidden states [n, D]."""
    vectors = load_compressor(folder, bundle.card.compressor)(torch.from_numpy(states))
    return np.asarray((functional.normalize(vectors, dim=-1) if bundle.card.normalised else vectors).numpy())


def problems(
    settings: Settings,
    texts: list[str],
    version: str,
    *,
    storage: Storage,
    resources: TaskResources,
    training_set: TrainingSet | None = None,
) -> list[str]:
    """Return reasons against the promotion of a bundle, with value and limit; empty if it may be promoted.

    At most ``evaluate.audit_sample`` texts are encoded, spread evenly over the texts of the catalogue. If the bundle
    was made from the states of ``training_set``, whose texts these are, the encoder must make the same vectors.
    """
    bundle = open_bundle(storage, join(settings.bundle_uri, version))
    found = check_bundle(storage, bundle)
    if found:
        return found
    size = min(len(texts), settings.evaluate.audit_sample)
    rows = np.arange(size) * len(texts) // size
    sample = [texts[row] for row in rows.tolist()]
    try:
        encoder = load_encoder(storage, bundle.uri, version, settings.encode, resources)
    except CorruptFile as error:
        return [str(error)]
    try:
        vectors = encoder.encode(sample).vectors
    except Unencodable as error:
        return [f"in a sample of {len(sample)} texts: {error}"]
    if vectors.shape[1] != bundle.card.dim:
        found.append(f"vectors have {vectors.shape[1]} dimensions, but the card lists {bundle.card.dim}")
    elif training_set is not None and made_from(bundle, training_set):
        folder, _ = local_bundle(storage, bundle.uri, version)
        expected = vectors_of_states(folder, bundle, training_set.states(bundle.card.layers_kept, rows))
        cosine = float((vectors * expected).sum(axis=1).mean())
        if cosine < SAME_COSINE:
            found.append(
                f"the encoder's vectors differ from those of the training: the mean cosine of {len(sample)} texts is "
                f"{cosine:.4f}, the limit is {SAME_COSINE:g}"
            )
    off = int((np.abs(np.linalg.norm(vectors, axis=1) - 1) > UNIT_TOLERANCE).sum())
    if bundle.card.normalised and off:
        found.append(f"{off} of {len(sample)} sampled vectors are not normalised")
    flat = degenerate(space_shape(vectors), settings.audit, rows=len(vectors), dim=vectors.shape[1])
    spread = float(vectors.std(axis=0).max())
    if spread < MIN_SPREAD and not flat:
        found.append(
            f"all sampled vectors are nearly equal: the largest standard deviation of a dimension is {spread:.1e}, "
            f"the limit is {MIN_SPREAD:g}"
        )
    return found + flat
