"""The processes of a campaign: those that stay, those that are killed, and what is left of them."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
PROC = Path("/proc")
MARC = "from marc_pipeline.cli.app import main; main()"


class Overdue(Exception):
    """A process did not answer in time."""


@dataclass(frozen=True)
class Ended:
    """How an attempt at a command ended: exit code (negative: a signal; None: it had to be ended), and what it said."""

    code: int | None
    said: str


class Host:
    """A child that stays, asked and answering by JSON lines.

    Args:
        script: beside this file.
        arguments: of the script.
        env: whole environment.
        log: gets the standard error.
    """

    def __init__(self, script: str, *arguments: str, env: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=dict(env),
                text=True,
                start_new_session=True,
            )
        self.log = log
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            Overdue: none came; the host is of no use any more.
        """
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise Overdue(f"no answer in {seconds:.0f} s; see {self.log}") from None
        if line is None:
            raise Overdue(f"the process has ended; see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        end_session(self.pid)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WarmAttempt:
    """A command in a host's Spark session; it cannot be killed alone."""

    def __init__(self, host: Host, arguments: Sequence[str]) -> None:
        self.host = host
        self._done: Ended | None = None
        host.send(arguments=list(arguments))

    @property
    def running(self) -> bool:
        return self._done is None and self.host._answers.empty()

    def wait(self, seconds: float) -> Ended:
        if self._done is None:
            answer = self.host.receive(seconds)
            self._done = Ended(answer["code"], answer["said"])
        return self._done

    def kill(self) -> None:
        raise NotImplementedError("a host is not killed")


class ForkAttempt:
    """A command in a child of a host's own."""

    def __init__(self, host: Host, arguments: Sequence[str], output: Path) -> None:
        self.host, self._output = host, output
        self._done: Ended | None = None
        host.send(arguments=list(arguments), output=str(output))
        self.pid: int = host.receive(30)["pid"]

    @property
    def running(self) -> bool:
        return self._done is None and self.host._answers.empty()

    def wait(self, seconds: float) -> Ended:
        if self._done is None:
            try:
                code = self.host.receive(seconds)["code"]
            except Overdue:
                self.kill()
                self.host.receive(30)
                code = None
            self._done = Ended(code, self._output.read_text(errors="replace"))
        return self._done

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class ColdAttempt:
    """``marc`` as its users call it: a process with its own JVM, both in one process group."""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], output: Path) -> None:
        self._output = output
        self._done: Ended | None = None
        with output.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", MARC, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=dict(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float) -> Ended:
        if self._done is None:
            code: int | None
            try:
                code = self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
                self._process.wait()
                code = None
            self._done = Ended(code, self._output.read_text(errors="replace"))
        return self._done

    def kill(self) -> None:
        """Driver and JVM at once; their Python workers find out by themselves, as they would on a cluster."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


Attempt = WarmAttempt | ForkAttempt | ColdAttempt


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    command: str


def processes() -> Iterator[Process]:
    """Every process that is not a zombie."""
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError, ValueError):
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state != "Z":
                yield Process(int(folder.name), int(parent), int(session), command)


def python_workers(session: int) -> list[int]:
    """Python workers of Spark in a session: the children of ``pyspark.daemon``."""
    found = [p for p in processes() if p.session == session and "pyspark.daemon" in p.command]
    daemons = {p.pid for p in found}
    return sorted(p.pid for p in found if p.parent in daemons)


def executors(session: int) -> list[int]:
    """JVMs of executors in a session."""
    return sorted(
        p.pid
        for p in processes()
        if p.session == session and "CoarseGrainedExecutorBackend" in p.command and "java" in p.command.split(" ")[0]
    )


def end_session(session: int, *, patience: float = 0.0) -> int:
    """Wait for the processes of a session to go, then end what stays; how many that were."""
    deadline = time.monotonic() + patience
    while left := [p.pid for p in processes() if p.session == session]:
        if time.monotonic() > deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return len(left)
        time.sleep(0.05)
    return 0
