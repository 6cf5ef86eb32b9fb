"""Measure reading of a release: the whole table beside pyarrow, which verifies nothing, a look-up, and a query.

    python tests/benchmarks/reading.py [--items 1000000] [--dim 64] [--buckets 16] [--asked 1000] [--runs 7]

The release contains random unit vectors, written as the encode stage writes them. marc opens the release anew for each
measurement, so it verifies every block that it reads. Measurements alternate; all files are in the page cache.
pyarrow reads the same columns of the same files in two ways: as one dataset, and each file through a memory map.
"first" is the first look-up after opening; "later" are look-ups of other random items. The first query runs from
reading the release log to the item ids of the neighbours; it verifies and maps the index.
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from measuring import options, seconds_of, show, working_folder, write_json
from numpy.typing import NDArray

from marc_pipeline.config import IndexSettings
from marc_pipeline.reader.release import OpenRelease, open_release
from published import Site, items

COLUMNS = ["item_id", "vector"]
LATER = 9
TABLE, NUMPY, QUERY = "all columns, Arrow", "ids and vectors, numpy", "neighbours of a vector"
DATASET, MAPPED, MARC = "pyarrow, dataset", "pyarrow, mapped files", "marc, verified"
FIRST, NEXT = "marc, first", "marc, later"

Seconds = dict[tuple[str, str], list[float]]


def measure(release: OpenRelease, lookup: str, *, asked: int, runs: int) -> Seconds:
    """Seconds of each run, by work and way."""
    files, dim = release.files(), release.facts.table.dim
    ways: dict[tuple[str, str], Callable[[], object]] = {
        (TABLE, DATASET): lambda: pads.dataset(files).to_table(),
        (TABLE, MAPPED): lambda: mapped(files, None),
        (TABLE, MARC): lambda: reopened(release).table(),
        (NUMPY, DATASET): lambda: as_numpy(pads.dataset(files).to_table(columns=COLUMNS), dim),
        (NUMPY, MAPPED): lambda: as_numpy(mapped(files, COLUMNS), dim),
        (NUMPY, MARC): lambda: reopened(release).numpy(),
    }
    generator = np.random.default_rng(0)
    queries = generator.standard_normal((runs + 1, 1 + LATER, dim), np.float32)
    found: Seconds = {}
    # The first round is not measured: it loads libraries and fills the page cache.
    for number in range(-1, runs):
        if number == 0:
            found.clear()
        for key, read in ways.items():
            found.setdefault(key, []).append(timed(read))
        opened = reopened(release)
        for way in [FIRST] + LATER * [NEXT]:
            ids = [f"item-{chosen}" for chosen in generator.integers(0, len(release), asked)]
            found.setdefault((lookup, way), []).append(timed(lambda ids=ids, opened=opened: opened.vectors(ids)))
        first, *later = queries[number]
        search_anew = lambda first=first: open_release(release._uri).search(first)  # noqa: E731
        found.setdefault((QUERY, FIRST), []).append(timed(search_anew))
        opened.search(first)
        for query in later:
            found.setdefault((QUERY, NEXT), []).append(timed(lambda query=query, opened=opened: opened.search(query)))
    return found


def reopened(release: OpenRelease) -> OpenRelease:
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
    """Seconds of a call that starts with an empty garbage collector."""
    gc.collect()
    return seconds_of(work)


def ratios(found: Seconds, lookup: str) -> dict[str, float]:
    """Speed of a look-up relative to the fastest full read, and of marc relative to the fastest way of pyarrow."""
    middle = {key: median(seconds) for key, seconds in found.items()}
    whole = min(middle[TABLE, way] for way in (DATASET, MAPPED, MARC))
    return {
        "whole_table_over_first": whole / middle[lookup, FIRST],
        "whole_table_over_later": whole / middle[lookup, NEXT],
        "numpy_over_later": middle[NUMPY, MARC] / middle[lookup, NEXT],
        "numpy_speed": min(middle[NUMPY, way] for way in (DATASET, MAPPED)) / middle[NUMPY, MARC],
        "table_speed": min(middle[TABLE, way] for way in (DATASET, MAPPED)) / middle[TABLE, MARC],
    }


def main() -> None:
    given = options(__doc__, items=1_000_000, dim=64, buckets=16, asked=1000, runs=7, folder=Path)
    lookup = f"vectors of {given.asked:,} items"
    with working_folder(given.folder) as folder:
        site = Site(folder, dim=given.dim)
        # Random vectors have no near neighbours: at this recall, search visits as many lists as on real vectors.
        index = IndexSettings(target_recall=0.5)
        site.publish(items(given.items, dim=given.dim), buckets=given.buckets, index=index)
        release = open_release(site.table_uri)
        found = measure(release, lookup, asked=given.asked, runs=given.runs)
        size = sum(file.bytes for file in release.facts.table.files) / 1e6
    speed = ratios(found, lookup)
    rows = [
        (work, way, 1000 * median(seconds), 1000 * min(seconds), 1000 * max(seconds))
        for (work, way), seconds in found.items()
    ]
    title = f"{given.items:,} items × {given.dim}, {given.buckets} buckets, {size:,.0f} MB, medians of {given.runs}"
    notes = (
        f"a later look-up is {speed['whole_table_over_later']:.1f} × as fast as the fastest read of the whole table, "
        f"the first one {speed['whole_table_over_first']:.1f} ×",
        f"relative to the fastest way of pyarrow: numpy() {speed['numpy_speed']:.2f} ×, "
        f"table() {speed['table_speed']:.2f} ×",
    )
    show(title, "read|how|ms:,.1f|least:,.1f|most:,.1f", rows, texts=2, notes=notes)
    write_json(given.json, {"seconds": {f"{work}: {way}": runs for (work, way), runs in found.items()}, **speed})


if __name__ == "__main__":
    main()
