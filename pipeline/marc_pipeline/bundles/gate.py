"""The gate before promotion: verifies the files of a bundle, and its vectors of a sample of the catalogue."""

import numpy as np

from marc_pipeline.config import Settings
from marc_pipeline.errors import CorruptFile, Unencodable, UserError
from marc_pipeline.model.bundle import check_bundle, open_bundle
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.model.space import degenerate, space_shape
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage, join

UNIT_TOLERANCE = 1e-3
MIN_SPREAD = 1e-3


def damage(settings: Settings, version: str, *, storage: Storage) -> list[str]:
    """Return one line per problem with the files of a bundle that was promoted earlier."""
    try:
        return check_bundle(storage, open_bundle(storage, join(settings.bundle_uri, version)))
    except UserError as error:
        return [str(error)]


def problems(
    settings: Settings, texts: list[str], version: str, *, storage: Storage, resources: TaskResources
) -> list[str]:
    """Return reasons against the promotion of a bundle, with value and limit; empty if it may be promoted.

    At most ``evaluate.audit_sample`` texts are encoded, spread evenly over the texts of the catalogue.
    """
    bundle = open_bundle(storage, join(settings.bundle_uri, version))
    found = check_bundle(storage, bundle)
    if found:
        return found
    size = min(len(texts), settings.evaluate.audit_sample)
    sample = [texts[number * len(texts) // size] for number in range(size)]
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
    off = int((np.abs(np.linalg.norm(vectors, axis=1) - 1) > UNIT_TOLERANCE).sum())
    if bundle.card.normalised and off:
        found.append(f"{off} of {len(sample)} sampled vectors are not normalised")
    found += degenerate(space_shape(vectors), settings.audit, rows=len(vectors), dim=vectors.shape[1])
    spread = float(vectors.std(axis=0).max())
    if spread < MIN_SPREAD:
        found.append(
            f"all sampled vectors are nearly equal: the largest standard deviation of a dimension is {spread:.1e}, "
            f"the limit is {MIN_SPREAD:g}"
        )
    return found
