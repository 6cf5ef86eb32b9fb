"""The training set: items, interactions and hidden states of every layer, computed once for all trainings."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from marc_pipeline.catalogue.rows import read_items
from marc_pipeline.catalogue.source import CatalogueSource, find_source
from marc_pipeline.config import Settings, TrainSettings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.resources import return_memory
from marc_pipeline.storage import Storage, StoredObject, join
from marc_pipeline.storage.checksums import describe_file, verified_folder
from marc_pipeline.training.interaction_files import find_interactions
from marc_pipeline.training.interaction_rows import InteractionSource, Selection, read_rows
from marc_pipeline.training.interactions import Interactions, make_interactions
from marc_pipeline.training.time_split import Split, split_at, split_times
from marc_schemas.files import PublishedFile
from marc_schemas.identity import digest
from marc_schemas.training import FORMAT_VERSION, TrainingSetCard

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

T = TypeVar("T")

CARD = "training_set.json"
ITEMS = "items.parquet"
INTERACTIONS = "interactions.parquet"
PROFILES = "profiles.parquet"
STATES = "states.npy"
ROWS = "rows"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingIdentity:
    """The id of a training set, its catalogue and its interactions, known before Spark starts."""

    training_id: str
    ds: str
    source: CatalogueSource
    interactions: InteractionSource


@dataclass(frozen=True)
class StatesFacts:
    """Facts about the backbone from the pass over the texts."""

    layers: int
    width: int
    max_tokens: int
    dtype: str
    device: str


@dataclass(frozen=True)
class TrainingSet:
    """A training set on this machine.

    Attributes:
        folder: local folder with the files.
        card: facts about the training set.
        item_ids, texts: ids and texts of the items, in one order.
        interactions: ``items`` are positions in that order.
    """

    folder: Path
    card: TrainingSetCard
    item_ids: list[str]
    texts: list[str]
    interactions: Interactions

    @property
    def encoded_texts(self) -> list[str]:
        """Return the texts of the states: those of the items, then those of the users."""
        return [*self.texts, *self.interactions.profile_texts]

    @cached_property
    def split(self) -> Split:
        """Return training, validation and test part: 80, 10 and 10 % in the order of time."""
        return split_at(self.interactions, self.card.boundaries)

    def states(self, layer: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return a copy of the pooled hidden states [items + profiles, D] after a block, or of some of their rows.

        Layer 0 are the embeddings.
        """
        states = np.load(self.folder / STATES, mmap_mode="r")[layer]
        return np.array(states if rows is None else states[rows])


def identify_training(deployment: Deployment, *, ds: str) -> TrainingIdentity:
    """Find the catalogue and the interactions of a date, and return the id of their training set. Needs no Spark.

    Raises:
        UserError: there is no catalogue for the date, there are no interactions, or one of them lacks a column.
    """
    settings, storage = deployment.settings, deployment.storage
    source = find_source(settings.catalogue, settings.catalogue_uri(ds), ds=ds, storage=storage)
    found = find_interactions(storage, settings.interactions)
    wanted, train = settings.catalogue, settings.train
    parts = [
        FORMAT_VERSION, ds, sorted((file.uri.rsplit("/", 1)[1], file.digest) for file in source.files), source.format,
        wanted.id_column, wanted.updated_at_column, wanted.rendering,
        sorted(storage.content_digest(stored) for stored in found.files),
        settings.interactions.model_dump(exclude={"uri", "history", "negatives", "negative_popularity"}),
        train.backbone, backbone_files(train.backbone), train.pooling, train.max_tokens, train.sample,
        settings.encode.dtype, settings.encode.long_texts,
    ]  # fmt: skip
    interactions = InteractionSource(found, settings.interactions, storage)
    return TrainingIdentity(training_id=digest(parts), ds=ds, source=source, interactions=interactions)


def require_interactions(deployment: Deployment, identity: TrainingIdentity) -> None:
    """Check the rows of the interactions before Spark starts, unless the training set exists or Spark must read them.

    Raises:
        UserError: a value cannot be read, or the interactions cannot be used.
    """
    card = join(training_uri(deployment.settings.work_uri, identity.training_id), CARD)
    if identity.interactions.small and deployment.storage.stat(card) is None:
        _ = identity.interactions.selection


def require_announced(identity: TrainingIdentity, expected: str) -> None:
    """Require the training set that an earlier task of the same run identified.

    Raises:
        UserError: the catalogue, the interactions or the settings changed since then.
    """
    if identity.training_id != expected:
        raise UserError(
            f"the catalogue, the interactions or the settings changed during the training: {expected} is now "
            f"{identity.training_id}; start the training again"
        )


def make_training_set(
    spark: "SparkSession",
    settings: Settings,
    identity: TrainingIdentity,
    *,
    storage: Storage,
    write_states: Callable[[list[str], Path], StatesFacts],
) -> TrainingSet:
    """Write items, interactions and hidden states to the work area, unless they exist, and return them.

    ``write_states`` writes states [L + 1, texts, D] of the items' and then the users' texts as a ``.npy`` file.

    Raises:
        UserError: the catalogue or the interactions cannot be used.
    """
    uri = training_uri(settings.work_uri, identity.training_id)
    if storage.stat(join(uri, CARD)):
        log.info("training set: %s exists already", identity.training_id)
        return open_training_set(storage, settings.work_uri, identity.training_id)
    rows, selection = _read_rows(spark, identity.interactions, folder=join(uri, ROWS))
    wanted = rows["item"].combine_chunks().dictionary.to_pylist()
    items = read_items(
        spark, identity.source, settings.catalogue, storage=storage, wanted=wanted, sample=settings.train.sample
    )
    if not items:
        raise UserError(f"the catalogue of {identity.ds} has no usable row; `marc plan` reports the reasons")
    item_ids, texts = ([row[place] for row in items] for place in (0, 1))
    interactions = make_interactions(rows, settings.interactions, item_ids, implicit=selection.feedback.implicit)
    # A split that is not possible is reported before the long pass.
    boundaries = split_times(interactions)
    log.info(
        "training set: %s items, %s users, %s interactions (%s)",
        *(f"{n:,}" for n in (len(items), interactions.n_users, len(interactions))),
        "positives only" if interactions.implicit else f"{interactions.labels.mean():.0%} clicks",
    )
    files: dict[str, PublishedFile] = {}

    def put(name: str, write: Callable[[Path], T]) -> T:
        with storage.staged(join(uri, name)) as staged:
            result = write(staged)
            files[name] = describe_file(staged, path=name)
            storage.publish(staged, join(uri, name))
        return result

    facts = put(STATES, lambda path: write_states([*texts, *interactions.profile_texts], path))
    put(ITEMS, lambda path: pq.write_table(pa.table({"item_id": item_ids, "text": texts}), path))
    profiles = pa.table({"text": pa.array(interactions.profile_texts, pa.string())})
    put(PROFILES, lambda path: pq.write_table(profiles, path))
    put(INTERACTIONS, lambda path: pq.write_table(interactions_table(interactions), path))
    card = TrainingSetCard(
        training_id=identity.training_id,
        ds=identity.ds,
        template=settings.catalogue.rendering,
        backbone=settings.train.backbone,
        pooling=settings.train.pooling,
        long_texts=settings.encode.long_texts,
        **vars(facts),
        boundaries=boundaries,
        items=len(items),
        users=interactions.n_users,
        interactions=len(interactions),
        clicks=int(interactions.labels.sum()),
        implicit=interactions.implicit,
        files=files,
    )
    storage.write(join(uri, CARD), card.model_dump_json(indent=1).encode())
    return open_training_set(storage, settings.work_uri, identity.training_id)


def _read_rows(spark: "SparkSession", source: InteractionSource, *, folder: str) -> tuple[pa.Table, Selection]:
    if source.small:
        return read_rows(source), source.selection
    from marc_pipeline.training.interaction_tasks import read_rows_in_spark

    return read_rows_in_spark(spark, source, folder=folder)


def open_training_set(storage: Storage, work_uri: str, training_id: str) -> TrainingSet:
    """Return a training set of the work area, all files verified; files on S3 are downloaded once per machine.

    Raises:
        UserError: the work area has no training set of this name.
        CorruptFile: a file of the work area is missing or differs from its checksum.
    """
    uri = training_uri(work_uri, training_id)
    card = read_card(storage, work_uri, training_id)
    folder = verified_folder(
        storage,
        uri,
        {name: file.sha256 for name, file in card.files.items()},
        key=f"training/{training_id}",
        remedy=f"delete the folder {uri} and train again",
    )
    items = pq.read_table(folder / ITEMS)
    with pq.ParquetFile(folder / INTERACTIONS) as file:
        # One column at a time, because many interactions would need their memory twice.
        columns = {name: _column(file, name) for name in file.schema_arrow.names}
    pa.default_memory_pool().release_unused()
    return_memory()
    return TrainingSet(
        folder=folder,
        card=card,
        item_ids=items["item_id"].to_pylist(),
        texts=items["text"].to_pylist(),
        interactions=Interactions(
            **columns,
            profile_texts=tuple(pq.read_table(folder / PROFILES)["text"].to_pylist()),
            implicit=card.implicit,
        ),
    )


def _column(file: pq.ParquetFile, name: str) -> NDArray[Any]:
    """Return a column as an array that can be written, because torch warns about others."""
    values: NDArray[Any] = file.read(columns=[name])[name].to_numpy()
    return values if values.flags.writeable else values.copy()


@lru_cache(maxsize=1)
def cached_training_set(storage: Storage, work_uri: str, training_id: str) -> TrainingSet:
    """Return :func:`open_training_set`, once per process, for the tasks of a worker."""
    return open_training_set(storage, work_uri, training_id)


def read_card(storage: Storage, work_uri: str, training_id: str) -> TrainingSetCard:
    """Return the card of a training set, without verifying its files.

    Raises:
        UserError: the work area has no training set of this name.
        CorruptFile: the card cannot be read.
    """
    uri = join(training_uri(work_uri, training_id), CARD)
    try:
        return TrainingSetCard.model_validate_json(storage.read(uri))
    except FileNotFoundError:
        raise UserError(f"no training set {training_id} under {work_uri}; make it with `marc train`") from None
    except ValidationError:
        raise CorruptFile(f"{uri} cannot be read; delete the folder and train again") from None


def backbone_files(backbone: str) -> list[tuple[str, str]]:
    """Return names and digests of the files of a backbone, if it is a local folder, because its files may change.

    The list is empty for models of a hub or a package, which do not change.
    """
    if not Path(backbone).is_dir():
        return []
    files = sorted(path for path in Path(backbone).iterdir() if path.is_file())
    return [(path.name, Storage().content_digest(StoredObject(uri=str(path), bytes=0))) for path in files]


def require_shape(train: TrainSettings, dims: Sequence[int], *, layers: int, width: int) -> None:
    """Require a backbone with enough layers and a sufficient width.

    Raises:
        UserError: the backbone has fewer layers, or a smaller width; or no layer is kept that LoRA could tune.
    """
    if train.layers == 0 and train.regime == "tuned" and train.compressor != "pca":
        raise UserError(
            "train.regime is tuned, and LoRA needs at least one layer; 0 layers are kept: set train.layers to at least "
            "1, or train.regime to frozen"
        )
    if train.layers is not None and train.layers > layers:
        raise UserError(f"train.layers is {train.layers}, the backbone has {layers} layers; choose at most {layers}")
    if dims and max(dims) > width:
        raise UserError(
            f"{max(dims)} dimensions are wanted, the backbone's hidden state has {width} numbers; "
            f"choose at most {width}"
        )


def training_uri(work_uri: str, training_id: str) -> str:
    """Return the uri of a training set's folder."""
    return join(work_uri, "training", training_id)


def interactions_table(interactions: Interactions) -> pa.Table:
    """Return interactions in the columns of a training set's file."""
    columns = {name: values for name, values in vars(interactions).items() if isinstance(values, np.ndarray)}
    return pa.table(columns)
