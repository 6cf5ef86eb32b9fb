"""What fewer mantissa bits save and what they cost: bytes on disk, neighbours, the AUC of a click model. One table.

    marc -c tests/benchmarks/ml-latest-small/marc.yaml train --ds 2026-11-21 --layers 3
    python tests/benchmarks/mantissa.py [--config FILE] [--ds DATE] [--bits 23,10] [--seeds 5] [--json FILE]

The vectors are those of the current bundle for the items that it was trained on, written by the writer of the nights
and read back from there. Recall is that of exact search on them against exact search on what the bundle computed, all
items as queries; the click model is the one that bundles are judged by, trained on what was read back.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from material import quiet
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from marc_pipeline.config import Settings, load_settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.evaluation.click_model import click_data, score_vectors
from marc_pipeline.model.bundle import Bundle, open_bundle
from marc_pipeline.model.device import use_threads
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_pipeline.table.rows import read_rows
from marc_pipeline.table.write import write_bucket_file
from marc_pipeline.training.training_set import TrainingSet, identify_training, open_training_set
from marc_schemas.feature_table import MANTISSA_BITS, VECTOR_COLUMN, file_schema
from marc_schemas.identity import content_hash, row_id

CONFIG = Path(__file__).resolve().parent / "ml-latest-small" / "marc.yaml"
BITS = "23,15,12,10,8,7,5,3"
NEIGHBOURS = 10
# As close as this two inner products are a tie: texts that are the same have the same neighbours.
TIE = 1e-6

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Cost:
    """What vectors of so many bits take and give.

    Attributes:
        bytes_per_item: of the files; vector_bytes: of their column of vectors.
        recall: recall@10 of exact search.
        aucs: on the test part, one per seed.
    """

    bits: int
    bytes_per_item: float
    vector_bytes: float
    recall: float
    aucs: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--ds", default="2026-11-21", help="date that the bundle was trained for")
    parser.add_argument("--bits", default=BITS)
    parser.add_argument("--seeds", type=int, default=5, help="of the click model")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    settings, storage = load_settings(arguments.config), Storage()
    identity = identify_training(Deployment(settings, storage), ds=arguments.ds)
    training_set = open_training_set(storage, settings.work_uri, identity.training_id)
    bundle = open_bundle(storage, settings.bundle_uri)
    resources = TaskResources(cpus=len(os.sched_getaffinity(0)))
    use_threads(resources.cpus)
    with quiet():
        encoder = load_encoder(storage, bundle.uri, bundle.version, settings.encode, resources)
    vectors = encoder.encode(training_set.texts).vectors
    wanted = [int(bits) for bits in arguments.bits.split(",")]
    costs = [cost(bits, vectors, training_set, bundle, settings, seeds=range(arguments.seeds)) for bits in wanted]
    show(costs, bundle, items=len(vectors), buckets=settings.buckets)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(found) for found in costs], indent=1))


def cost(
    bits: int, vectors: Matrix, training_set: TrainingSet, bundle: Bundle, settings: Settings, *, seeds: Sequence[int]
) -> Cost:
    stored, size, vector_size = written(vectors, training_set, bundle, buckets=settings.buckets, bits=bits)
    data = click_data(
        training_set.interactions,
        training_set.split,
        n_items=len(vectors),
        history=settings.interactions.history,
    )
    return Cost(
        bits=bits,
        bytes_per_item=size / len(vectors),
        vector_bytes=vector_size / len(vectors),
        recall=recall(stored, vectors),
        aucs=[score_vectors(stored, data, seed=seed).auc for seed in seeds],
    )


def written(
    vectors: Matrix, training_set: TrainingSet, bundle: Bundle, *, buckets: int, bits: int
) -> tuple[Matrix, int, int]:
    """Write all items as a night does; vectors as they are read back, bytes of the files and of the vectors in them."""
    storage, stored, sizes, vector_sizes = Storage(), np.empty_like(vectors), [], []
    places: list[list[int]] = [[] for _ in range(buckets)]
    for place in sorted(range(len(vectors)), key=lambda place: training_set.item_ids[place].encode()):
        places[row_id(training_set.item_ids[place]) % buckets].append(place)
    with tempfile.TemporaryDirectory(prefix="mantissa-") as folder:
        for bucket, chosen in enumerate(places):
            file = write_bucket_file(
                storage,
                folder,
                [rows(vectors, training_set, bundle, chosen)],
                dim=bundle.card.dim,
                ds=training_set.card.ds,
                bucket=bucket,
                plan_id="0" * 32,
                footer={},
                mantissa_bits=bits,
            )
            if file is None:
                continue
            found = read_rows(storage, folder, file, columns=["vector"])["vector"].combine_chunks()
            stored[chosen] = found.flatten().to_numpy().reshape(len(chosen), -1)
            sizes.append(file.bytes)
            vector_sizes.append(column_bytes(Path(folder) / file.path))
    return stored, sum(sizes), sum(vector_sizes)


def rows(vectors: Matrix, training_set: TrainingSet, bundle: Bundle, places: list[int]) -> pa.Table:
    """Some items as rows of the feature table."""
    schema = file_schema(bundle.card.dim)
    ids = [training_set.item_ids[place] for place in places]
    columns = {
        "item_id": ids,
        "row_id": [row_id(item) for item in ids],
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors[places].reshape(-1)), type=schema.field("vector").type
        ),
        "content_hash": [content_hash(training_set.texts[place]) for place in places],
        "bundle": [bundle.version] * len(ids),
        "encoded_at": [datetime(2026, 11, 21, tzinfo=UTC)] * len(ids),
    }
    return pa.table(columns, schema=schema)


def column_bytes(path: Path) -> int:
    """Bytes of a file's column of vectors."""
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.total_compressed_size for column in columns if column.path_in_schema == VECTOR_COLUMN)


def recall(stored: Matrix, vectors: Matrix) -> float:
    """Share of the nearest neighbours by stored vectors that are nearest neighbours by the computed ones as well.

    Of every item, itself left out; what ties with the last place counts.
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
        mine = found[some]
        # The item itself comes first, unless another one has the very same vector.
        others = np.array([[n for n in row if n != i][:k] for i, row in zip(own[some, 0], mine, strict=True)])
        hits += int((np.take_along_axis(scores, others, axis=1) >= last - TIE).sum())
    return hits / (k * len(vectors))


def show(costs: Sequence[Cost], bundle: Bundle, *, items: int, buckets: int) -> None:
    table = Table(title=f"{items:,} items in {buckets} buckets, bundle {bundle.version}, d = {bundle.card.dim}")
    names = ("bits", "bytes per item", "its vector", f"recall@{NEIGHBOURS}", "test AUC", "minus whole floats")
    for name in names:
        table.add_column(name, justify="right")
    whole = next((found for found in costs if found.bits == MANTISSA_BITS), None)
    for found in costs:
        lost = np.subtract(found.aucs, whole.aucs) if whole else None
        table.add_row(
            str(found.bits),
            f"{found.bytes_per_item:.1f}",
            f"{found.vector_bytes:.1f}",
            f"{found.recall:.4f}",
            spread(found.aucs),
            "" if lost is None or found is whole else spread(lost, sign="+"),
        )
    Console(width=110).print(table)


def spread(values: Sequence[float] | NDArray[np.float64], *, sign: str = "") -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):{sign}.4f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.4f}"


if __name__ == "__main__":
    main()
