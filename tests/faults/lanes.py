"""Where trials take place: a small site on a store, the states it can be put into, and what can be done there."""

import csv
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml
from checks import Findings, State, files_below, look_at, usable_ids
from hosts import ColdAttempt, ForkAttempt, Host, WarmAttempt
from tree_events import TreeEvents

from faulty_proxy import PASSED, RESET, FaultyProxy
from marc_pipeline.config import Settings, load_settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.example.shop import write_catalogue
from marc_pipeline.nightly.plan_identity import identify_plan
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases import retention
from marc_pipeline.storage import Storage
from marc_schemas.identity import plan_key, row_id
from s3_server import client_of
from tiny_models import save_tiny_backbone

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BEFORE, FIRST, SECOND = "2026-11-19", "2026-11-20", "2026-11-21"
ITEMS, BUCKETS = 300, 4
ROOM = 1 << 30
JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
BUCKET = "marc-faults"
# A short grace, in hours; and the plan whose files must look as if they had just been written.
GRACE = 300 / 3600
FRESH = {"retired": "next night"}
COMMAND_S = 600.0
COPIES_AT_ONCE = 8


@dataclass(frozen=True)
class Operation:
    """Something to do with a site, by one party or by several at once.

    Attributes:
        name: as the report says it.
        state: that the site is put into before.
        parties: a command each.
        orders: ways in which the parties may come one after the other, undisturbed; each gives a state to end in.
        steps: it needs no Spark.
        last: party that must go once more in the end: the one whose catalogue is in place.
        superseded: whether the rest may give way to one another.
        removes: files must be left as the undisturbed run leaves them.
        holds: what a date must hold in the end, where that is not the catalogue of its own: a catalogue and the buckets
            that it was taken for (none: all), or several of which one must be it.
    """

    name: str
    state: str
    parties: tuple[tuple[str, ...], ...]
    orders: tuple[tuple[int, ...], ...] = ((0,),)
    steps: bool = False
    last: int | None = None
    superseded: bool = False
    removes: bool = False
    holds: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = field(default_factory=dict)


@dataclass
class Undisturbed:
    """What an operation does when nothing happens to it."""

    known: list[State]
    on_the_way: list[State]
    files: frozenset[str]
    events: int
    seconds: float
    growth: int


class Lane:
    """A site on one store. States are whole copies of it, and it is always at the same place.

    Args:
        folder: for everything that is not the site.
        env: environment of every process.
    """

    store = ""

    def __init__(self, folder: Path, *, site: str, env: dict[str, str]) -> None:
        self.folder, self.site, self.env = folder, site, env
        self.storage = Storage()
        self.states: set[str] = set()
        self.plans: dict[str, str] = {}
        self.hosts: dict[str, Host] = {}
        self.catalogues: dict[str, Path] = {}
        self._undisturbed: dict[str, Undisturbed] = {}
        self.operations: dict[str, Operation] = {}
        self.restored_at = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    # --- what differs between stores

    def restore(self, state: str) -> None:
        raise NotImplementedError

    def save(self, state: str) -> None:
        raise NotImplementedError

    def put(self, path: Path, name: str) -> None:
        """A file into the site."""
        raise NotImplementedError

    def used(self) -> int:
        """Bytes of the store that are taken, where that matters."""
        raise NotImplementedError

    def watched(self, **strike: Any) -> Any:
        """Counts what happens on the store, to commands that use its ``url``; at one moment it strikes."""
        raise NotImplementedError

    # --- processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.close()

    def host(self, name: str) -> Host:
        """A child that stays: ``spark…`` (``cluster``: with executors of its own) or ``fork…``."""
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
        """Give up a host that does not answer; the next one starts anew."""
        host.close()
        self.hosts = {name: kept for name, kept in self.hosts.items() if kept is not host}

    def warm(self, command: Sequence[str], *, host: str = "spark", endpoint: str = "") -> WarmAttempt:
        return WarmAttempt(self.host(host), self.arguments(command, endpoint))

    def fork(self, command: Sequence[str], *, host: str = "fork", endpoint: str = "") -> ForkAttempt:
        return ForkAttempt(self.host(host), self.arguments(command, endpoint), self.folder / f"{host}.out")

    def cold(self, command: Sequence[str], *, endpoint: str = "") -> ColdAttempt:
        return ColdAttempt(self.arguments(command, endpoint), env=self.env, output=self.folder / "cold.out")

    def arguments(self, command: Sequence[str], endpoint: str = "") -> list[str]:
        """Arguments of ``marc``; a command names its configuration first."""
        config = str(self.config(command[0], endpoint))
        rest = [self.plans[word.removeprefix("plan:")] if word.startswith("plan:") else word for word in command[1:]]
        return [rest[0], config, *rest[1:]] if rest[0].startswith("@") else ["-c", config, *rest]

    # --- configuration

    def config(self, name: str, endpoint: str = "") -> Path:
        """A configuration file: ``site``; ``late`` reads other catalogues, ``vacuum`` keeps little."""
        conf = {
            "spark.driver.extraJavaOptions": JAVA,
            "spark.executor.extraJavaOptions": JAVA,
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.sql.shuffle.partitions": "4",
        }
        settings: dict[str, Any] = {
            "root": self.site,
            "catalogue": {
                "uri": f"{self.site}/{'late' if name == 'late' else 'catalogue'}/{{ds}}.csv",
                "updated_at_column": "updated_at",
                "template": "{title}. {brand}. {category}. {description}",
            },
            "buckets": BUCKETS,
            "train": {"backbone": str(self.folder / "backbone"), "dim": 8, "max_tokens": 32, "compressor": "pca"},
            "encode": {"device": "cpu", "dtype": "float32", "threads": 1},
            "spark": {"master": "local-cluster[2,1,1024]" if name == "cluster" else "local[2,4]", "conf": conf},
        }
        if name == "vacuum":
            settings["retention"] = {"days": 1, "releases_per_day": 1, "grace_hours": 0}
        if name == "careful":
            settings["retention"] = {"days": 2, "releases_per_day": 1, "grace_hours": GRACE}
        if endpoint:
            settings["storage"] = {"endpoint_url": endpoint}
        path = self.folder / f"{name}{'-' + re.sub(r'.*:', '', endpoint) if endpoint else ''}.yaml"
        text = yaml.safe_dump(settings)
        # Not while a command may read it.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    @property
    def settings(self) -> Settings:
        return load_settings(self.config("site"))

    # --- the site

    def build(self) -> None:
        """The site after its first night, and the states that operations start from."""
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
        # Two releases of the first day, one of the second, and what a run of the day before left when it died.
        self.restore("two nights")
        self.put(self.catalogues["corrected"], f"catalogue/{FIRST}.csv")
        self.done("site", "@prepare", BEFORE)
        self.done("site", "backfill", "--ds", FIRST)
        self.save("crowded")
        # The same before the second day, its older releases retired long ago.
        self.restore("corrected")
        self.done("site", "@prepare", BEFORE)
        self.done("site", "backfill", "--ds", FIRST)
        self.done("site", "@prepare", SECOND)
        self.plans["next night"] = self.plan_id("site", SECOND)
        careful = open_deployment(load_settings(self.config("careful")))
        retention.vacuum(careful, now=datetime.now(UTC) - timedelta(hours=2))
        self.save("retired")
        self.operations = {operation.name: operation for operation in OPERATIONS}

    def done(self, *command: str) -> None:
        """A command that nothing disturbs."""
        ended = self.warm(command).wait(COMMAND_S)
        if ended.code != 0:
            raise RuntimeError(f"{' '.join(command)} of the undisturbed site failed: {ended.said[-2000:]}")

    def plan_id(self, config: str, ds: str, buckets: Sequence[int] = ()) -> str:
        return identify_plan(open_deployment(load_settings(self.config(config))), ds=ds, chosen=buckets).plan_id

    def live(self, ds: str | None = None) -> str:
        """Release id of what readers see."""
        return release_log.find_release(self.storage, self.settings.table_uri, ds=ds).release_id

    def release_ids(self) -> list[str]:
        """Every release that can be opened."""
        found = release_log.read_releases(self.storage, self.settings.table_uri)
        return [release.release_id for release in found if not release.withdrawn]

    def wanted(self, operation: Operation) -> dict[str, list[set[str]]]:
        """Ids that the dates must hold in the end; where there are several sets, one of them."""
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

    # --- undisturbed

    def undisturbed(self, operation: Operation) -> Undisturbed:
        """What the operation does when nothing happens to it; found out once."""
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
        """Do one party's part; events, seconds and bytes that it took."""
        start = self.fork if operation.steps else self.warm
        began, before = time.monotonic(), self.used()
        with self.watched() as watched:
            ended = start(operation.parties[party], endpoint=watched.url).wait(COMMAND_S)
        if ended.code != 0:
            raise RuntimeError(f"{operation.name}, undisturbed: {ended.said[-2000:]}")
        return watched.count, time.monotonic() - began, self.used() - before


class Local(Lane):
    """A site in a folder; on a file system of its own, whose size can be changed, where that may be mounted."""

    store = "local"

    def __init__(self, folder: Path, *, env: dict[str, str]) -> None:
        self.disk = folder / "disk"
        super().__init__(folder, site=str(self.disk / "site"), env=env)
        self.disk.mkdir(exist_ok=True)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "faults", str(self.disk)], capture_output=True, check=False
        )
        self.resizable = mounted.returncode == 0

    def __exit__(self, *problem: object) -> None:
        super().__exit__(*problem)
        if self.resizable:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=False)

    def used(self) -> int:
        found = os.statvfs(self.disk)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def resize(self, size: int) -> None:
        """Make the disk so large."""
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.disk)], check=True)

    def restore(self, state: str) -> None:
        shutil.rmtree(self.site, ignore_errors=True)
        shutil.copytree(self.folder / "states" / state, self.site)
        fresh = self.plans.get(FRESH.get(state, ""), "-")
        for path in Path(self.site).rglob("*"):
            if path.is_file() and (fresh in str(path) or f"part-{plan_key(fresh)}" in path.name):
                os.utime(path)

    def save(self, state: str) -> None:
        shutil.copytree(self.site, self.folder / "states" / state)

    def put(self, path: Path, name: str) -> None:
        target = Path(self.site) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    def watched(self, **strike: Any) -> TreeEvents:
        return TreeEvents(Path(self.site), **strike)


class Watched(FaultyProxy):
    """A proxy that strikes at one request, and in half of the cases lets that request through."""

    def __init__(
        self, target: str, *, at: int | None = None, action: Callable[[], None] | None = None, **given: Any
    ) -> None:
        super().__init__(target, **{"rate": 0.0, "seed": 0, "stall_s": 1.0, **given})
        self._at, self._action = at, action

    @property
    def count(self) -> int:
        return self.counts.total()

    def draw(self) -> str:
        chosen = super().draw()
        if self._action and self.count == self._at:
            self._action()
            return PASSED if self.count % 2 else RESET
        return chosen


class S3(Lane):
    """A site on a real S3 server of this machine."""

    store = "S3"

    def __init__(self, folder: Path, *, env: dict[str, str], server: dict[str, str]) -> None:
        self.client: S3Client = client_of(server)
        self.endpoint = server["AWS_ENDPOINT_URL"]
        with suppress(self.client.exceptions.BucketAlreadyOwnedByYou):
            self.client.create_bucket(Bucket=BUCKET)
        super().__init__(folder, site=f"s3://{BUCKET}/{folder.name}/site", env={**env, **server})
        self.prefix = f"{folder.name}/site/"

    def used(self) -> int:
        return 0

    def _listed(self, prefix: str) -> dict[str, str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {item["Key"].removeprefix(prefix): item["ETag"] for page in pages for item in page.get("Contents", [])}

    def _become(self, target: str, source: str, *, anew: bool = False) -> None:
        wanted, there = self._listed(source), self._listed(target)
        stale = [name for name in there if name not in wanted]
        missing = [name for name, etag in wanted.items() if anew or there.get(name) != etag]
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            deleted = pool.map(lambda name: self.client.delete_object(Bucket=BUCKET, Key=target + name), stale)
            copied = pool.map(
                lambda name: self.client.copy_object(
                    Bucket=BUCKET, Key=target + name, CopySource={"Bucket": BUCKET, "Key": source + name}
                ),
                missing,
            )
            list(deleted)
            list(copied)

    def restore(self, state: str) -> None:
        self._become(self.prefix, f"{self.folder.name}/states/{state}/", anew=state in FRESH)

    def save(self, state: str) -> None:
        self._become(f"{self.folder.name}/states/{state}/", self.prefix)

    def put(self, path: Path, name: str) -> None:
        self.client.put_object(Bucket=BUCKET, Key=self.prefix + name, Body=path.read_bytes())

    def watched(self, **strike: Any) -> Watched:
        return Watched(self.endpoint, **strike)


def altered(source: Path, path: Path, seed: str) -> Path:
    """A generated catalogue with more titles changed, items gone and items added: every bucket has work."""
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


def _corrected(*buckets: int) -> dict[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    return {FIRST: (("corrected", buckets),)}


NIGHT = ("site", "run", "--ds", SECOND)
LATE = ("late", "run", "--ds", SECOND)
OPERATIONS = [
    Operation("night", "base", (NIGHT,)),
    Operation(
        "backfill of a bucket",
        "corrected",
        (("site", "backfill", "--ds", FIRST, "--bucket", "2"),),
        holds=_corrected(2),
    ),
    Operation("backfill of a day", "base", (("site", "backfill", "--ds", BEFORE),)),
    Operation("release of a night", "prepared", (("site", "@release", "plan:night"),), steps=True),
    Operation(
        "release of a backfill",
        "buckets prepared",
        (("site", "@release", "plan:bucket 2"),),
        steps=True,
        holds=_corrected(2),
    ),
    Operation("roll-back", "two nights", (("site", "rollback", "plan:first release"),), steps=True),
    Operation(
        "vacuum", "crowded", (("vacuum", "vacuum"),), steps=True, removes=True, holds={FIRST: (("corrected", ()),)}
    ),
    Operation("one plan twice", "base", (NIGHT, NIGHT), orders=((0,),)),
    Operation(
        "two catalogues of a day",
        "base",
        (NIGHT, LATE),
        orders=((1,), (0, 1)),
        last=1,
        superseded=True,
        holds={SECOND: (("late", ()),)},
    ),
    Operation(
        "backfills of two buckets",
        "corrected",
        tuple(("site", "backfill", "--ds", FIRST, "--bucket", bucket) for bucket in ("1", "3")),
        orders=((0, 1), (1, 0)),
        holds=_corrected(1, 3),
    ),
    Operation(
        "night and backfill",
        "corrected",
        (NIGHT, ("site", "backfill", "--ds", FIRST, "--bucket", "0")),
        orders=((0, 1), (1, 0)),
        holds=_corrected(0),
    ),
    Operation(
        "one plan released twice", "prepared", (("site", "@release", "plan:night"),) * 2, orders=((0,),), steps=True
    ),
    Operation(
        "two plans of a day released",
        "both prepared",
        (("site", "@release", "plan:night"), ("late", "@release", "plan:late")),
        orders=((0,), (1,)),
        steps=True,
        superseded=True,
        holds={SECOND: ((SECOND, ()), ("late", ()))},
    ),
    Operation(
        "three buckets released",
        "buckets prepared",
        tuple(("site", "@release", f"plan:bucket {bucket}") for bucket in ("1", "2", "3")),
        orders=((0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)),
        steps=True,
        holds=_corrected(1, 2, 3),
    ),
    Operation(
        "vacuum and release",
        "retired",
        (("careful", "vacuum"), ("site", "@release", "plan:next night")),
        orders=((0, 1), (1, 0)),
        steps=True,
        holds={FIRST: (("corrected", ()),)},
    ),
]
