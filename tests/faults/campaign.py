"""The fault campaign: seeded trials with one fault each, while readers check every release; prints a table.

    python tests/faults/campaign.py --trials 200 --seed 1

Every trial restores a state of a small site, disturbs one operation and retries its command until it succeeds. Then it
compares the site with the result of the same operation without a fault. Trial n of a seed always has the same fault:
``--only-trial N`` repeats one.
"""

# ruff: noqa: E402 - as a script, this module extends the import path first

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PACKAGES = [str(REPOSITORY / name) for name in ("pipeline", "schemas")]
if __name__ == "__main__":
    sys.path[:0] = [*PACKAGES, str(HERE.parent / "fixtures")]

import pyspark
import pytest
from attack import Attack
from checks import is_known, judge
from hosts import Host
from operations import Operation
from stores import LocalSite, S3Site
from trial_site import TrialSite, Undisturbed
from trials import KINDS, Trial, schedule, table

from s3_server import running_s3

S3_SCRIPT = REPOSITORY.parent / "shared" / "tools" / "ceph-s3"
READERS = 2
READER_S = 120.0


class Runner:
    """Runs one trial after the other on a site, with readers."""

    def __init__(self, site: TrialSite, *, seed: int) -> None:
        self.site, self.seed = site, seed
        self.contents: dict[str, dict[str, Any]] = {}
        self.readers = [
            Host("reader_host.py", env=site.env, log=site.folder / f"reader-{number}.log") for number in range(READERS)
        ]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()

    def go(self, trial: Trial) -> None:
        """Run one trial."""
        operation = self.site.operations[trial.operation]
        undisturbed = self.site.undisturbed(operation)
        self.site.restore(operation.state)
        live, every = self.site.live(), self.site.release_ids()
        table = self.site.settings.table_uri
        for number, reader in enumerate(self.readers):
            reader.send(watch=table, pins=every if number and "vacuum" in operation.name else [live])
        for reader in self.readers:
            reader.receive(READER_S)
        attack = Attack(self.site, operation, undisturbed, trial, random.Random(f"{self.seed}/{trial.number}"))  # noqa: S311
        attack.prepare()
        began = time.monotonic()
        attack.go()
        trial.seconds = time.monotonic() - began
        self.judge(trial, operation, undisturbed, live)

    def judge(self, trial: Trial, operation: Operation, undisturbed: Undisturbed, live: str) -> None:
        try:
            found = self.site.look(operation)
            judge(found, undisturbed.known)
            if operation.removes and found.files != undisturbed.files:
                found.unequal += 1
                differing = sorted(found.files ^ undisturbed.files)
                found.notes.append(f"{len(differing)} files differ from a run without a fault, as {differing[0]}")
            for name in ("lost", "duplicates", "failed_verifies", "unequal", "doubled", "rows"):
                setattr(trial, name, getattr(found, name))
            trial.notes += found.notes
        except Exception as error:
            trial.failed_verifies += 1
            trial.notes.append(f"the site cannot be checked: {type(error).__name__}: {error}")
        for reader in self.readers:
            reader.send(report=True)
        for reader in self.readers:
            self.judge_reads(trial, reader.receive(READER_S), undisturbed, live)

    def judge_reads(self, trial: Trial, report: dict[str, Any], undisturbed: Undisturbed, live: str) -> None:
        problems = list(report["problems"])
        if live in report["gone"]:
            problems.append(f"release {live} was deleted while it was the newest one")
        for name, said in report["seen"].items():
            if self.contents.setdefault(name, said) != said:
                problems.append(f"release {name} changed from one reader or trial to another")
            known = [state[said["ds"]] for state in undisturbed.on_the_way if said["ds"] in state]
            if name in report["newest"] and not is_known(said["buckets"], known):
                problems.append(f"release {name} differs from every run without a fault")
        trial.reads += report["checks"]
        trial.torn += len(problems)
        trial.notes += [f"reader: {problem}" for problem in problems]


@contextmanager
def runners(folder: Path, *, seed: int, s3_script: Path) -> Iterator[Callable[[str], Runner]]:
    """Return a function that builds the runner of a store at its first call."""
    with ExitStack() as stack:
        env = environment(folder)

        @cache
        def runner(store: str) -> Runner:
            if store == "local":
                site: TrialSite = stack.enter_context(LocalSite(folder / "local", env=env))
            else:
                server = stack.enter_context(running_s3(s3_script, folder / "ceph"))
                os.environ.update(server)
                site = stack.enter_context(S3Site(folder / "remote", env=env, server=server))
            site.build()
            made = Runner(site, seed=seed)
            stack.callback(made.close)
            return made

        yield runner


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of every process; temporary files are below the folder."""
    (folder / "tmp").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MARC_", "AWS_"))}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(PACKAGES),
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
    """Run the trials; if a store is not available, report that and run other trials instead."""
    kinds = [kind for kind in KINDS if kind.store in stores and (not faults or kind.fault in faults)]
    done: list[Trial] = []
    with runners(folder, seed=seed, s3_script=s3_script) as runner:
        if "S3" in stores and any(kind.store == "S3" for kind in kinds):
            try:
                began = time.monotonic()
                runner("S3")
                say(f"S3: site built in {time.monotonic() - began:.0f} s")
            except pytest.skip.Exception as reason:
                say(f"S3 trials are skipped: {reason}")
                kinds = [kind for kind in kinds if kind.store != "S3"]
        if any(kind.store == "local" for kind in kinds):
            began = time.monotonic()
            site = runner("local").site
            say(f"local: site built in {time.monotonic() - began:.0f} s")
            if isinstance(site, LocalSite) and not site.resizable:
                say("trials of a full disk are skipped: mounting a file system needs root")
                kinds = [kind for kind in kinds if kind.fault != "disk full"]
        for number, (kind, operation) in enumerate(schedule(trials, kinds), start=1):
            if only and number not in only:
                continue
            trial = Trial(number, kind.fault, kind.store, operation)
            runner(kind.store).go(trial)
            done.append(trial)
            say(trial.line(trials))
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["local", "s3"], help="run trials of this store only")
    parser.add_argument("--only-trial", type=int, action="append", default=[], help="run this trial only (repeatable)")
    parser.add_argument("--fault", action="append", default=[], choices=sorted({k.fault for k in KINDS}))
    parser.add_argument("--json", type=Path, help="file for all trials as JSON")
    parser.add_argument("--out", type=Path, help="file for the table as Markdown")
    parser.add_argument("--s3-script", type=Path, default=S3_SCRIPT, help="script that starts and stops the S3 server")
    parser.add_argument("--keep", type=Path, help="folder for all files, kept at the end (default: temporary)")
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
