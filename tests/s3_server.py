"""A real S3 server for the tests: Ceph's RADOS gateway, from Debian's packages, on this machine only."""

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PACKAGES = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "ceph-common", "curl")
PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "ceph-authtool", "curl")
# Fixed in the script: there is one server per machine at a time.
MONITOR_PORT = 13300
WAIT_S, INSTALL_S = 180, 240


@contextmanager
def running_s3(script: Path, folder: Path) -> Iterator[dict[str, str]]:
    """The environment that clients of a fresh server need; the test is skipped, saying why, where there cannot be one.

    Args:
        script: starts and stops the server.
        folder: does not exist yet; the server's own.
    """
    if not script.is_file():
        pytest.skip(f"{script} is not beside this checkout")
    with (Path(tempfile.gettempdir()) / f"s3-server-{os.getuid()}.lock").open("a+") as lock:
        _wait_for_turn(lock, script)
        _require_programs()
        lock.write(str(folder))
        lock.flush()
        env = {**os.environ, "CEPH_S3_DIR": str(folder), "CEPH_S3_PORT": str(_free_port())}
        started = subprocess.run([str(script), "up"], capture_output=True, text=True, check=False, env=env)
        try:
            assert started.returncode == 0, started.stderr
            yield dict(word.split("=", 1) for word in started.stdout.replace("export", "").split())
        finally:
            _stop(script, str(folder))
            lock.truncate(0)


def client_of(server: dict[str, str]) -> "S3Client":
    """A client that owes nothing to the code under test."""
    import boto3

    return boto3.session.Session(
        server["AWS_ACCESS_KEY_ID"], server["AWS_SECRET_ACCESS_KEY"], region_name=server["AWS_REGION"]
    ).client("s3", endpoint_url=server["AWS_ENDPOINT_URL"])


def _wait_for_turn(lock: TextIO, script: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.seek(0)
            # The run that noted its server here was killed: it holds the lock no longer.
            if left := lock.read():
                _stop(script, left)
                lock.truncate(0)
            with socket.create_server(("127.0.0.1", MONITOR_PORT)):
                return
        except OSError:
            if time.monotonic() > deadline:
                pytest.skip(f"another S3 server has been running on this machine for {WAIT_S} s")
            time.sleep(0.5)


def _stop(script: Path, folder: str) -> None:
    subprocess.run([str(script), "down"], check=False, env={**os.environ, "CEPH_S3_DIR": folder})


def _require_programs() -> None:
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"{', '.join(missing)} not installed (Debian: {' '.join(PACKAGES)}), and not root on Debian")
    install = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(["sh", "-c", install], capture_output=True, text=True, check=True, env=env, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"installing {missing[0]} took more than {INSTALL_S} s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{missing[0]} cannot be installed: {(error.stderr.strip() or 'apt-get failed').splitlines()[-1]}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
