"""Texts as queries: encode them with the bundle of a release. Needs the extra ``model``."""

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

    The first call fetches, verifies and loads the bundle. Later calls reuse it.

    Args:
        release: the release whose bundle encodes the texts.
        texts: the item template is not applied to them.
        settings: device, dtype and batches, by default chosen for this machine. The release decides about long texts.

    Returns:
        float32 [n, d], in the order of the texts.

    Raises:
        UserError: a text is empty, or the extra ``model`` is not installed.
        CorruptFile: the bundle differs from its checksums.
        Unencodable: the model returns no usable vector for a text.
    """
    if isinstance(texts, str):
        raise UserError(f"texts is the string {texts!r}; pass a list of texts")
    empty = next((place for place, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise UserError(f"text {empty} is empty; remove it")
    try:
        from marc_pipeline.model.encoder import load_encoder
    except ModuleNotFoundError as error:
        raise UserError(f"encoding texts needs the extra model: pip install 'marc-pipeline[model]' ({error})") from None
    if not texts:
        return np.empty((0, release.facts.table.dim), np.float32)
    bundle = release.facts.bundle
    # Queries and items must be encoded alike.
    update = {"long_texts": release.facts.table.long_texts}
    wanted = (settings or EncodeSettings()).model_copy(update=update)
    encoder = load_encoder(release.storage, bundle.uri, bundle.version, wanted, TaskResources())
    return encoder.encode(texts).vectors
