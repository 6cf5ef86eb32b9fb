"""Texts as queries: encoded by the bundle that made the vectors of a release. Needs the extra ``model``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import EncodeSettings
from marc_pipeline.errors import UserError
from marc_pipeline.resources import TaskResources

if TYPE_CHECKING:
    from marc_pipeline.reader.release import OpenRelease


def encode_texts(
    release: "OpenRelease", texts: Sequence[str], *, settings: EncodeSettings | None = None
) -> NDArray[np.float32]:
    """Vectors of texts, for :meth:`marc_pipeline.reader.OpenRelease.search`.

    The bundle is fetched, verified and loaded at the first call, and kept.

    Args:
        release: whose bundle encodes them.
        texts: as they are; the template of the items is not applied.
        settings: device, dtype and batches; by default chosen for this machine.

    Returns:
        float32 [n, d], rows in the order of the texts.

    Raises:
        UserError: a text is empty, or the extra ``model`` is not installed.
        CorruptFile: the bundle differs from its checksums.
        Unencodable: the model gives no vector for a text.
    """
    if isinstance(texts, str):
        raise UserError(f"texts is one text, {texts!r}; it takes several")
    empty = next((place for place, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise UserError(f"text {empty} is empty; there is nothing to look up")
    try:
        from marc_pipeline.model.encoder import load_encoder
    except ModuleNotFoundError as error:
        raise UserError(f"encoding texts needs the model: pip install 'marc-pipeline[model]' ({error})") from None
    if not texts:
        return np.empty((0, release.facts.table.dim), np.float32)
    bundle = release.facts.bundle
    encoder = load_encoder(release.storage, bundle.uri, bundle.version, settings or EncodeSettings(), TaskResources())
    return encoder.encode(texts).vectors
