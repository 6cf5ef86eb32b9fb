"""The site of the fault campaign: its states, its configurations, and its operations without a fault."""

import csv
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import yaml
from checks import Findings, State, files_below, look_at, usable_ids
from hosts import ColdAttempt, ForkAttempt, Host, WarmAttempt
from operations import Operation, read_operations

from marc_pipeline.config import Settings, load_settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.example.shop import write_catalogue
from marc_pipeline.nightly.plan_identity import identify_plan
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases import retention
from marc_pipeline.storage import Storage
from marc_schemas.identity import row_id
from tiny_models import save_tiny_backbone

BEFORE, FIRST, SECOND = "2026-11-19", "2026-11-20", "2026-11-21"
ITEMS, BUCKETS = 300, 4
# Grace period of the configuration "careful", in hours.
GRACE = 300 / 3600
COMMAND_S = 600.0


@dataclass
class Undisturbed:
    """Results of an operation without a fault: allowed final states, states on the way, files, and its extent."""

    known: list[State]
    on_the_way: list[State]
    files: frozenset[str]
    events: int
    seconds: float
    growth: int


class TrialSite:
    """A small site on a store, with named states: whole copies that :meth:`restore` brings back to the same uri.

    Args:
        folder: folder of states, logs and configurations.
        site: uri of the site.
        env: environment of every process.
    """

    def __init__(self, folder: Path, *, site: str, env: dict[str, str]) -> None:
        self.folder, self.site, self.env = folder, site, env
        self.storage = Storage()
        self.plans: dict[str, str] = {}
        self.hosts: dict[str, Host] = {}
        self.catalogues: dict[str, Path] = {}
        self._undisturbed: dict[str, Undisturbed] = {}
        self.operations = read_operations()
        folder.mkdir(parents=True, exist_ok=True)

    # --- methods of the stores

    def restore(self, state: str) -> None:
        raise NotImplementedError

    def save(self, state: str) -> None:
        raise NotImplementedError

    def put(self, path: Path, name: str) -> None:
        """Copy a file into the site."""
        raise NotImplementedError

    def used(self) -> int:
        """Return the used bytes of a store of limited size; otherwise 0."""
        raise NotImplementedError

    def watched(self, **strike: Any) -> Any:
        """Return a counter of the store's events for commands that use its ``url``; it strikes at one of them."""
        raise NotImplementedError

    # --- processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.close()

    def host(self, name: str) -> Host:
        """Return a permanent child process: ``spark…``, ``cluster`` (with own executors) or ``fork…``."""
        if name not in self.hosts:
            log = self.folder / f"{name}.log"
            if name.startswith("fork"):
                made = Host("command_host.py", "fork", env=self.env, log=log)
            else:
                config = self.config("cluster" if name == "cluster" else "site")
                made = Host("command_host.py", "spark", str(config), env=self.env, log=log)
            self.hosts[name] = made
            try:
                made.receive(COMMAND_S)
            except BaseException:
                self.drop(made)
                raise
        return self.hosts[name]

    def drop(self, host: Host) -> None:
        """Close a host that does not answer; the next call of :meth:`host` starts a new one."""
        host.close()
        self.hosts = {name: kept for name, kept in self.hosts.items() if kept is not host}

    def warm(self, command: Sequence[str], *, host: str = "spark", endpoint: str = "") -> WarmAttempt:
        return WarmAttempt(self.host(host), self.arguments(command, endpoint))

    def fork(self, command: Sequence[str], *, host: str = "fork", endpoint: str = "") -> ForkAttempt:
        return ForkAttempt(self.host(host), self.arguments(command, endpoint), self.folder / f"{host}.out")

    def cold(self, command: Sequence[str], *, endpoint: str = "") -> ColdAttempt:
        return ColdAttempt(self.arguments(command, endpoint), env=self.env, output=self.folder / "cold.out")

    def arguments(self, command: Sequence[str], endpoint: str = "") -> list[str]:
        """Return the arguments of ``marc`` for a command, whose first word names the configuration."""
        config = str(self.config(command[0], endpoint))
        rest = [self.plans[word.removeprefix("plan:")] if word.startswith("plan:") else word for word in command[1:]]
        return [rest[0], config, *rest[1:]] if rest[0].startswith("@") else ["-c", config, *rest]

    # --- configuration

    def config(self, name: str, endpoint: str = "") -> Path:
        """Return a configuration file: ``site``, ``cluster``, ``late`` (other catalogues), ``vacuum``, ``careful``."""
        template = Path(__file__).with_name("settings.yaml").read_text()
        text = template.replace("SITE", self.site).replace("BACKBONE", str(self.folder / "backbone"))
        settings: dict[str, Any] = yaml.safe_load(text)
        if name == "late":
            settings["catalogue"]["uri"] = f"{self.site}/late/{{ds}}.csv"
        if name == "cluster":
            settings["spark"]["master"] = "local-cluster[2,1,1024]"
        if name == "vacuum":
            settings["retention"] = {"days": 1, "releases_per_day": 1, "grace_hours": 0}
        if name == "careful":
            settings["retention"] = {"days": 2, "releases_per_day": 1, "grace_hours": GRACE}
        if endpoint:
            settings["storage"] = {"endpoint_url": endpoint}
        path = self.folder / f"{name}{'-' + re.sub(r'.*:', '', endpoint) if endpoint else ''}.yaml"
        text = yaml.safe_dump(settings)
        # A running command may be reading the file.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    @property
    def settings(self) -> Settings:
        return load_settings(self.config("site"))

    # --- the site

    def build(self) -> None:
        """Build the states that operations start from."""
        save_tiny_backbone(self.folder / "backbone")
        generated = self.folder / "generated"
        for ds in (BEFORE, FIRST, SECOND):
            write_catalogue(generated, ds=ds, items=ITEMS)
            self.catalogues[ds] = altered(generated / f"{ds}.csv", self.folder / "made" / f"{ds}.csv", ds)
        self.catalogues["corrected"] = altered(generated / f"{FIRST}.csv", self.folder / "corrected.csv", "corrected")
        self.catalogues["late"] = altered(generated / f"{SECOND}.csv", self.folder / "late.csv", "late")
        for ds in (BEFORE, FIRST, SECOND):
            self.put(self.catalogues[ds], f"catalogue/{ds}.csv")
        self.put(self.catalogues["late"], f"late/{SECOND}.csv")
        self.done("site", "train", "--ds", FIRST)
        self.done("site", "run", "--ds", FIRST)
        self.save("base")
        self.done("site", "@prepare", SECOND)
        self.plans["night"] = self.plan_id("site", SECOND)
        self.save("prepared")
        self.done("late", "@prepare", SECOND)
        self.plans["late"] = self.plan_id("late", SECOND)
        self.save("both prepared")
        self.restore("prepared")
        self.done("site", "run", "--ds", SECOND)
        self.save("two nights")
        self.plans["first release"] = self.live(FIRST)
        self.restore("base")
        self.put(self.catalogues["corrected"], f"catalogue/{FIRST}.csv")
        self.save("corrected")
        for bucket in ("1", "2", "3"):
            self.done("site", "@prepare", FIRST, bucket)
            self.plans[f"bucket {bucket}"] = self.plan_id("site", FIRST, [int(bucket)])
        self.save("buckets prepared")
        # Two releases of the first day, one of the second, and the files of a dead run of the day before.
        self.restore("two nights")
        self.put(self.catalogues["corrected"], f"catalogue/{FIRST}.csv")
        self.done("site", "@prepare", BEFORE)
        self.done("site", "backfill", "--ds", FIRST)
        self.save("crowded")
        # The same without the second day; the older releases were retired two hours ago.
        self.restore("corrected")
        self.done("site", "@prepare", BEFORE)
        self.done("site", "backfill", "--ds", FIRST)
        self.done("site", "@prepare", SECOND)
        self.plans["next night"] = self.plan_id("site", SECOND)
        careful = open_deployment(load_settings(self.config("careful")))
        retention.vacuum(careful, now=datetime.now(UTC) - timedelta(hours=2))
        self.save("retired")

    def done(self, *command: str) -> None:
        """Run a command without a fault."""
        ended = self.warm(command).wait(COMMAND_S)
        if ended.code != 0:
            raise RuntimeError(f"{' '.join(command)} failed without a fault: {ended.said[-2000:]}")

    def plan_id(self, config: str, ds: str, buckets: Sequence[int] = ()) -> str:
        return identify_plan(open_deployment(load_settings(self.config(config))), ds=ds, chosen=buckets).plan_id

    def live(self, ds: str | None = None) -> str:
        """Return the id of the live release."""
        return release_log.find_release(self.storage, self.settings.table_uri, ds=ds).release_id

    def release_ids(self) -> list[str]:
        """Return the ids of all releases that can be opened."""
        found = release_log.read_releases(self.storage, self.settings.table_uri)
        return [release.release_id for release in found if not release.withdrawn]

    def wanted(self, operation: Operation) -> dict[str, list[set[str]]]:
        """Return the allowed sets of item ids in the end, by date."""
        found = {}
        for ds in (BEFORE, FIRST, SECOND):
            own = usable_ids(self.catalogues[ds])
            found[ds] = []
            for name, buckets in operation.holds.get(ds, ((ds, ()),)):
                ids = usable_ids(self.catalogues[name])
                chosen = set(buckets or range(BUCKETS))
                kept = {item for item in own if row_id(item) % BUCKETS not in chosen}
                found[ds].append(kept | {item for item in ids if row_id(item) % BUCKETS in chosen})
        return found

    def look(self, operation: Operation) -> Findings:
        found = look_at(self.storage, self.settings.table_uri, self.wanted(operation))
        if operation.removes:
            settings = self.settings
            found.files = files_below(self.storage, [settings.table_uri, settings.index_uri, settings.work_uri])
        return found

    # --- operations without a fault

    def undisturbed(self, operation: Operation) -> Undisturbed:
        """Return the results of the operation without a fault; they are measured once."""
        if operation.name not in self._undisturbed:
            known, on_the_way, files, counted = [], [], frozenset(), (0, 0.0, 0)
            for number, order in enumerate(operation.orders):
                self.restore(operation.state)
                on_the_way.append(self.look(operation).state)
                for party in order:
                    measured = self.measure(operation, party)
                    counted = counted if number else tuple(map(sum, zip(counted, measured, strict=True)))
                    found = self.look(operation)
                    if found.failed_verifies or found.doubled:
                        raise RuntimeError(f"{operation.name}, undisturbed: {'; '.join(found.notes)}")
                    on_the_way.append(found.state)
                if found.lost or found.duplicates or found.unequal:
                    raise RuntimeError(f"{operation.name}, undisturbed: {'; '.join(found.notes)}")
                known.append(found.state)
                files = found.files
            events, seconds, growth = counted
            self._undisturbed[operation.name] = Undisturbed(known, on_the_way, files, events, seconds, growth)
        return self._undisturbed[operation.name]

    def measure(self, operation: Operation, party: int) -> tuple[int, float, int]:
        """Run one party's command; returns its events, seconds and bytes."""
        start = self.fork if operation.steps else self.warm
        began, before = time.monotonic(), self.used()
        with self.watched() as watched:
            ended = start(operation.parties[party], endpoint=watched.url).wait(COMMAND_S)
        if ended.code != 0:
            raise RuntimeError(f"{operation.name}, undisturbed: {ended.said[-2000:]}")
        return watched.count, time.monotonic() - began, self.used() - before


def altered(source: Path, path: Path, seed: str) -> Path:
    """Write a generated catalogue with more changed, removed and added items, so that every bucket changes."""
    with source.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = list(csv.reader(file))
    changed = []
    for number, row in enumerate(rows):
        lot = sum(map(ord, seed)) + 7 * number
        if lot % 29 == 0 and row[0]:
            continue
        changed.append([row[0], f"{row[1]} ({seed})", *row[2:]] if lot % 5 == 0 and row[1].strip() else row)
    changed += [[f"{seed}-{row[0]}", *row[1:]] for row in rows[3::40] if row[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *changed])
    return path
