"""What reading a release costs: all of it beside pyarrow, which checks nothing, a thousand items of it, and a query.

    python tests/benchmarks/reading.py [--items 1000000] [--dim 64] [--buckets 16] [--asked 1000] [--runs 7]

Rows with random unit vectors are written as a bucket's worker writes them; every measurement of ours opens the release
anew, so that it verifies every block that it touches. Measurements alternate, medians are shown, the files are in the
page cache. pyarrow reads the same columns of the same files twice: as one dataset, and file after file through a memory
map, the fastest way found. "First" is the first look-up of a release that was just opened; "later" are look-ups of
other random items, of which some blocks were touched before and some not. The first query is all from the release log
to the item ids of one vector's neighbours, the index verified and mapped on the way.
"""

# ruff: noqa: E402 - run as a script, it must find its neighbours first

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:1] = [str(HERE.parents[1]), str(HERE.parent)]

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from marc_pipeline.config import IndexSettings
from marc_pipeline.index.make import make_index
from marc_pipeline.reader.release import OpenRelease, open_release
from marc_pipeline.releases import log as release_log
from marc_pipeline.table.write import write_bucket_file
from marc_schemas.feature_table import file_schema
from marc_schemas.identity import row_id
from marc_schemas.moments import Moments
from published import DS, Site, items
from release_cases import altered

COLUMNS = ["item_id", "vector"]
LATER = 9
TABLE, NUMPY, LOOKUP = "all columns, Arrow", "ids and vectors, numpy", "vectors of {} items"
DATASET, MAPPED, OURS = "pyarrow, dataset", "pyarrow, mapped files", "ours, verified"
FIRST, NEXT = "ours, first", "ours, later"
QUERY = "neighbours of a vector"

Seconds = dict[tuple[str, str], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--buckets", type=int, default=16)
    parser.add_argument("--asked", type=int, default=1000, help="items of a look-up")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the seconds here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reading-") as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        release = write_release(folder, count=given.items, dim=given.dim, buckets=given.buckets)
        found = measure(release, asked=given.asked, runs=given.runs)
    show(found, release, given)
    if given.json:
        seconds = {f"{work}: {way}": runs for (work, way), runs in found.items()}
        given.json.write_text(json.dumps({"seconds": seconds, **verdict(found, given.asked)}))


def write_release(folder: Path, *, count: int, dim: int, buckets: int) -> OpenRelease:
    """A release of ``item-0``, ``item-1``, …, its rows written directly, with an index."""
    site = Site(folder, dim=dim)
    facts = site.publish(items(4, dim=dim), buckets=1)
    names = np.array([f"item-{number}" for number in range(count)], object)
    hashes = np.fromiter(map(row_id, names), np.int64, count)
    files = []
    for bucket in range(buckets):
        chosen = np.flatnonzero(hashes % buckets == bucket)
        chosen = chosen[np.argsort(names[chosen])]
        given: dict[str, Any] = {"dim": dim, "ds": DS, "bucket": bucket, "plan_id": "0" * 32, "footer": {}}
        rows = bucket_of(names[chosen], hashes[chosen], dim=dim, seed=bucket)
        if file := write_bucket_file(site.storage, site.table_uri, [rows], **given):
            files.append(file)
    built = make_index(
        files,
        base=None,
        storage=site.storage,
        table_uri=site.table_uri,
        index_uri=site.index_uri,
        work_uri=str(folder / "work" / "index"),
        plan_id="0" * 32,
        bundle=facts.bundle.version,
        buckets=buckets,
        moments=Moments.of(count, [0.0] * dim, 1.0),
        dim=dim,
        mantissa_bits=facts.table.mantissa_bits,
        # Of random vectors, which have no near neighbours, lists find half as they do almost all of others.
        settings=IndexSettings(target_recall=0.5),
    )
    facts = altered(
        facts,
        release_id=f"{facts.release_id}-large",
        turn=facts.turn + 1,
        table__files=tuple(files),
        table__buckets=buckets,
        counts__items=count,
        index=built.index,
    )
    assert release_log.append(site.storage, site.table_uri, [facts])
    return open_release(site.table_uri)


def bucket_of(names: NDArray[np.object_], hashes: NDArray[np.int64], *, dim: int, seed: int) -> pa.Table:
    drawn = np.random.default_rng(seed).standard_normal((len(names), dim), np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    schema, count = file_schema(dim), len(names)
    columns = [
        pa.array(names, pa.string()),
        pa.array(hashes),
        pa.FixedSizeListArray.from_arrays(pa.array(drawn.reshape(-1)), type=schema.field("vector").type),
        pa.array([f"{hashed:016x}{~hashed & 2**64 - 1:016x}" for hashed in hashes.tolist()]),
        pa.repeat("0" * 16, count),
        pa.repeat(pa.scalar(0, pa.int64()), count).cast(schema.field("encoded_at").type),
    ]
    return pa.table(columns, schema=schema)


# --- measuring


def measure(release: OpenRelease, *, asked: int, runs: int) -> Seconds:
    """Seconds of each run, by what is read and how."""
    files = release.files()
    ways: dict[tuple[str, str], Callable[[], object]] = {
        (TABLE, DATASET): lambda: pads.dataset(files).to_table(),
        (TABLE, MAPPED): lambda: mapped(files, None),
        (TABLE, OURS): lambda: anew(release).table(),
        (NUMPY, DATASET): lambda: as_numpy(pads.dataset(files).to_table(columns=COLUMNS), release.facts.table.dim),
        (NUMPY, MAPPED): lambda: as_numpy(mapped(files, COLUMNS), release.facts.table.dim),
        (NUMPY, OURS): lambda: anew(release).numpy(),
    }
    generator = np.random.default_rng(0)
    lookup = LOOKUP.format(f"{asked:,}")
    queries = generator.standard_normal((runs + 1, 1 + LATER, release.facts.table.dim), np.float32)
    found: Seconds = {key: [] for key in [*ways, (lookup, FIRST), (lookup, NEXT), (QUERY, FIRST), (QUERY, NEXT)]}
    # One round unmeasured: libraries are loaded, and the files are in the page cache.
    for number in range(-1, runs):
        if number == 0:
            found = {key: [] for key in found}
        for key, read in ways.items():
            found[key].append(timed(read))
        opened = anew(release)
        for way in [FIRST] + LATER * [NEXT]:
            ids = [f"item-{chosen}" for chosen in generator.integers(0, len(release), asked)]
            found[lookup, way].append(timed(lambda ids=ids, opened=opened: opened.vectors(ids)))
        first, *later = queries[number]
        found[QUERY, FIRST].append(timed(lambda first=first: open_release(release._uri).search(first)))
        opened.search(first)
        for query in later:
            found[QUERY, NEXT].append(timed(lambda query=query, opened=opened: opened.search(query)))
    return found


def anew(release: OpenRelease) -> OpenRelease:
    return OpenRelease(release.facts, uri=release._uri, storage=release.storage)


def mapped(files: Sequence[str], columns: list[str] | None) -> pa.Table:
    return pa.concat_tables([pq.ParquetFile(file, memory_map=True).read(columns=columns) for file in files])


def as_numpy(table: pa.Table, dim: int) -> tuple[pa.ChunkedArray, NDArray[np.float32]]:
    out, start = np.empty((table.num_rows, dim), np.float32), 0
    for chunk in table["vector"].chunks:
        out[start : start + len(chunk)] = chunk.flatten().to_numpy().reshape(-1, dim)
        start += len(chunk)
    return table["item_id"], out


def timed(work: Callable[[], object]) -> float:
    """Seconds; what was read is given back outside of them."""
    gc.collect()
    started = time.perf_counter()
    read = work()
    seconds = time.perf_counter() - started
    del read
    return seconds


def verdict(found: Seconds, asked: int) -> dict[str, float]:
    """How much faster a look-up is than the fastest way to read all, and numpy() than pyarrow's fastest."""
    median = {key: statistics.median(seconds) for key, seconds in found.items()}
    lookup = LOOKUP.format(f"{asked:,}")
    whole = min(median[TABLE, way] for way in (DATASET, MAPPED, OURS))
    return {
        "whole_table_over_first": whole / median[lookup, FIRST],
        "whole_table_over_later": whole / median[lookup, NEXT],
        "numpy_over_later": median[NUMPY, OURS] / median[lookup, NEXT],
        "numpy_speed": min(median[NUMPY, way] for way in (DATASET, MAPPED)) / median[NUMPY, OURS],
        "table_speed": min(median[TABLE, way] for way in (DATASET, MAPPED)) / median[TABLE, OURS],
    }


def show(found: Seconds, release: OpenRelease, given: argparse.Namespace) -> None:
    size = sum(file.bytes for file in release.facts.table.files) / 1e6
    title = f"{given.items:,} items × {given.dim}, {given.buckets} buckets, {size:,.0f} MB, {os.cpu_count()} cores"
    table = Table(title=f"{title}, medians of {given.runs}")
    for column in ("read", "how", "ms", "least", "most"):
        table.add_column(column, justify="left" if column in {"read", "how"} else "right")
    for (work, way), seconds in found.items():
        shown = (statistics.median(seconds), min(seconds), max(seconds))
        table.add_row(work, way, *(f"{1000 * value:,.1f}" for value in shown))
    console = Console(width=120)
    console.print(table)
    ratios = verdict(found, given.asked)
    console.print(
        f"a look-up is {ratios['whole_table_over_later']:.1f} × as fast as the fastest way to read the whole table, "
        f"the first one {ratios['whole_table_over_first']:.1f} ×;\n"
        f"speed beside pyarrow's fastest: numpy() {ratios['numpy_speed']:.2f} ×, table() {ratios['table_speed']:.2f} ×"
    )


if __name__ == "__main__":
    main()
