"""A fault campaign: seeded trials that kill, fill, cut and collide, while readers watch; one table in the end.

    python tests/faults/campaign.py --trials 200 --seed 1

Every trial puts a small site into a known state, disturbs one operation, runs the same command again until it
succeeds, and compares what is there with what the operation leaves when nothing disturbs it. Trial n of a seed is
always disturbed in the same way: ``--only-trial N`` repeats one.
"""

# ruff: noqa: E402 - run as a script, it must find its neighbours first

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(REPOSITORY), str(HERE.parent)]

import pyspark
import pytest
from checks import is_known, judge
from hosts import Attempt, Ended, Host, Overdue, end_session, executors, python_workers
from lanes import ROOM, S3, Lane, Local, Operation, Undisturbed

from marc_pipeline.errors import Superseded
from s3_server import running_s3

S3_SCRIPT = REPOSITORY.parent / "shared" / "tools" / "ceph-s3"
RETRIES = 6
KILLED = -9
LIMIT_S = 300.0
BLOCK = 4096
READERS = 2
READER_S = 120.0
LEFT_OVER_S = 15.0
COLD_S = 12.0
DISK_FULL = ("No space left on device", "disk is full", "Disk quota exceeded")
SUPERSEDED = "superseded"
# Spark's own log begins with a date.
OWN_ERROR = re.compile(r"\d\d:\d\d:\d\d ERROR ")

SPARK = ("night", "backfill of a bucket", "backfill of a day")
STEPS = ("release of a night", "release of a backfill", "roll-back", "vacuum")
RIVALS = (
    "one plan released twice",
    "one plan twice",
    "two plans of a day released",
    "two catalogues of a day",
    "three buckets released",
    "backfills of two buckets",
    "vacuum and release",
    "night and backfill",
)


@dataclass(frozen=True)
class Kind:
    """A kind of trial: what is done to which operations, on which store, and how often of 200 times."""

    fault: str
    store: str
    weight: int
    operations: tuple[str, ...]


KINDS = [
    Kind("release step killed", "local", 52, STEPS),
    Kind("disk full", "local", 16, ("night", *STEPS[:2], "backfill of a bucket", *STEPS[2:])),
    Kind("driver killed", "local", 28, SPARK),
    Kind("Python worker killed", "local", 16, SPARK),
    Kind("two or three at once", "local", 20, RIVALS),
    Kind("executor killed", "local", 8, SPARK),
    Kind("release step killed", "S3", 24, STEPS),
    Kind("network disturbed", "S3", 16, (*SPARK, *STEPS)),
    Kind("network disturbed, driver killed", "S3", 4, SPARK),
    Kind("driver killed", "S3", 8, SPARK),
    Kind("two or three at once", "S3", 8, RIVALS),
]


@dataclass
class Trial:
    """One trial, and what came of it."""

    number: int
    fault: str
    store: str
    operation: str
    moment: str = ""
    struck: bool = False
    retries: int = 0
    unended: int = 0
    lost: int = 0
    duplicates: int = 0
    torn: int = 0
    failed_verifies: int = 0
    unequal: int = 0
    doubled: int = 0
    unclear: int = 0
    rows: int = 0
    reads: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    BAD = ("unended", "lost", "duplicates", "torn", "failed_verifies", "unequal", "doubled", "unclear")

    @property
    def bad(self) -> bool:
        return any(getattr(self, name) for name in self.BAD)

    def line(self, count: int) -> str:
        verdict = "; ".join([f"{getattr(self, n)} {n}" for n in self.BAD if getattr(self, n)]) or "whole"
        struck = self.moment if self.struck else f"{self.moment}, too late"
        notes = "".join(f"\n    {note}" for note in self.notes)
        return (
            f"{self.number}/{count} {self.store}: {self.fault} ({self.operation}; {struck}), "
            f"{self.retries} retries, {self.reads} reads, {self.seconds:.1f} s: {verdict}{notes}"
        )


def schedule(trials: int, kinds: Sequence[Kind]) -> list[tuple[Kind, str]]:
    """Kind and operation of every trial: as the weights say, at least one of each where there are enough."""
    whole = sum(kind.weight for kind in kinds)
    shares = {kind: kind.weight * trials / whole for kind in kinds}
    counts = {kind: max(1, int(share)) for kind, share in shares.items()}
    while sum(counts.values()) < trials:
        kind = max(kinds, key=lambda kind: shares[kind] - counts[kind])
        counts[kind] += 1
    while sum(counts.values()) > trials:
        kind = max(kinds, key=lambda kind: (counts[kind] > 1, counts[kind] - shares[kind]))
        counts[kind] -= 1
    return [(kind, kind.operations[n % len(kind.operations)]) for kind in kinds for n in range(counts[kind])]


class Arena:
    """A lane with readers, where one trial after the other takes place."""

    def __init__(self, lane: Lane, *, seed: int) -> None:
        self.lane, self.seed = lane, seed
        self.contents: dict[str, dict[str, Any]] = {}
        self.readers = [
            Host("reader_host.py", env=lane.env, log=lane.folder / f"reader-{number}.log") for number in range(READERS)
        ]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()

    def go(self, trial: Trial) -> None:
        """One trial."""
        operation = self.lane.operations[trial.operation]
        undisturbed = self.lane.undisturbed(operation)
        self.lane.restore(operation.state)
        live, every = self.lane.live(), self.lane.release_ids()
        table = self.lane.settings.table_uri
        for number, reader in enumerate(self.readers):
            reader.send(watch=table, pins=every if number and "vacuum" in operation.name else [live])
        for reader in self.readers:
            reader.receive(READER_S)
        attack = Attack(self.lane, operation, undisturbed, trial, random.Random(f"{self.seed}/{trial.number}"))  # noqa: S311
        attack.prepare()
        began = time.monotonic()
        attack.go()
        trial.seconds = time.monotonic() - began
        self.judge(trial, operation, undisturbed, live)

    def judge(self, trial: Trial, operation: Operation, undisturbed: Undisturbed, live: str) -> None:
        try:
            found = self.lane.look(operation)
            judge(found, undisturbed.known)
            if operation.removes and found.files != undisturbed.files:
                found.unequal += 1
                differing = sorted(found.files ^ undisturbed.files)
                found.notes.append(f"{len(differing)} files more or less than undisturbed, as {differing[0]}")
            for name in ("lost", "duplicates", "failed_verifies", "unequal", "doubled", "rows"):
                setattr(trial, name, getattr(found, name))
            trial.notes += found.notes
        except Exception as error:
            trial.failed_verifies += 1
            trial.notes.append(f"the site cannot be looked at: {type(error).__name__}: {error}")
        for reader in self.readers:
            reader.send(report=True)
        for reader in self.readers:
            self.judge_reads(trial, reader.receive(READER_S), undisturbed, live)

    def judge_reads(self, trial: Trial, report: dict[str, Any], undisturbed: Undisturbed, live: str) -> None:
        problems = list(report["problems"])
        if live in report["gone"]:
            problems.append(f"release {live} went away while it was the newest one")
        for name, said in report["seen"].items():
            if self.contents.setdefault(name, said) != said:
                problems.append(f"release {name} changed from one reader or trial to another")
            known = [state[said["ds"]] for state in undisturbed.on_the_way if said["ds"] in state]
            if name in report["newest"] and not is_known(said["buckets"], known):
                problems.append(f"release {name} holds what no undisturbed run leaves")
        trial.reads += report["checks"]
        trial.torn += len(problems)
        trial.notes += [f"reader: {problem}" for problem in problems]


class Attack:
    """What is done to one operation, and the repetitions until it is through."""

    def __init__(
        self, lane: Lane, operation: Operation, undisturbed: Undisturbed, trial: Trial, rng: random.Random
    ) -> None:
        self.lane, self.operation, self.undisturbed, self.trial, self.rng = lane, operation, undisturbed, trial, rng
        self.sessions: list[int] = []
        self.url = ""
        self.spark_lost_one = False

    def prepare(self) -> None:
        """Start the hosts that will be needed."""
        kind = "fork" if self.operation.steps else "cluster" if self.trial.fault.startswith("executor") else "spark"
        count = len(self.operation.parties)
        self.hosts = [kind, *(f"{kind}-{number}" for number in range(2, count + 1))]
        for host in self.hosts:
            self.lane.host(host)

    def go(self) -> None:
        methods: dict[str, Callable[[], list[Ended]]] = {
            "release step killed": self.kill_one,
            "driver killed": self.kill_one,
            "network disturbed, driver killed": self.kill_one,
            "network disturbed": self.disturb_network,
            "disk full": self.fill_disk,
            "Python worker killed": self.kill_worker,
            "executor killed": self.kill_worker,
            "two or three at once": self.rivals,
        }
        for party, ended in enumerate(methods[self.trial.fault]()):
            self.repeat(party, ended)
        if self.operation.last is not None:
            self.repeat(self.operation.last, self.wait(self.start(self.operation.last)))
        for session in self.sessions:
            if left := end_session(session, patience=LEFT_OVER_S):
                self.trial.notes.append(
                    f"{left} processes of a killed driver were still there {LEFT_OVER_S:.0f} s later"
                )

    def start(self, party: int = 0, *, cold: bool = False, host: str = "") -> Attempt:
        command = self.operation.parties[party]
        if cold:
            attempt = self.lane.cold(command, endpoint=self.url)
            self.sessions.append(attempt.pid)
            return attempt
        start = self.lane.fork if self.operation.steps else self.lane.warm
        return start(command, host=host or self.hosts[0], endpoint=self.url)

    def wait(self, attempt: Attempt) -> Ended:
        try:
            return attempt.wait(LIMIT_S)
        except Overdue as error:
            self.lane.drop(attempt.host)
            return Ended(None, str(error))

    def repeat(self, party: int, ended: Ended) -> None:
        """The same command again, until it succeeds."""
        for again in range(RETRIES + 1):
            if ended.code == 0 or (self.operation.superseded and self.gave_way(ended)):
                return
            self.note_failure(ended)
            if again == RETRIES:
                break
            self.trial.retries += 1
            cold = self.trial.fault.endswith("driver killed") and self.rng.random() < 0.25
            ended = self.wait(self.start(party, cold=cold))
        self.trial.unended += 1
        self.trial.notes.append(f"failed {RETRIES + 1} times, at last (code {ended.code}): {tail(ended.said)}")

    def gave_way(self, ended: Ended) -> bool:
        return ended.code == Superseded.exit_code and SUPERSEDED in ended.said

    def note_failure(self, ended: Ended) -> None:
        """A failure must be told in one line; a killed process says nothing."""
        if ended.said:
            folder = self.lane.folder / "failures"
            folder.mkdir(exist_ok=True)
            (folder / f"{self.trial.number}-{self.trial.retries}.txt").write_text(ended.said)
        if ended.code is None:
            self.trial.unended += 1
            self.trial.notes.append(f"did not end in {LIMIT_S:.0f} s: {tail(ended.said)}")
        elif ended.code > 0:
            lines = [line for line in ended.said.splitlines() if OWN_ERROR.match(line)]
            clear = len(lines) == 1
            if self.trial.fault == "disk full":
                clear = clear and any(words in lines[0] for words in DISK_FULL)
            # Of a process that Spark lost, Spark tells in its own way.
            self.trial.unclear += not clear and not self.spark_lost_one
            self.trial.notes.append(f"failed (code {ended.code}){'' if clear else ', unclear'}: {tail(ended.said)}")

    # --- the faults

    def kill_one(self) -> list[Ended]:
        """SIGKILL at a moment: of the clock, or of what happens on the store."""
        cold = "driver" in self.trial.fault
        events, seconds = self.undisturbed.events, COLD_S if cold else self.undisturbed.seconds
        attempts: list[Attempt] = []

        def strike() -> None:
            attempts[0].kill()

        rate = self.rng.uniform(0.05, 0.15) if "network" in self.trial.fault else 0.0
        given = {"rate": rate, "seed": self.trial.number} if rate else {}
        if self.rng.random() < (0.3 if cold else 0.15) and not rate:
            moment = self.rng.uniform(0, seconds)
            self.trial.moment = f"after {moment:.2f} s"
            attempts.append(self.start(cold=cold))
            deadline = time.monotonic() + moment
            while time.monotonic() < deadline and attempts[0].running:
                time.sleep(0.001)
            strike()
            ended = self.wait(attempts[0])
            self.trial.struck = ended.code == KILLED
            return [ended]
        at = self.rng.randint(1, max(1, events))
        self.trial.moment = f"event {at} of about {events}" + (f", {rate:.0%} of requests disturbed" if rate else "")
        with self.lane.watched(at=at, action=strike, **given) as watched:
            self.url = watched.url
            attempts.append(self.start(cold=cold))
            ended = self.wait(attempts[0])
            self.trial.struck = ended.code == KILLED
            if not rate:
                self.url = ""
                return [ended]
            # The network stays as it is while the command is repeated.
            self.repeat(0, ended)
            self.url = ""
            return []

    def kill_worker(self) -> list[Ended]:
        """SIGKILL of one of the processes that a driver has work done by."""
        find = executors if self.trial.fault.startswith("executor") else python_workers
        attempts: list[Attempt] = []

        def strike() -> None:
            found = find(self.lane.host(self.hosts[0]).pid)
            if found and attempts and attempts[0].running:
                os.kill(self.rng.choice(found), -KILLED)
                self.trial.struck = self.spark_lost_one = True

        at = self.rng.randint(1, max(1, round(0.8 * self.undisturbed.events)))
        self.trial.moment = f"event {at} of about {self.undisturbed.events}"
        with self.lane.watched(at=at, action=strike) as watched:
            self.url = watched.url
            attempts.append(self.start())
            ended = self.wait(attempts[0])
        self.url = ""
        return [ended]

    def fill_disk(self) -> list[Ended]:
        """The disk has less room than is needed, then enough."""
        assert isinstance(self.lane, Local)
        # Most of what an operation writes stays; what a vacuum needs for a moment is a few blocks.
        growth = max(self.undisturbed.growth, 4 * BLOCK)
        room = int(self.rng.uniform(0, 0.95) * growth)
        cold = not self.operation.steps and self.rng.random() < 0.5
        self.trial.moment = f"{room:,} of {growth:,} bytes left"
        self.lane.resize(self.lane.used() + room)
        try:
            ended = self.wait(self.start(cold=cold))
        finally:
            self.lane.resize(ROOM)
        self.trial.struck = ended.code != 0
        return [ended]

    def disturb_network(self) -> list[Ended]:
        """Some of the requests are refused, reset, stalled or cut, and go on being so while the command is repeated."""
        rate = self.rng.uniform(0.05, 0.30)
        with self.lane.watched(rate=rate, seed=self.trial.number) as watched:
            self.url = watched.url
            self.repeat(0, self.wait(self.start()))
        disturbed = watched.count - watched.counts["passed"]
        self.trial.struck = disturbed > 0
        self.trial.moment = f"{disturbed} of {watched.count} requests disturbed"
        self.url = ""
        return []

    def rivals(self) -> list[Ended]:
        """All parties at once; every other time one of them is killed."""
        count = len(self.operation.parties)
        attempts: list[Attempt] = []
        victim = self.rng.randrange(count)

        def strike() -> None:
            if len(attempts) < count or not attempts[victim].running:
                return
            if self.operation.steps:
                attempts[victim].kill()
            elif found := python_workers(self.lane.host(self.hosts[victim]).pid):
                os.kill(self.rng.choice(found), -KILLED)
                self.spark_lost_one = True

        kills = self.rng.random() < 0.5
        at = self.rng.randint(1, max(1, self.undisturbed.events)) if kills else None
        self.trial.moment = f"one killed at event {at}" if kills else "none killed"
        with self.lane.watched(at=at, action=strike) as watched:
            self.url = watched.url
            for party, host in enumerate(self.hosts):
                time.sleep(self.rng.choice((0.0, 0.0, self.rng.uniform(0, 0.2))))
                attempts.append(self.start(party, host=host))
            self.trial.struck = all(attempt.running for attempt in attempts)
            ended = [self.wait(attempt) for attempt in attempts]
        self.url = ""
        return ended


def tail(said: str) -> str:
    """The line of a failure that says most."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for mark in (" ERROR ", "Caused by", "Error: ", "Exception: "):
        if found := [line for line in lines if mark in line]:
            return found[-1][:500]
    return lines[-1][:500] if lines else "nothing said"


# --- the whole


@contextmanager
def arenas(
    folder: Path, stores: Sequence[str], *, seed: int, s3_script: Path
) -> Iterator[dict[str, Callable[[], Arena]]]:
    """How to get to the stores: each is made when it is needed first."""
    with ExitStack() as stack:
        env = environment(folder)
        made: dict[str, Arena] = {}

        def arena(store: str) -> Arena:
            if store not in made:
                if store == "local":
                    lane: Lane = stack.enter_context(Local(folder / "local", env=env))
                else:
                    server = stack.enter_context(running_s3(s3_script, folder / "ceph"))
                    os.environ.update(server)
                    lane = stack.enter_context(S3(folder / "remote", env=env, server=server))
                lane.build()
                made[store] = Arena(lane, seed=seed)
                stack.callback(made[store].close)
            return made[store]

        yield {store: (lambda store=store: arena(store)) for store in stores}


def environment(folder: Path) -> dict[str, str]:
    """Of every process: whatever they leave lies below the folder."""
    (folder / "tmp").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MARC_", "AWS_"))}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(REPOSITORY),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_HOME": str(Path(pyspark.__file__).parent),
        "SPARK_LOCAL_DIRS": str(folder / "tmp"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "TMPDIR": str(folder / "tmp"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_campaign(
    trials: int,
    *,
    seed: int,
    folder: Path,
    stores: Sequence[str] = ("local", "S3"),
    only: Sequence[int] = (),
    faults: Sequence[str] = (),
    s3_script: Path = S3_SCRIPT,
    say: Callable[[str], object] = lambda line: sys.stderr.write(f"{line}\n"),
) -> list[Trial]:
    """Go through the trials; those of a store that cannot be had are replaced by others, and that is said."""
    kinds = [kind for kind in KINDS if kind.store in stores and (not faults or kind.fault in faults)]
    done: list[Trial] = []
    with arenas(folder, stores, seed=seed, s3_script=s3_script) as ways:
        if "S3" in stores and any(kind.store == "S3" for kind in kinds):
            try:
                began = time.monotonic()
                ways["S3"]()
                say(f"S3: site made in {time.monotonic() - began:.0f} s")
            except pytest.skip.Exception as reason:
                say(f"S3 trials are left out: {reason}")
                kinds = [kind for kind in kinds if kind.store != "S3"]
        if any(kind.store == "local" for kind in kinds):
            began = time.monotonic()
            lane = ways["local"]().lane
            say(f"local: site made in {time.monotonic() - began:.0f} s")
            if isinstance(lane, Local) and not lane.resizable:
                say("trials of a full disk are left out: no file system can be mounted here (not root)")
                kinds = [kind for kind in kinds if kind.fault != "disk full"]
        planned = list(enumerate(schedule(trials, kinds), start=1))
        for number, (kind, operation) in planned:
            if only and number not in only:
                continue
            trial = Trial(number, kind.fault, kind.store, operation)
            ways[kind.store]().go(trial)
            done.append(trial)
            say(trial.line(len(planned)))
    return done


COLUMNS = {
    "trials": len,
    "struck": lambda found: sum(t.struck for t in found),
    "retries": lambda found: sum(t.retries for t in found),
    "not ended": lambda found: sum(t.unended for t in found),
    "lost items": lambda found: sum(t.lost for t in found),
    "duplicate ids": lambda found: sum(t.duplicates for t in found),
    "torn or mixed reads": lambda found: sum(t.torn for t in found),
    "failed verifies": lambda found: sum(t.failed_verifies for t in found),
    "unequal tables": lambda found: sum(t.unequal for t in found),
    "doubled releases": lambda found: sum(t.doubled for t in found),
    "unclear failures": lambda found: sum(t.unclear for t in found),
    "rows compared bit for bit": lambda found: sum(t.rows for t in found),
    "reads": lambda found: sum(t.reads for t in found),
    "seconds": lambda found: round(sum(t.seconds for t in found)),
}


def table(done: Sequence[Trial]) -> str:
    """The one table, as Markdown."""
    rows = [["fault", "store", *COLUMNS]]
    for kind in KINDS:
        if found := [t for t in done if (t.fault, t.store) == (kind.fault, kind.store)]:
            rows.append([kind.fault, kind.store, *(f"{count(found):,}" for count in COLUMNS.values())])
    rows.append(["all", "", *(f"{count(done):,}" for count in COLUMNS.values())])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        " | ".join(
            cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = " | ".join("-" * w if n < 2 else "-" * (w - 1) + ":" for n, w in enumerate(widths))
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["local", "s3"], help="only this store")
    parser.add_argument("--only-trial", type=int, action="append", default=[], help="only this one (repeatable)")
    parser.add_argument("--fault", action="append", default=[], choices=sorted({k.fault for k in KINDS}))
    parser.add_argument("--json", type=Path, help="every trial, as JSON")
    parser.add_argument("--out", type=Path, help="the table, as Markdown")
    parser.add_argument("--s3-script", type=Path, default=S3_SCRIPT, help="starts and stops the S3 server")
    parser.add_argument("--keep", type=Path, help="folder for everything; it stays (default: a temporary one)")
    given = parser.parse_args()
    stores = {"local": ("local",), "s3": ("S3",), None: ("local", "S3")}[given.only]
    folder = (given.keep or Path(tempfile.mkdtemp(prefix="marc-faults-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = run_campaign(
            given.trials,
            seed=given.seed,
            folder=folder,
            stores=stores,
            only=given.only_trial,
            faults=given.fault,
            s3_script=given.s3_script,
        )
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(table(done) + "\n")
    if given.out:
        given.out.write_text(table(done) + "\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(trial) for trial in done], indent=1))
    return int(any(trial.bad for trial in done))


if __name__ == "__main__":
    sys.exit(main())
