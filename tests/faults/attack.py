"""Faults of a trial: kills, full disks, network errors and concurrent commands, each followed by retries."""

import os
import random
import re
import time
from collections.abc import Callable

from hosts import Attempt, Ended, Overdue
from operations import Operation
from process_table import end_session, executors, python_workers
from stores import ROOM, LocalSite
from trial_site import TrialSite, Undisturbed
from trials import Trial

from marc_pipeline.errors import Superseded

RETRIES = 6
KILLED = -9
LIMIT_S = 300.0
BLOCK = 4096
LEFT_OVER_S = 15.0
COLD_S = 12.0
DISK_FULL = ("No space left on device", "disk is full", "Disk quota exceeded")
SUPERSEDED = "superseded"
# Spark's own log lines begin with a date.
OWN_ERROR = re.compile(r"\d\d:\d\d:\d\d ERROR ")


class Attack:
    """A fault during one operation, and the retries of its commands."""

    def __init__(
        self, site: TrialSite, operation: Operation, undisturbed: Undisturbed, trial: Trial, rng: random.Random
    ) -> None:
        self.site, self.operation, self.undisturbed, self.trial, self.rng = site, operation, undisturbed, trial, rng
        self.sessions: list[int] = []
        self.url = ""
        self.worker_killed = False

    def prepare(self) -> None:
        """Start the hosts of all parties."""
        kind = "fork" if self.operation.steps else "cluster" if self.trial.fault.startswith("executor") else "spark"
        count = len(self.operation.parties)
        self.hosts = [kind, *(f"{kind}-{number}" for number in range(2, count + 1))]
        for host in self.hosts:
            self.site.host(host)

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
                self.trial.notes.append(f"{left} processes of a killed driver still ran after {LEFT_OVER_S:.0f} s")

    def start(self, party: int = 0, *, cold: bool = False, host: str = "") -> Attempt:
        command = self.operation.parties[party]
        if cold:
            attempt = self.site.cold(command, endpoint=self.url)
            self.sessions.append(attempt.pid)
            return attempt
        start = self.site.fork if self.operation.steps else self.site.warm
        return start(command, host=host or self.hosts[0], endpoint=self.url)

    def wait(self, attempt: Attempt) -> Ended:
        try:
            return attempt.wait(LIMIT_S)
        except Overdue as error:
            self.site.drop(attempt.host)
            return Ended(None, str(error))

    def repeat(self, party: int, ended: Ended) -> None:
        """Repeat a command until it succeeds."""
        for again in range(RETRIES + 1):
            superseded = ended.code == Superseded.exit_code and SUPERSEDED in ended.said
            if ended.code == 0 or (self.operation.superseded and superseded):
                return
            self.note_failure(ended)
            if again == RETRIES:
                break
            self.trial.retries += 1
            cold = self.trial.fault.endswith("driver killed") and self.rng.random() < 0.25
            ended = self.wait(self.start(party, cold=cold))
        self.trial.unended += 1
        self.trial.notes.append(f"failed {RETRIES + 1} times, the last time with code {ended.code}: {tail(ended.said)}")

    def note_failure(self, ended: Ended) -> None:
        """Note a failure; a process that was not killed must log one error line."""
        if ended.said:
            folder = self.site.folder / "failures"
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
            # Spark logs its own errors for a lost worker.
            self.trial.unclear += not clear and not self.worker_killed
            self.trial.notes.append(f"failed (code {ended.code}){'' if clear else ', unclear'}: {tail(ended.said)}")

    # --- faults

    def kill_one(self) -> list[Ended]:
        """Kill the process at a moment of the clock, or at an event of the store."""
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
        with self.site.watched(at=at, action=strike, **given) as watched:
            self.url = watched.url
            attempts.append(self.start(cold=cold))
            ended = self.wait(attempts[0])
            self.trial.struck = ended.code == KILLED
            if not rate:
                self.url = ""
                return [ended]
            # The network faults continue during the retries.
            self.repeat(0, ended)
            self.url = ""
            return []

    def kill_worker(self) -> list[Ended]:
        """Kill a Python worker or an executor."""
        find = executors if self.trial.fault.startswith("executor") else python_workers
        attempts: list[Attempt] = []

        def strike() -> None:
            found = find(self.site.host(self.hosts[0]).pid)
            if found and attempts and attempts[0].running:
                os.kill(self.rng.choice(found), -KILLED)
                self.trial.struck = self.worker_killed = True

        at = self.rng.randint(1, max(1, round(0.8 * self.undisturbed.events)))
        self.trial.moment = f"event {at} of about {self.undisturbed.events}"
        with self.site.watched(at=at, action=strike) as watched:
            self.url = watched.url
            attempts.append(self.start())
            ended = self.wait(attempts[0])
        self.url = ""
        return [ended]

    def fill_disk(self) -> list[Ended]:
        """Run the command on a disk with too little space, then give it enough."""
        assert isinstance(self.site, LocalSite)
        # Most operations keep what they write; a vacuum needs a few blocks for a short time.
        growth = max(self.undisturbed.growth, 4 * BLOCK)
        room = int(self.rng.uniform(0, 0.95) * growth)
        cold = not self.operation.steps and self.rng.random() < 0.5
        self.trial.moment = f"{room:,} of {growth:,} bytes left"
        self.site.resize(self.site.used() + room)
        try:
            ended = self.wait(self.start(cold=cold))
        finally:
            self.site.resize(ROOM)
        self.trial.struck = ended.code != 0
        return [ended]

    def disturb_network(self) -> list[Ended]:
        """Refuse, reset, stall or cut some requests, also during the retries."""
        rate = self.rng.uniform(0.05, 0.30)
        with self.site.watched(rate=rate, seed=self.trial.number) as watched:
            self.url = watched.url
            self.repeat(0, self.wait(self.start()))
        disturbed = watched.count - watched.counts["passed"]
        self.trial.struck = disturbed > 0
        self.trial.moment = f"{disturbed} of {watched.count} requests disturbed"
        self.url = ""
        return []

    def rivals(self) -> list[Ended]:
        """Run all parties at once; in half of the trials, kill one of them."""
        count = len(self.operation.parties)
        attempts: list[Attempt] = []
        victim = self.rng.randrange(count)

        def strike() -> None:
            if len(attempts) < count or not attempts[victim].running:
                return
            if self.operation.steps:
                attempts[victim].kill()
            elif found := python_workers(self.site.host(self.hosts[victim]).pid):
                os.kill(self.rng.choice(found), -KILLED)
                self.worker_killed = True

        kills = self.rng.random() < 0.5
        at = self.rng.randint(1, max(1, self.undisturbed.events)) if kills else None
        self.trial.moment = f"one killed at event {at}" if kills else "none killed"
        with self.site.watched(at=at, action=strike) as watched:
            self.url = watched.url
            for party, host in enumerate(self.hosts):
                time.sleep(self.rng.choice((0.0, 0.0, self.rng.uniform(0, 0.2))))
                attempts.append(self.start(party, host=host))
            self.trial.struck = all(attempt.running for attempt in attempts)
            ended = [self.wait(attempt) for attempt in attempts]
        self.url = ""
        return ended


def tail(said: str) -> str:
    """Return the most informative line of an error output."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for mark in (" ERROR ", "Caused by", "Error: ", "Exception: "):
        if found := [line for line in lines if mark in line]:
            return found[-1][:500]
    return lines[-1][:500] if lines else "no output"
