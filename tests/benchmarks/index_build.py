"""The index stage beside autofaiss: the same vectors on the same cores, fresh processes in turn, one table.

    python tests/benchmarks/index_build.py [--items 1000000] [--dim 64] [--repeats 5] [--peer-python PYTHON]
        [--bundle URI] [--data FOLDER] [--noise .5] [--factory auto]
        [--memory-mib 256] [--patch .01]

The material is a catalogue's real vectors, repeated with noise until there are enough: the texts of
netflix_titles.csv, and of ml-latest-small where it is there, go through the bundle of ``--bundle``, or through a
whitened PCA that is fitted on some of them first. Every copy is its vector plus Gaussian noise of the relative norm
``--noise``, of unit length again.

Our side starts from the Parquet files that the encode stage writes, and verifies them; it ends with a published index
whose recall is measured. The peer starts from one .npy file and ends with an index file and its own measurements; it
runs in the Python of ``--peer-python`` (``pip install autofaiss``), once with its defaults and once with as many
inverted lists as ours. Memory is the highest of the process beyond what its imports
take; where a machine is shared, processor seconds say most. Ratios (×) are to the first line.

Recall is measured here, the same way for everybody, against exact search in NumPy, with vectors as queries that no
index holds: as the builder left its index, and again with the search parameter that first reaches the target, where
queries per second compare. ``--patch`` publishes that share of changed vectors on top, and times the patched index
beside one that is built anew.
"""

# ruff: noqa: E402 - run as a script, it must find its neighbours first

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # Its own folder comes last: of the two modules named planning, the tests' is meant.
    sys.path[:1] = [str(HERE.parents[1]), str(HERE.parent)]
    sys.path.append(str(HERE))

import faiss
import numpy as np
import pyarrow as pa
from material import CORES, add_data, cpu, netflix, quiet, sample
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from marc_pipeline.bundles.making import train_pca
from marc_pipeline.config import EncodeSettings, IndexSettings, Settings, TrainSettings
from marc_pipeline.model.bundle import Bundle, open_bundle
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.table.write import write_bucket_file
from marc_schemas.feature_table import file_schema
from marc_schemas.files import PublishedFile
from marc_schemas.identity import content_hash, row_id
from marc_schemas.moments import Moments
from marc_schemas.receipt import IndexReceipt
from marc_schemas.release import Release
from planning import STORAGE, publish_files, settings_at
from release_cases import altered

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]
Row = dict[str, Any]

DS, NEXT = "2026-11-20", "2026-11-21"
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
BUCKETS = 16
QUERIES = 1000
SLICE = 50_000
FITTED_ON = 5000
MAX_EF_SEARCH = 4096
TIE_TOLERANCE = 1e-6
SPAN_S, SPANS = 0.5, 3
OURS, DEFAULT, LIKE = "marc", "autofaiss, its default", "autofaiss, IVF,Flat"
PATCHED, ANEW = "patched", "built anew"


# What is indexed.


def real_vectors(folder: Path, given: argparse.Namespace) -> Matrix:
    """Vectors [n, d] of real texts, each text once, of unit length."""
    texts = netflix(given.data)
    movies = given.data / "ml-latest-small" / "movies.csv"
    if movies.is_file():
        with movies.open(encoding="utf-8", newline="") as file:
            texts += [f"{row['title']}. {row['genres']}" for row in csv.DictReader(file)]
    texts = list(dict.fromkeys(texts))
    with quiet():
        bundle = bundle_of(folder, given, texts)
        resources = TaskResources(cpus=CORES)
        encoder = load_encoder(STORAGE, bundle.uri, bundle.version, EncodeSettings(device="cpu"), resources)
        vectors: Matrix = encoder.encode(texts).vectors
    return unit(vectors)


def bundle_of(folder: Path, given: argparse.Namespace, texts: Sequence[str]) -> Bundle:
    """The bundle that was asked for, or a PCA."""
    if given.bundle:
        return open_bundle(STORAGE, given.bundle)
    return train_pca(
        sample(texts, min(len(texts), FITTED_ON)),
        template="{title}",
        train=TrainSettings(dim=given.dim),
        encode=EncodeSettings(device="cpu"),
        storage=STORAGE,
        bundle_uri=str(folder / "bundles"),
        resources=TaskResources(cpus=CORES),
    )


def unit(vectors: Matrix) -> Matrix:
    lengths: Matrix = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Matrix = (vectors / lengths).astype(np.float32)
    return scaled


def noisy(real: Matrix, rows: Ids, noise: float, seed: int) -> Matrix:
    """These rows of unit vectors, each with noise of its own, slice by slice."""
    draw = np.random.default_rng(seed)
    made = np.empty((len(rows), real.shape[1]), np.float32)
    for start in range(0, len(rows), SLICE):
        chosen = real[rows[start : start + SLICE]]
        drawn = draw.standard_normal(chosen.shape, dtype=np.float32)
        made[start : start + SLICE] = unit(chosen + noise / np.sqrt(real.shape[1]) * drawn)
    return made


@dataclass
class Catalogue:
    """Items of one day: vectors [n, d], row ids [n], the bucket of each, and how often each has changed."""

    vectors: Matrix
    row_ids: Ids
    versions: Ids

    @classmethod
    def of(cls, vectors: Matrix) -> "Catalogue":
        count = len(vectors)
        row_ids = np.fromiter((row_id(item_id(number)) for number in range(count)), np.int64, count)
        return cls(vectors, row_ids, np.zeros(count, np.int64))

    def changed(self, numbers: Ids, vectors: Matrix) -> "Catalogue":
        """The next day: other vectors for some items."""
        day = Catalogue(self.vectors.copy(), self.row_ids, self.versions.copy())
        day.vectors[numbers] = vectors
        day.versions[numbers] += 1
        return day

    @property
    def moments(self) -> Moments:
        vectors = self.vectors.astype(np.float64)
        return Moments(
            rows=len(vectors), vector_sum=tuple(vectors.sum(axis=0)), square_sum=float(np.square(vectors).sum())
        )

    def write(self, settings: Settings, bundle: str, *, ds: str) -> list[PublishedFile]:
        """The files of the feature table, as the encode stage writes them."""
        files = []
        for bucket in range(settings.buckets):
            numbers = np.flatnonzero(self.row_ids % settings.buckets == bucket)
            file = write_bucket_file(
                STORAGE,
                settings.table_uri,
                [self.rows(numbers, bundle)],
                dim=self.vectors.shape[1],
                ds=ds,
                bucket=bucket,
                plan_id=content_hash(ds),
                footer={"marc.bundle": bundle},
            )
            files += [file] if file else []
        return files

    def rows(self, numbers: Ids, bundle: str) -> pa.Table:
        """Rows of the feature table; what changed has another text, encoded a day later."""
        schema = file_schema(self.vectors.shape[1])
        names = [item_id(number) for number in numbers.tolist()]
        versions = self.versions[numbers].tolist()
        columns = {
            "item_id": names,
            "row_id": self.row_ids[numbers],
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(self.vectors[numbers].ravel()), type=schema.field("vector").type
            ),
            "content_hash": [
                content_hash(f"{name}, text {version}") for name, version in zip(names, versions, strict=True)
            ],
            "bundle": pa.repeat(bundle, len(names)),
            "encoded_at": [NOON + timedelta(days=version) for version in versions],
        }
        return pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)


def item_id(number: int) -> str:
    return f"item-{number:08d}"


# Building, in processes of their own.


@dataclass(frozen=True)
class Built:
    """What a builder's process answered; ``processor`` are the seconds of all its threads."""

    seconds: float
    processor: float
    peak_mb: float
    factory: str
    path: Path
    changed: int = 0
    receipt: Row = field(default_factory=dict)


def in_a_process(folder: Path, python: str, order: Row) -> Built:
    answer = folder / "answer.json"
    command = [python, str(HERE / "index_process.py")]
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    # The peer's Python must not find our packages.
    environment = {**os.environ, "PYTHONPATH": path if python == sys.executable else ""}
    # What an earlier measurement wrote is on its way to the disk no longer.
    os.sync()
    done = subprocess.run(
        command,
        input=json.dumps({**order, "answer": str(answer)}),
        text=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{order['builder']} failed with exit code {done.returncode}:\n{done.stderr}")
    facts = json.loads(answer.read_text())
    return Built(**{**facts, "path": Path(facts["path"])})


@dataclass(frozen=True)
class Day:
    """The files of one day, and all else that ``make_index`` is told."""

    settings: Settings
    bundle: str
    catalogue: Catalogue
    files: list[PublishedFile]
    ds: str

    def build(self, folder: Path, index: IndexSettings, base: Release | None = None) -> Built:
        order = {
            "builder": "ours",
            "files": [file.model_dump(mode="json") for file in self.files],
            "base": base.model_dump(mode="json") if base else None,
            "table_uri": self.settings.table_uri,
            "index_uri": self.settings.index_uri,
            "work_uri": f"{self.settings.work_uri}/index",
            "plan_id": content_hash(self.ds),
            "bundle": self.bundle,
            "buckets": self.settings.buckets,
            "moments": self.catalogue.moments.model_dump(mode="json"),
            "dim": self.catalogue.vectors.shape[1],
            "settings": index.model_dump(mode="json"),
        }
        return in_a_process(folder, sys.executable, order)

    def released(self, receipt: IndexReceipt) -> Release:
        """The day as a release with this index, for the next one to start from."""
        release = publish_files(self.settings, self.files, ds=self.ds)
        count, dim = self.catalogue.vectors.shape
        return altered(release, table__dim=dim, counts__items=count, index=receipt.index)


# Searching, the same way for everybody.


@dataclass(frozen=True)
class Setting:
    """How an index is searched and what comes of it: nprobe or efSearch, recall, queries per second."""

    parameter: int | None
    recall: float
    one_by_one: float
    together: float


@dataclass(frozen=True)
class Truth:
    """Queries [q, d], the vectors that are searched [n, d], and the k-th best score of every query [q]."""

    queries: Matrix
    vectors: Matrix
    limits: Matrix
    k: int

    @classmethod
    def of(cls, vectors: Matrix, queries: Matrix, k: int) -> "Truth":
        best = np.full((len(queries), k), -np.inf, np.float32)
        for start in range(0, len(vectors), SLICE):
            scores = queries @ vectors[start : start + SLICE].T
            best = np.partition(np.concatenate([best, scores], axis=1), -k, axis=1)[:, -k:]
        return cls(queries, vectors, best.min(axis=1), k)


@dataclass(frozen=True)
class Searched:
    """An index and where its ids are in the catalogue: row ids in our index, places in the file in the peer's."""

    index: Any
    truth: Truth
    order: Ids | None
    row_ids: Ids

    @classmethod
    def of(cls, path: Path, truth: Truth, row_ids: Ids, *, ours: bool) -> "Searched":
        return cls(faiss.read_index(str(path)), truth, np.argsort(row_ids) if ours else None, row_ids)

    def recall(self) -> float:
        """Share of the k best that are found; what ties with the k-th counts as well."""
        truth = self.truth
        _, found = self.index.search(truth.queries, truth.k)
        places = found if self.order is None else self.order[np.searchsorted(self.row_ids, found, sorter=self.order)]
        hits = 0
        for query, limit, ids, numbers in zip(truth.queries, truth.limits, found, places, strict=True):
            once = np.unique(numbers[ids >= 0])
            hits += int(np.sum(truth.vectors[once] @ query >= limit - TIE_TOLERANCE))
        return hits / (truth.k * len(truth.queries))

    @property
    def knob(self) -> tuple[str, Any, int] | None:
        """Name of the search parameter, where it is, and its largest value."""
        lists = faiss.try_extract_index_ivf(self.index)
        if lists is not None:
            return "nprobe", lists, lists.nlist
        inner = self.index
        while isinstance(inner, faiss.IndexIDMap | faiss.IndexPreTransform | faiss.IndexRefine):
            inner = faiss.downcast_index(inner.base_index if isinstance(inner, faiss.IndexRefine) else inner.index)
        return ("efSearch", inner.hnsw, MAX_EF_SEARCH) if hasattr(inner, "hnsw") else None

    def setting(self) -> Setting:
        """How the index is set now."""
        knob = self.knob
        parameter = getattr(knob[1], knob[0]) if knob else None
        return Setting(parameter, self.recall(), self.rate(1), self.rate(len(self.truth.queries)))

    def tuned(self, target: float) -> Setting:
        """The least value of its parameter that reaches a recall; the largest where none does."""
        knob = self.knob
        if knob:
            name, where, widest = knob
            low, high = 0, 1 if name == "nprobe" else self.truth.k

            def reaches(value: int) -> bool:
                setattr(where, name, value)
                return self.recall() >= target

            while not reaches(high) and high < widest:
                low, high = high, min(2 * high, widest)
            while high - low > max(1, high // 64):
                middle = (low + high) // 2
                low, high = (low, middle) if reaches(middle) else (middle, high)
            setattr(where, name, high)
        return self.setting()

    def rate(self, batch: int) -> float:
        """Queries per second in batches of so many: the median of a few spans of time."""
        queries, rates = self.truth.queries, []
        self.index.search(queries[:batch], self.truth.k)
        for _ in range(SPANS):
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < SPAN_S:
                place = count % len(queries)
                self.index.search(queries[place : place + batch], self.truth.k)
                count += batch
            rates.append(count / (time.perf_counter() - started))
        return statistics.median(rates)


# The command.


@dataclass
class Measured:
    """The rounds of one builder; the quality is that of the last index."""

    name: str
    factory: str = ""
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    changed: int = 0
    as_built: list[Setting] = field(default_factory=list)
    tuned: list[Setting] = field(default_factory=list)

    def add(self, built: Built, searched: Searched, target: float) -> None:
        self.factory, self.changed = built.factory, built.changed
        self.seconds.append(built.seconds)
        self.processor.append(built.processor)
        self.peak_mb.append(built.peak_mb)
        self.megabytes = built.path.stat().st_size / 2**20
        self.as_built.append(searched.setting())
        self.tuned.append(searched.tuned(target))
        print(f"{self.name}: {built.seconds:.1f} s", file=sys.stderr, flush=True)  # noqa: T201 - minutes pass between lines
        # Every round starts from nothing.
        built.path.unlink()

    @property
    def typical(self) -> dict[str, float]:
        """Medians of all rounds."""
        rounds = {name: getattr(self, name) for name in ("seconds", "processor", "peak_mb")}
        for kind in ("as_built", "tuned"):
            for name in ("parameter", "recall", "one_by_one", "together"):
                values = [getattr(setting, name) for setting in getattr(self, kind)]
                rounds[f"{kind} {name}"] = [value for value in values if value is not None]
        return {name: statistics.median(values) for name, values in rounds.items() if values}


def main() -> None:
    given = parse()
    console = Console(width=170)
    with tempfile.TemporaryDirectory(prefix="index-build-", dir=given.folder) as temporary:
        folder = Path(temporary)
        real = real_vectors(folder, given)
        drawn = np.random.default_rng(given.seed).permutation(given.items + QUERIES) % len(real)
        vectors = noisy(real, drawn, given.noise, given.seed)
        catalogue, queries = Catalogue.of(vectors[: given.items]), vectors[given.items :]
        index = IndexSettings(factory=given.factory, k=given.k, target_recall=given.recall, memory_mib=given.memory_mib)
        settings = settings_at(folder, "none", buckets=BUCKETS)
        bundle = open_bundle(STORAGE, settings.bundle_uri).version
        day = Day(settings, bundle, catalogue, catalogue.write(settings, bundle, ds=DS), DS)
        facts = f"{given.items:,} vectors of {real.shape[1]} numbers ({len(real):,} texts, noise {given.noise:g})"
        found = beside_peer(folder, given, day, index, queries, console)
        show(console, f"{facts}: building an index", found, given)
        on_top = []
        if given.patch:
            changed = np.random.default_rng(given.seed + 1).permutation(given.items)[: round(given.patch * given.items)]
            others = noisy(real, drawn[changed], given.noise, given.seed + 2)
            next_catalogue = catalogue.changed(changed, others)
            files = next_catalogue.write(settings, bundle, ds=NEXT)
            next_day = Day(settings, bundle, next_catalogue, files, NEXT)
            on_top = patches(folder, given, day, next_day, index, queries)
            show(console, f"{facts}: {given.patch:.1%} of them changed", on_top, given)
    if given.json:
        figures = {
            "cores": CORES,
            "cpu": cpu(),
            "faiss": faiss.__version__,
            "items": given.items,
            "dim": real.shape[1],
            "texts": len(real),
            "noise": given.noise,
            "repeats": given.repeats,
            "target_recall": given.recall,
            "builders": [{**asdict(one), "typical": one.typical} for one in found],
            "patch": [{**asdict(one), "typical": one.typical} for one in on_top],
        }
        given.json.write_text(json.dumps(figures, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64, help="of the PCA; a bundle has its own")
    parser.add_argument("--repeats", "--runs", type=int, default=5)
    parser.add_argument("--peer-python", metavar="PYTHON", help="a Python that has autofaiss; without it we are alone")
    parser.add_argument("--bundle", metavar="URI", help="what encodes the texts (default: a PCA, fitted on them)")
    parser.add_argument("--noise", type=float, default=0.5, help="its norm, relative to the vector's")
    parser.add_argument("--factory", default="auto", help="index.factory of our side")
    parser.add_argument("--memory-mib", type=float, help="index.memory_mib of our side (default: none)")
    parser.add_argument("--recall", type=float, default=0.95, help="the target")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument(
        "--patch", type=float, default=0.0, metavar="SHARE", help="publish changed vectors on top as well"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as well")
    add_data(parser)
    return parser.parse_args()


def beside_peer(
    folder: Path, given: argparse.Namespace, day: Day, index: IndexSettings, queries: Matrix, console: Console
) -> list[Measured]:
    """Our index and the peer's, in turn."""
    truth, row_ids = Truth.of(day.catalogue.vectors, queries, given.k), day.catalogue.row_ids
    found = [Measured(OURS)]
    if given.peer_python:
        found += [Measured(DEFAULT), Measured(LIKE)]
        embeddings = folder / "embeddings"
        embeddings.mkdir()
        np.save(embeddings / "vectors.npy", day.catalogue.vectors)
    else:
        console.print("autofaiss is left out: --peer-python names no Python that has it")
    for _ in range(given.repeats):
        for one in found:
            if one.name == OURS:
                built = day.build(folder, index)
            else:
                options = {"index_key": like(found[0].factory)} if one.name == LIKE else {}
                order = {"builder": "autofaiss", "embeddings": str(embeddings), "options": options}
                built = in_a_process(folder, given.peer_python, {**order, "path": str(folder / "peer.index")})
            one.add(built, Searched.of(built.path, truth, row_ids, ours=one.name == OURS), given.recall)
    return found


def like(factory: str) -> str:
    """What the peer is asked for beside this index: the same number of lists, of plain vectors, which it can tune."""
    lists = re.search(r"IVF\d+", factory)
    return f"{lists[0]},Flat" if lists else "Flat"


def patches(
    folder: Path, given: argparse.Namespace, before: Day, after: Day, index: IndexSettings, queries: Matrix
) -> list[Measured]:
    """The day after from the index of the day before, and from nothing, in turn."""
    truth, row_ids = Truth.of(after.catalogue.vectors, queries, given.k), after.catalogue.row_ids
    base = before.released(IndexReceipt.model_validate(before.build(folder, index).receipt))
    found = {PATCHED: index, ANEW: index.model_copy(update={"max_changed": 0.0})}
    measured = {name: Measured(name) for name in found}
    for _ in range(given.repeats):
        for name, settings in found.items():
            built = after.build(folder, settings, base)
            measured[name].add(built, Searched.of(built.path, truth, row_ids, ours=True), given.recall)
    return list(measured.values())


def show(console: Console, title: str, found: Sequence[Measured], given: argparse.Namespace) -> None:
    table = Table(
        title=f"{title}; medians of {given.repeats} rounds\n{CORES} cores of {cpu()}, faiss {faiss.__version__}",
        title_justify="left",
    )
    tuned = f"set to {given.recall:g}"
    columns = "seconds,×,CPU s,×,peak MB,×,MB on disk,×,left at,recall"
    queries = "queries/s by one,×,by 1000,×"
    for column in ("", "index", *columns.split(","), tuned, *queries.split(",")):
        table.add_column(column, justify="right" if column not in {"", "index"} else "left")
    first = found[0]
    for one in found:
        own = one.typical
        cells = [one.name, one.factory]
        for name, digits in (("seconds", 1), ("processor", 1), ("peak_mb", 0)):
            cells += beside(own[name], first.typical[name], digits)
        cells += beside(one.megabytes, first.megabytes, 1)
        cells += [shown(own.get("as_built parameter")), f"{own['as_built recall']:.4f}"]
        cells.append(f"{shown(own.get('tuned parameter'))} ({own['tuned recall']:.4f})")
        for name in ("tuned one_by_one", "tuned together"):
            cells += beside(own[name], first.typical[name], 0)
        table.add_row(*cells)
    console.print(table)


def beside(value: float, first: float, digits: int) -> tuple[str, str]:
    """A figure and its ratio to the first line's."""
    return f"{value:,.{digits}f}", f"{value / first:.2f}"


def shown(parameter: float | None) -> str:
    return "" if parameter is None else f"{parameter:,.0f}"


if __name__ == "__main__":
    main()
