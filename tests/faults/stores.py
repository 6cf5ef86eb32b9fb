"""Trial sites on their stores: a local folder and an S3 server."""

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tree_events import TreeEvents
from trial_site import TrialSite

from faulty_proxy import PASSED, RESET, FaultyProxy
from marc_schemas.identity import plan_key
from s3_server import client_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOM = 1 << 30
BUCKET = "marc-faults"
COPIES_AT_ONCE = 8
# By state, the plan whose files must look newly written.
FRESH = {"retired": "next night"}


class LocalSite(TrialSite):
    """A site in a folder; with root rights, on its own file system of adjustable size."""

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
    """A proxy that strikes at one request; half of these requests pass."""

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


class S3Site(TrialSite):
    """A site on a real S3 server of this machine."""

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
