"""Compare the index stage with autofaiss: same vectors, same cores, alternating fresh processes, one table.

    python tests/benchmarks/index_build.py [--items 1000000] [--dim 64] [--runs 5] [--peer-python PYTHON]
        [--bundle URI] [--data FOLDER] [--noise .5] [--factory auto]
        [--memory-mib 256] [--patch .01]

The vectors come from real texts: netflix_titles.csv, and ml-latest-small if it exists. The bundle of ``--bundle``
encodes them, or a whitened PCA that is fitted on some of the texts first. Vectors repeat with Gaussian noise of
relative norm ``--noise`` until there are ``--items``; each has unit length.

marc reads and verifies the Parquet files of the encode stage, publishes the index and measures its recall. autofaiss
reads one .npy file and writes an index file with its own measurements. autofaiss runs in the Python of
``--peer-python`` (``pip install autofaiss``), once with its defaults and once with as many inverted lists as marc.
Memory is the peak of the process beyond its imports. On a shared machine, compare processor seconds. Ratios (×) refer
to the first row.

Recall is measured here, against exact search, with queries that no index contains. The table shows the index as the
builder left it, and with the smallest search parameter that reaches the target, where queries per second compare.
``--patch`` also publishes that share of changed vectors, and compares the patched index with a rebuilt one.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from material import netflix, quiet, sample
from measuring import CORES, PUBLIC_DATA, options, progress, show, write_json
from rows import NOON, Ids, Matrix, row_ids, unit, write_buckets
from search_quality import SLICE, MeasuredIndex, SearchFigures, Truth

from marc_pipeline.bundles.making import train_pca
from marc_pipeline.config import EncodeSettings, IndexSettings, Settings, TrainSettings
from marc_pipeline.model.bundle import Bundle, open_bundle
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import TaskResources
from marc_schemas.files import PublishedFile
from marc_schemas.identity import content_hash
from marc_schemas.moments import Moments
from marc_schemas.receipt import IndexReceipt
from marc_schemas.release import Release
from planning import STORAGE, publish_files, settings_at
from release_cases import altered

Row = dict[str, Any]

DS, NEXT = "2026-11-20", "2026-11-21"
BUCKETS = 16
QUERIES = 1000
FITTED_ON = 5000
MARC, DEFAULT, LIKE = "marc", "autofaiss, its default", "autofaiss, IVF,Flat"
PATCHED, REBUILT = "patched", "rebuilt"


# --- vectors


def real_vectors(folder: Path, given: argparse.Namespace) -> Matrix:
    """Unit vectors [n, d] of real texts, each text once."""
    texts = netflix(given.data)
    movies = given.data / "ml-latest-small" / "movies.csv"
    if movies.is_file():
        with movies.open(encoding="utf-8", newline="") as file:
            texts += [f"{row['title']}. {row['genres']}" for row in csv.DictReader(file)]
    texts = list(dict.fromkeys(texts))
    resources = TaskResources(cpus=CORES)
    with quiet():
        bundle = open_bundle(STORAGE, given.bundle) if given.bundle else fitted_pca(folder, given.dim, texts, resources)
        encoder = load_encoder(STORAGE, bundle.uri, bundle.version, EncodeSettings(device="cpu"), resources)
        return unit(encoder.encode(texts).vectors)


def fitted_pca(folder: Path, dim: int, texts: Sequence[str], resources: TaskResources) -> Bundle:
    return train_pca(
        sample(texts, min(len(texts), FITTED_ON)),
        template="{title}",
        train=TrainSettings(dim=dim),
        encode=EncodeSettings(device="cpu"),
        storage=STORAGE,
        bundle_uri=str(folder / "bundles"),
        resources=resources,
    )


def noisy(real: Matrix, rows: Ids, noise: float, seed: int) -> Matrix:
    """The chosen rows of unit vectors [len(rows), d], each with its own noise."""
    draw = np.random.default_rng(seed)
    made = np.empty((len(rows), real.shape[1]), np.float32)
    for start in range(0, len(rows), SLICE):
        chosen = real[rows[start : start + SLICE]]
        drawn = draw.standard_normal(chosen.shape, dtype=np.float32)
        made[start : start + SLICE] = unit(chosen + noise / np.sqrt(real.shape[1]) * drawn)
    return made


# --- building, in processes of their own


@dataclass(frozen=True)
class Built:
    """The answer of a builder's process; ``processor`` counts the seconds of all its threads."""

    seconds: float
    processor: float
    peak_mb: float
    factory: str
    path: Path
    changed: int = 0
    receipt: Row = field(default_factory=dict)


def build_in_process(folder: Path, python: str, order: Row) -> Built:
    answer = folder / "answer.json"
    # The Python of the peer must not find the packages of this project.
    environment = {**os.environ} if python == sys.executable else {**os.environ, "PYTHONPATH": ""}
    # Pending writes of the previous measurement must not slow this one down.
    os.sync()
    done = subprocess.run(
        [python, str(Path(__file__).with_name("index_process.py"))],
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
    """One day's vectors [n, d] and table files, and the bundle that made them."""

    settings: Settings
    bundle: str
    vectors: Matrix
    row_ids: Ids
    files: list[PublishedFile]
    ds: str

    @classmethod
    def write(cls, settings: Settings, vectors: Matrix, *, ds: str, changed: Sequence[int] = ()) -> "Day":
        """Write the table files; changed items have another text, encoded a day later."""
        bundle = open_bundle(STORAGE, settings.bundle_uri).version
        ids = [f"item-{number:08d}" for number in range(len(vectors))]
        versions = np.isin(np.arange(len(vectors)), changed).astype(int).tolist()
        hashes = [content_hash(f"{name}, text {version}") for name, version in zip(ids, versions, strict=True)]
        times = [NOON + timedelta(days=version) for version in versions]
        given = {"buckets": settings.buckets, "ds": ds, "bundle": bundle, "plan_id": content_hash(ds)}
        written = write_buckets(settings.table_uri, ids, vectors, hashes, encoded_at=times, **given)
        return cls(settings, bundle, vectors, row_ids(ids), [file for _, file in written], ds)

    def build(self, folder: Path, index: IndexSettings, base: Release | None = None) -> Built:
        """Run the index stage."""
        exact = self.vectors.astype(np.float64)
        moments = Moments(
            rows=len(exact), vector_sum=tuple(exact.sum(axis=0)), square_sum=float(np.square(exact).sum())
        )
        arguments = {
            "table_uri": self.settings.table_uri,
            "index_uri": self.settings.index_uri,
            "work_uri": f"{self.settings.work_uri}/index",
            "plan_id": content_hash(self.ds),
            "bundle": self.bundle,
            "buckets": self.settings.buckets,
            "dim": self.vectors.shape[1],
        }
        order = {
            "builder": "marc",
            "files": [file.model_dump(mode="json") for file in self.files],
            "base": base.model_dump(mode="json") if base else None,
            "moments": moments.model_dump(mode="json"),
            "settings": index.model_dump(mode="json"),
            "arguments": arguments,
        }
        return build_in_process(folder, sys.executable, order)

    def released(self, built: Built) -> Release:
        """The day as a release with this index, which the next day starts from."""
        release = publish_files(self.settings, self.files, ds=self.ds)
        count, dim = self.vectors.shape
        index = IndexReceipt.model_validate(built.receipt).index
        return altered(release, table__dim=dim, counts__items=count, index=index)


@dataclass
class Rounds:
    """All rounds of one builder."""

    name: str
    factory: str = ""
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    changed: int = 0
    as_built: list[SearchFigures] = field(default_factory=list)
    tuned: list[SearchFigures] = field(default_factory=list)

    def add(self, built: Built, searched: MeasuredIndex, target: float) -> None:
        """Measure one index and delete it, so that the next round starts without it."""
        self.factory, self.changed, self.megabytes = built.factory, built.changed, built.path.stat().st_size / 2**20
        self.seconds.append(built.seconds)
        self.processor.append(built.processor)
        self.peak_mb.append(built.peak_mb)
        self.as_built.append(searched.figures())
        self.tuned.append(searched.tuned(target))
        progress(f"{self.name}: {built.seconds:.1f} s")
        built.path.unlink()

    @property
    def typical(self) -> dict[str, float]:
        """Medians of all rounds."""
        rounds = {name: getattr(self, name) for name in ("seconds", "processor", "peak_mb")}
        for kind in ("as_built", "tuned"):
            for name in ("parameter", "recall", "one_by_one", "together"):
                values = [getattr(figures, name) for figures in getattr(self, kind)]
                rounds[f"{kind} {name}"] = [value for value in values if value is not None]
        return {name: median(values) for name, values in rounds.items() if values}

    def row(self, first: "Rounds") -> list[Any]:
        """One row of the table; ratios refer to the first row."""
        own, base = {**self.typical, "megabytes": self.megabytes}, {**first.typical, "megabytes": first.megabytes}
        cells: list[Any] = [self.name, self.factory]
        for name in ("seconds", "processor", "peak_mb", "megabytes"):
            cells += [own[name], own[name] / base[name]]
        for kind in ("as_built", "tuned"):
            cells += [own.get(f"{kind} parameter"), own[f"{kind} recall"]]
        for name in ("tuned one_by_one", "tuned together"):
            cells += [own[name], own[name] / base[name]]
        return cells


def beside_peer(
    folder: Path, given: argparse.Namespace, day: Day, index: IndexSettings, queries: Matrix
) -> list[Rounds]:
    """marc and autofaiss in turn."""
    truth, embeddings = Truth.of(day.vectors, queries, given.k), folder / "embeddings"
    found = [Rounds(name) for name in ((MARC, DEFAULT, LIKE) if given.peer_python else (MARC,))]
    if given.peer_python:
        embeddings.mkdir()
        np.save(embeddings / "vectors.npy", day.vectors)
    else:
        progress("autofaiss is skipped; pass --peer-python with a Python that has it")
    for _ in range(given.runs):
        for one in found:
            if one.name == MARC:
                built = day.build(folder, index)
            else:
                # As many inverted lists as marc, of plain vectors.
                lists = re.search(r"IVF\d+", found[0].factory)
                key = {"index_key": f"{lists[0]},Flat" if lists else "Flat"} if one.name == LIKE else {}
                order = {"builder": "autofaiss", "embeddings": str(embeddings), "options": key}
                built = build_in_process(folder, given.peer_python, {**order, "path": str(folder / "peer.index")})
            one.add(built, MeasuredIndex.of(built.path, truth, day.row_ids, by_row_id=one.name == MARC), given.recall)
    return found


def patches(
    folder: Path, given: argparse.Namespace, days: list[Day], index: IndexSettings, queries: Matrix
) -> list[Rounds]:
    """The second day's index from the first day's, and from scratch, in turn."""
    before, after = days
    truth = Truth.of(after.vectors, queries, given.k)
    base = before.released(before.build(folder, index))
    found = {PATCHED: Rounds(PATCHED), REBUILT: Rounds(REBUILT)}
    for _ in range(given.runs):
        for name, settings in ((PATCHED, index), (REBUILT, index.model_copy(update={"max_changed": 0.0}))):
            built = after.build(folder, settings, base)
            found[name].add(built, MeasuredIndex.of(built.path, truth, after.row_ids, by_row_id=True), given.recall)
    return list(found.values())


def show_rounds(title: str, found: Sequence[Rounds], target: float) -> None:
    columns = (
        "|index|seconds:,.1f|×:.2f|CPU s:,.1f|×:.2f|peak MB:,.0f|×:.2f|MB on disk:,.1f|×:.2f|left at:,.0f|recall:.4f|"
        f"set to {target:g}:,.0f|recall:.4f|queries/s by one:,.0f|×:.2f|by {QUERIES}:,.0f|×:.2f"
    )
    show(title, columns, [one.row(found[0]) for one in found], texts=2)


def main() -> None:
    given = options(
        __doc__,
        items=1_000_000,
        dim=64,
        runs=5,
        peer_python=str,
        bundle=str,
        data=PUBLIC_DATA,
        noise=0.5,
        factory="auto",
        memory_mib=float,
        recall=0.95,
        k=10,
        patch=0.0,
        seed=0,
        folder=Path,
    )
    with tempfile.TemporaryDirectory(prefix="index-build-", dir=given.folder) as temporary:
        folder = Path(temporary)
        real = real_vectors(folder, given)
        drawn = np.random.default_rng(given.seed).permutation(given.items + QUERIES) % len(real)
        made = noisy(real, drawn, given.noise, given.seed)
        vectors, queries = made[: given.items], made[given.items :]
        index = IndexSettings(factory=given.factory, k=given.k, target_recall=given.recall, memory_mib=given.memory_mib)
        settings = settings_at(folder, "none", buckets=BUCKETS)
        day = Day.write(settings, vectors, ds=DS)
        facts = f"{given.items:,} vectors of {real.shape[1]} numbers ({len(real):,} texts, noise {given.noise:g})"
        found, on_top = beside_peer(folder, given, day, index, queries), []
        show_rounds(f"{facts}: building an index, medians of {given.runs} rounds", found, given.recall)
        if given.patch:
            changed = np.random.default_rng(given.seed + 1).permutation(given.items)[: round(given.patch * given.items)]
            vectors = vectors.copy()
            vectors[changed] = noisy(real, drawn[changed], given.noise, given.seed + 2)
            days = [day, Day.write(settings, vectors, ds=NEXT, changed=changed)]
            on_top = patches(folder, given, days, index, queries)
            show_rounds(f"{facts}: {given.patch:.1%} of them changed, medians of {given.runs}", on_top, given.recall)
    figures = {
        "items": given.items,
        "dim": real.shape[1],
        "texts": len(real),
        "noise": given.noise,
        "runs": given.runs,
        "target_recall": given.recall,
        "builders": [{**asdict(one), "typical": one.typical} for one in found],
        "patch": [{**asdict(one), "typical": one.typical} for one in on_top],
    }
    write_json(given.json, figures)


if __name__ == "__main__":
    main()
