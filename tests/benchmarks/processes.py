"""Memory and processor time of processes, read from /proc with the standard library only."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SAMPLED_S = 0.1


def memory_mb(name: str) -> float:
    """``VmRSS`` (resident now) or ``VmHWM`` (peak) of this process in MB of 2^20 bytes.

    getrusage is not used: a child process inherits the peak of its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) / 1024


@dataclass
class SparkUsage:
    """Peak resident bytes of the JVM, of its Python workers, and of both and the driver; and processor seconds by id.

    Memory that processes share counts for each of them.
    """

    jvm: int = 0
    workers: int = 0
    total: int = 0
    seconds: dict[int, float] = field(default_factory=dict)

    def sample(self, root: int) -> None:
        """Read all processes below ``root`` once."""
        children: dict[int, list[int]] = {}
        names, sizes, seconds = {}, {}, {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
            except OSError:
                continue
            process, fields = int(entry.name), rest.split()
            children.setdefault(int(fields[1]), []).append(process)
            names[process] = name.rpartition("(")[2]
            sizes[process] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
            seconds[process] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        jvm = workers = 0
        waiting = [(root, False)]
        while waiting:
            process, below_jvm = waiting.pop()
            name = names.get(process, "")
            self.seconds[process] = seconds.get(process, 0.0)
            # Java children of the JVM do not count: a fork is briefly as large as the JVM itself.
            if name == "java" and not below_jvm:
                jvm += sizes[process]
            elif below_jvm and name.startswith("python"):
                workers += sizes[process]
            waiting += [(child, below_jvm or name == "java") for child in children.get(process, [])]
        self.jvm, self.workers = max(self.jvm, jvm), max(self.workers, workers)
        self.total = max(self.total, sizes.get(root, 0) + jvm + workers)


@contextmanager
def watched(root: int) -> Iterator[SparkUsage]:
    """Sample the processes below ``root`` ten times a second."""
    usage, done = SparkUsage(), threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLED_S):
            usage.sample(root)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield usage
    finally:
        done.set()
        watcher.join()
