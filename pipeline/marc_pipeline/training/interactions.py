"""Interactions of users with items, in the order of time, as arrays; read from files of ratings or purchases."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage
from marc_pipeline.training.interaction_columns import TEXT, shown
from marc_pipeline.training.interaction_files import read_files

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions in the order of time; rows with the same time keep the order of the files.

    Attributes:
        users: int64 [n], numbered from 0 by first appearance.
        items: int64 [n], positions in the list of item ids.
        labels: float32 [n], 1 for a click, else 0.
        times: int64 [n], microseconds since 1970 (UTC), ascending.
        profiles: int64 [n], rows of ``profile_texts`` with the text about the user at that time, −1 if there is none;
            None if users have no texts.
        profile_texts: distinct texts.
        weights: float32 [n], weight of the event of each row; 1 if not given, and for ratings.
        implicit: whether the files have positives only: all ``labels`` are 1, and negatives must be sampled.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    labels: NDArray[np.float32]
    times: NDArray[np.int64]
    profiles: NDArray[np.int64] | None = None
    profile_texts: tuple[str, ...] = ()
    weights: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    implicit: bool = False

    def __post_init__(self) -> None:
        if not len(self.weights):
            object.__setattr__(self, "weights", np.ones(len(self.times), np.float32))
        # Splits and histories rely on the order; without it the future would leak into them.
        if (np.diff(self.times) < 0).any():
            raise ValueError("interactions must be sorted by time")

    def __len__(self) -> int:
        return len(self.users)

    @property
    def n_users(self) -> int:
        """Return the highest user number plus 1."""
        return int(self.users.max(initial=-1)) + 1

    def take(self, rows: slice | NDArray[np.int64]) -> "Interactions":
        """Return some of the rows, which must be ascending; users keep their numbers."""
        columns = {name: values[rows] for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        return replace(self, **columns)


def named_items(storage: Storage, settings: InteractionSettings) -> list[str]:
    """Return the distinct item ids of the interactions.

    Raises:
        UserError: the interactions cannot be read.
    """
    names: list[str] = pc.unique(read_files(storage, settings)["item"]).to_pylist()
    return names


def read_interactions(storage: Storage, settings: InteractionSettings, item_ids: Sequence[str]) -> Interactions:
    """Read the interactions with the items of ``item_ids``. Ids are compared as text.

    Raises:
        UserError: the interactions cannot be read, too many name an unknown item, or all have the same label or user.
    """
    table = _of_known_items(read_files(storage, settings), settings, item_ids)
    table = table.take(np.argsort(table["time"].to_numpy(), kind="stable"))
    # astype copies, because torch warns about Arrow's read-only memory.
    interactions = Interactions(
        users=table["user"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64),
        items=table["position"].to_numpy().astype(np.int64),
        labels=table["label"].to_numpy().astype(np.float32),
        times=table["time"].to_numpy().astype(np.int64),
        **(_profiles(table) if settings.user_text_column else {}),
    )
    _require_variety(interactions, settings)
    return interactions


def _profiles(table: pa.Table) -> dict[str, Any]:
    """Return the fields ``profiles`` and ``profile_texts``; a blank text counts as no text."""
    texts = table["profile"].combine_chunks()
    texts = pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), pa.scalar(None, TEXT), texts)
    encoded = texts.dictionary_encode()
    profiles = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    return {"profiles": profiles, "profile_texts": tuple(encoded.dictionary.to_pylist())}


def _of_known_items(table: pa.Table, settings: InteractionSettings, item_ids: Sequence[str]) -> pa.Table:
    """Return the rows with a known item, and a column ``position`` with its place in ``item_ids``."""
    positions = pc.index_in(table["item"], value_set=pa.array(item_ids, TEXT))
    n, unknown = table.num_rows, positions.null_count
    if unknown:
        example = shown(table["item"].filter(positions.is_null())[0])
        what = f"of the {n:,} rows at {settings.uri} name items that the catalogue lacks, for example {example}"
        if unknown == n:
            raise UserError(f"all {what}; is interactions.item_column {settings.item_column!r} the catalogue's id?")
        share = f"{unknown:,} ({unknown / n:.2%}) {what}"
        if unknown / n > settings.max_unknown_fraction:
            raise UserError(
                f"{share}; the limit is {settings.max_unknown_fraction:.2%}: correct the ids, or raise "
                "interactions.max_unknown_fraction to skip these rows"
            )
        log.warning("interactions: %s: skipped", share)
    return table.append_column("position", positions).filter(positions.is_valid()).combine_chunks()


def _require_variety(interactions: Interactions, settings: InteractionSettings) -> None:
    n, where = len(interactions), f"interactions at {settings.uri}"
    clicks = int(interactions.labels.sum(dtype=np.int64))
    threshold = f"interactions.positive_rating {settings.positive_rating:g}"
    if clicks == n:
        raise UserError(f"all {n:,} {where} are clicks: no rating is below {threshold}; raise it")
    if clicks == 0:
        raise UserError(f"none of the {n:,} {where} is a click: no rating reaches {threshold}; lower it")
    if interactions.n_users == 1:
        raise UserError(
            f"all {n:,} {where} are of one user, and at least 2 are needed; "
            f"does interactions.user_column {settings.user_column!r} name the users?"
        )
