"""Kinds of trials, their schedule, and the table of their results."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """A kind of trial: fault, store, operations, and the number of such trials in 200."""

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
    """One trial and its result."""

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
    """Return kind and operation of every trial, in proportion to the weights, each kind at least once if possible."""
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


SUMS = {
    "struck": "struck",
    "retries": "retries",
    "not ended": "unended",
    "lost items": "lost",
    "duplicate ids": "duplicates",
    "torn or mixed reads": "torn",
    "failed verifies": "failed_verifies",
    "unequal tables": "unequal",
    "doubled releases": "doubled",
    "unclear failures": "unclear",
    "rows compared bit for bit": "rows",
    "reads": "reads",
    "seconds": "seconds",
}


def table(done: Sequence[Trial]) -> str:
    """Return the results by kind as a Markdown table."""

    def cells(found: Sequence[Trial]) -> list[str]:
        sums = [round(sum(getattr(trial, name) for trial in found)) for name in SUMS.values()]
        return [f"{number:,}" for number in (len(found), *sums)]

    rows = [["fault", "store", "trials", *SUMS]]
    for kind in KINDS:
        if found := [t for t in done if (t.fault, t.store) == (kind.fault, kind.store)]:
            rows.append([kind.fault, kind.store, *cells(found)])
    rows.append(["all", "", *cells(done)])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        " | ".join(
            cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = " | ".join("-" * w if n < 2 else "-" * (w - 1) + ":" for n, w in enumerate(widths))
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])
