"""Checks of a site after a trial, against the results of the operation without a fault."""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from marc_pipeline.reader.release import OpenRelease
from marc_pipeline.reader.verify import verify
from marc_pipeline.releases import log as release_log
from marc_pipeline.storage import Storage
from marc_pipeline.table.commit import committed_files

TEXT_COLUMNS = ("title", "brand", "category", "description")
# By bucket: a digest of ids, texts and bundle, and a digest that includes the bits of the vectors.
Contents = dict[str, list[str]]
State = dict[str, Contents]


def contents_of(rows: pa.Table) -> Contents:
    """Return two digests per bucket of a release's rows, without the time of encoding."""
    found: Contents = {}
    rows = rows.sort_by([("bucket", "ascending"), ("item_id", "ascending")])
    for bucket in rows["bucket"].unique().to_pylist():
        part = rows.filter(pc.equal(rows["bucket"], bucket))
        digest = hashlib.sha256()
        for name in ("item_id", "row_id", "content_hash", "bundle", "ds"):
            digest.update("\0".join(map(str, part[name].to_pylist())).encode())
        told = digest.hexdigest()[:16]
        digest.update(part["vector"].combine_chunks().flatten().to_numpy().tobytes())
        found[str(bucket)] = [told, digest.hexdigest()[:16]]
    return found


def is_known(contents: Contents, known: Sequence[Contents]) -> bool:
    """Return whether the contents are those of one known state.

    The rows of all buckets must be those of one state. Concurrent runs may carry over each other's vectors, so the
    vectors of a bucket may be those of any state with the same rows.
    """
    if not any({b: told for b, (told, _) in contents.items()} == {b: t for b, (t, _) in k.items()} for k in known):
        return False
    return all(digests in [k.get(bucket) for k in known] for bucket, digests in contents.items())


def usable_ids(path: Path) -> set[str]:
    """Return the ids of a catalogue's usable rows, by Python's csv module."""
    found = set()
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            texts = [row[name] or "" for name in TEXT_COLUMNS]
            if row["item_id"] and any(map(str.strip, texts)) and "\ufffd" not in "".join([row["item_id"], *texts]):
                found.add(row["item_id"])
    return found


@dataclass
class Findings:
    """Contents and problems of a site."""

    state: State = field(default_factory=dict)
    rows: int = 0
    lost: int = 0
    duplicates: int = 0
    failed_verifies: int = 0
    unequal: int = 0
    doubled: int = 0
    files: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)


def look_at(storage: Storage, table_uri: str, wanted: Mapping[str, Sequence[set[str]]]) -> Findings:
    """Check every live release byte by byte, the Delta table, and the item ids of each date.

    Args:
        storage: access to the site.
        table_uri: its feature table.
        wanted: allowed sets of item ids by date.
    """
    found = Findings()
    log = release_log.read_log(storage, table_uri)
    live = release_log.live_releases(log.releases)
    turns = sorted((r for r in log.releases if not r.restores and not r.withdrawn), key=lambda r: (r.ds, r.turn))
    # A plan may be published again after another one, but not right after itself.
    twice = [
        after.plan_id for before, after in pairwise(turns) if (before.ds, before.plan_id) == (after.ds, after.plan_id)
    ]
    found.doubled = len(twice)
    found.notes += [f"plan {plan} was released twice" for plan in twice]
    for ds, release in live.items():
        problems = verify(storage, release, table_uri=table_uri)
        paths = {file.path for file in release.table.files}
        if committed(storage, table_uri, ds, version=release.table.version) != paths:
            problems.append(f"version {release.table.version} of the Delta table has other files")
        if committed(storage, table_uri, ds) != paths:
            problems.append("the newest version of the Delta table has other files")
        found.failed_verifies += bool(problems)
        found.notes += [f"release {release.release_id} of {ds}: {problem}" for problem in problems]
        rows = OpenRelease(release, uri=table_uri, storage=storage).dataset().to_table()
        ids = rows["item_id"].to_pylist()
        nearest = min(wanted[ds], key=lambda each: len(each.symmetric_difference(ids)))
        missing, extra = nearest - set(ids), set(ids) - nearest
        found.lost += len(missing)
        found.unequal += bool(extra)
        found.duplicates += len(ids) - len(set(ids))
        found.rows += len(ids)
        found.notes += [f"{ds}: {len(missing)} items lost, {len(extra)} too many"] if missing or extra else []
        found.state[ds] = contents_of(rows)
    return found


def committed(storage: Storage, table_uri: str, ds: str, *, version: int | None = None) -> set[str]:
    """Return the paths of a date's files in the Delta table."""
    table = DeltaTable(table_uri, version=version, storage_options=storage.delta_options())
    return committed_files(table, ds=ds)


def files_below(storage: Storage, uris: Sequence[str]) -> frozenset[str]:
    """Return the uris of all files below some folders, without the two Delta logs."""
    stored = [item.uri for uri in uris for item in storage.list(uri, hidden=True)]
    return frozenset(uri for uri in stored if "/_delta_log/" not in uri and "/_releases/" not in uri)


def judge(found: Findings, known: Sequence[State]) -> None:
    """Compare the findings with the allowed final states; differences are counted and noted."""
    for ds in sorted({ds for state in known for ds in state} | found.state.keys()):
        contents = found.state.get(ds)
        candidates = [state[ds] for state in known if ds in state]
        if contents is None:
            if all(ds in state for state in known):
                found.unequal += 1
                found.notes.append(f"{ds} has no release")
        elif not is_known(contents, candidates):
            found.unequal += 1
            found.notes.append(f"{ds}: the table differs from every run without a fault: {contents} of {candidates}")
