"""Measure what fewer mantissa bits save and cost: bytes on disk, neighbours, and the AUC of a click model.

    marc -c tests/benchmarks/ml-latest-small/marc.yaml train --ds 2026-11-21 --layers 3
    python tests/benchmarks/mantissa.py [--config FILE] [--ds DATE] [--bits 23,10] [--seeds 5] [--json FILE]

The vectors are those of the current bundle for its training items. They are written with the writer of the nightly
run and read back. Recall compares exact search on stored vectors with exact search on computed vectors; all items are
queries. The click model is the one that evaluates bundles, trained on the stored vectors. ``--ds`` is the date of the
training, ``--seeds`` the number of click models.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
from material import quiet
from measuring import CORES, options, show, write_json
from rows import Matrix, write_buckets

from marc_pipeline.config import Settings, load_settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.evaluation.click_data import time_split_data
from marc_pipeline.evaluation.click_model import score_vectors
from marc_pipeline.model.bundle import Bundle, open_bundle
from marc_pipeline.model.device import use_threads
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_pipeline.table.rows import read_rows
from marc_pipeline.training.training_set import TrainingSet, identify_training, open_training_set
from marc_schemas.feature_table import MANTISSA_BITS, VECTOR_COLUMN
from marc_schemas.identity import content_hash

CONFIG = Path(__file__).resolve().parent / "ml-latest-small" / "marc.yaml"
NEIGHBOURS = 10
# Inner products that differ by less are a tie: equal texts have equal neighbours.
TIE = 1e-6
COLUMNS = f"bits:d|bytes per item:.1f|of them the vector:.1f|recall@{NEIGHBOURS}:.4f|test AUC|minus whole floats"


@dataclass(frozen=True)
class Cost:
    """Size and quality of vectors with one number of mantissa bits.

    Attributes:
        bytes_per_item: size of the files; vector_bytes: size of their vector column.
        recall: recall@10 of exact search.
        aucs: AUC on the test part, one per seed.
    """

    bits: int
    bytes_per_item: float
    vector_bytes: float
    recall: float
    aucs: list[float]

    def row(self, whole: "Cost | None") -> tuple[Any, ...]:
        """One row of the table; ``whole`` is the row of whole floats."""
        lost = spread(np.subtract(self.aucs, whole.aucs), sign="+") if whole and self is not whole else None
        return self.bits, self.bytes_per_item, self.vector_bytes, self.recall, spread(self.aucs), lost


def measure(
    bits: int, vectors: Matrix, training_set: TrainingSet, bundle: Bundle, settings: Settings, *, seeds: int
) -> Cost:
    stored, size, vector_size = written(vectors, training_set, bundle, buckets=settings.buckets, bits=bits)
    data = time_split_data(
        training_set.interactions, training_set.card.boundaries, items=len(vectors), settings=settings.interactions
    )
    return Cost(
        bits=bits,
        bytes_per_item=size / len(vectors),
        vector_bytes=vector_size / len(vectors),
        recall=recall(stored, vectors),
        aucs=[score_vectors(stored, data, seed=seed).auc for seed in range(seeds)],
    )


def written(
    vectors: Matrix, training_set: TrainingSet, bundle: Bundle, *, buckets: int, bits: int
) -> tuple[Matrix, int, int]:
    """Write all items; returns vectors [n, d] as read back, bytes of the files, and bytes of their vector columns."""
    stored, size, vector_size = np.empty_like(vectors), 0, 0
    hashes = [content_hash(text) for text in training_set.texts]
    given: dict[str, Any] = {"buckets": buckets, "ds": training_set.card.ds, "bundle": bundle.version}
    with tempfile.TemporaryDirectory(prefix="mantissa-") as folder:
        for chosen, file in write_buckets(folder, training_set.item_ids, vectors, hashes, mantissa_bits=bits, **given):
            found = read_rows(Storage(), folder, file, columns=["vector"])["vector"].combine_chunks()
            stored[chosen] = found.flatten().to_numpy().reshape(len(chosen), -1)
            size += file.bytes
            vector_size += column_bytes(Path(folder) / file.path)
    return stored, size, vector_size


def column_bytes(path: Path) -> int:
    """Bytes of a file's vector column."""
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.total_compressed_size for column in columns if column.path_in_schema == VECTOR_COLUMN)


def recall(stored: Matrix, vectors: Matrix) -> float:
    """Share of the nearest neighbours by stored vectors that are also nearest by computed vectors.

    The item itself does not count as a neighbour; ties with the last place count as found.
    """
    k = min(NEIGHBOURS, len(vectors) - 1)
    own = np.arange(len(vectors))[:, None]
    _, found = faiss.knn(stored, stored, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    hits = 0
    for start in range(0, len(vectors), 1024):
        some = slice(start, start + 1024)
        scores = vectors[some] @ vectors.T
        np.put_along_axis(scores, own[some], -np.inf, axis=1)
        last = np.partition(scores, -k, axis=1)[:, -k, None]
        # The item comes first, unless another item has the same vector.
        others = np.array([[n for n in row if n != i][:k] for i, row in zip(own[some, 0], found[some], strict=True)])
        hits += int((np.take_along_axis(scores, others, axis=1) >= last - TIE).sum())
    return hits / (k * len(vectors))


def spread(values: Sequence[float], *, sign: str = "") -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):{sign}.4f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.4f}"


def main() -> None:
    given = options(__doc__, config=CONFIG, ds="2026-11-21", bits=[23, 15, 12, 10, 8, 7, 5, 3], seeds=5)
    deployment = open_deployment(load_settings(given.config))
    settings, storage = deployment.settings, deployment.storage
    training_id = identify_training(deployment, ds=given.ds).training_id
    training_set = open_training_set(storage, settings.work_uri, training_id)
    bundle, resources = open_bundle(storage, settings.bundle_uri), TaskResources(cpus=CORES)
    use_threads(CORES)
    with quiet():
        encoder = load_encoder(storage, bundle.uri, bundle.version, settings.encode, resources)
    vectors = encoder.encode(training_set.texts).vectors
    costs = [measure(bits, vectors, training_set, bundle, settings, seeds=given.seeds) for bits in given.bits]
    whole = next((cost for cost in costs if cost.bits == MANTISSA_BITS), None)
    title = f"{len(vectors):,} items in {settings.buckets} buckets, bundle {bundle.version}, d = {bundle.card.dim}"
    show(title, COLUMNS, [cost.row(whole) for cost in costs], texts=0)
    write_json(given.json, {"costs": [asdict(cost) for cost in costs]})


if __name__ == "__main__":
    main()
