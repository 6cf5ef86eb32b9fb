"""The process table of this machine: Spark's workers and executors, and processes that a killed driver left."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    command: str


def processes() -> Iterator[Process]:
    """Yield every process that is not a zombie."""
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError, ValueError):
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state != "Z":
                yield Process(int(folder.name), int(parent), int(session), command)


def python_workers(session: int) -> list[int]:
    """Return the process ids of Spark's Python workers in a session: the children of ``pyspark.daemon``."""
    found = [p for p in processes() if p.session == session and "pyspark.daemon" in p.command]
    daemons = {p.pid for p in found}
    return sorted(p.pid for p in found if p.parent in daemons)


def executors(session: int) -> list[int]:
    """Return the process ids of executor JVMs in a session."""
    return sorted(
        p.pid
        for p in processes()
        if p.session == session and "CoarseGrainedExecutorBackend" in p.command and "java" in p.command.split(" ")[0]
    )


def end_session(session: int, *, patience: float = 0.0) -> int:
    """Wait for the processes of a session to end, then kill the rest; returns how many were killed."""
    deadline = time.monotonic() + patience
    while left := [p.pid for p in processes() if p.session == session]:
        if time.monotonic() > deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return len(left)
        time.sleep(0.05)
    return 0
