"""A reader of the campaign: it opens the newest release in a loop, and checks that release and older ones completely.

Commands are JSON lines: ``{"watch": TABLE, "pins": [RELEASE_ID, …]}`` and ``{"report": true}``.
"""

import json
import select
import sys
import time
from typing import Any

import numpy as np
from checks import contents_of

from marc_pipeline.errors import ReleaseGone
from marc_pipeline.reader.release import OpenRelease, open_release
from marc_pipeline.releases.log import read_releases
from marc_pipeline.storage import Storage

PAUSE_S = 0.3
UNIT_TOLERANCE = 1e-3
STORAGE = Storage()


class Watch:
    """Releases that one reader saw of one table, and their problems."""

    def __init__(self, table: str, pins: list[str]) -> None:
        self.table = table
        self.pins = [open_release(table, release_id=pin, storage=STORAGE) for pin in pins]
        self.checks = 0
        self.seen: dict[str, dict[str, Any]] = {}
        self.newest: list[str] = []
        self.gone: set[str] = set()
        self.problems: list[str] = []

    def look(self) -> None:
        """Check the newest release and those opened at the start."""
        try:
            newest = open_release(self.table, storage=STORAGE)
        except Exception as error:
            self.problems.append(f"the newest release cannot be opened: {type(error).__name__}: {error}")
            return
        if newest.facts.release_id not in self.newest:
            self.newest.append(newest.facts.release_id)
        for release in [newest, *self.pins]:
            self._check(release)

    def _check(self, release: OpenRelease) -> None:
        name = release.facts.release_id
        if name in self.gone:
            return
        try:
            problems, contents = whole(release)
        except ReleaseGone:
            self.gone.add(name)
            return
        except Exception as error:
            # An open dataset fails with an error of Arrow. The log shows whether the release was deleted.
            if name not in [known.release_id for known in read_releases(STORAGE, self.table)]:
                self.gone.add(name)
                return
            problems, contents = [f"{type(error).__name__}: {error}"], None
        self.checks += 1
        if contents is not None:
            said = {"ds": release.facts.ds, "buckets": contents}
            if self.seen.setdefault(name, said) != said:
                problems.append("two reads of it differ")
        self.problems += [f"release {name} of {release.facts.ds}: {problem}" for problem in problems]


def whole(release: OpenRelease) -> tuple[list[str], dict[str, Any]]:
    """Return the problems of a release, and digests of its contents."""
    facts = release.facts
    rows = release.dataset().to_table()
    ids = rows["item_id"].to_pylist()
    vectors = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, facts.table.dim)
    checks = {
        f"{rows.num_rows} rows, the log says {facts.counts.items}": rows.num_rows == facts.counts.items,
        "ids twice": len(set(ids)) == len(ids),
        "another bundle": rows["bundle"].unique().to_pylist() == [facts.bundle.version],
        "another date": rows["ds"].unique().to_pylist() == [facts.ds],
        "vectors that are not finite": bool(np.isfinite(vectors).all()),
        "vectors without unit length": bool(np.all(np.abs(np.linalg.norm(vectors, axis=1) - 1) < UNIT_TOLERANCE)),
        "the index has other ids than the table": np.array_equal(
            np.sort(release.index_row_ids()), np.sort(rows["row_id"].to_numpy())
        ),
    }
    for place in (0, len(ids) // 2, len(ids) - 1):
        names, scores = release.search(release.vectors([ids[place]]), min(5, len(ids)))
        # Equal vectors tie, so any of them may come first.
        first = [name for name, score in zip(names[0], scores[0], strict=True) if score >= scores[0][0] - 1e-6]
        checks[f"a look-up of {ids[place]} finds {names[0][0]} first"] = ids[place] in first
    return [problem for problem, good in checks.items() if not good], contents_of(rows)


def main() -> None:
    watch: Watch | None = None
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], PAUSE_S if watch else None)
        if not ready:
            if watch:
                watch.look()
            continue
        line = sys.stdin.readline()
        if not line:
            return
        command = json.loads(line)
        if "watch" in command:
            watch = Watch(command["watch"], command["pins"])
            watch.look()
            answer = {"watching": True, "since": time.time()}
        else:
            assert watch is not None
            watch.look()
            answer = {
                "checks": watch.checks,
                "seen": watch.seen,
                "newest": watch.newest,
                "gone": sorted(watch.gone),
                "problems": sorted(set(watch.problems)),
            }
            watch = None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
