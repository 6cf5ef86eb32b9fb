"""One index, built in a process of its own and measured there: what index_build.py starts, with either Python.

The order comes on standard input, the answer goes to the file that it names: builders print what they like. Only the
packages of the builder that is asked for are imported, before the clock and the memory are read.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Order = dict[str, Any]
Build = Callable[[], dict[str, Any]]


def ours(order: Order) -> Build:
    """The index stage: reads the table's files, builds or patches, measures the recall, publishes with checksums."""
    from marc_pipeline.config import IndexSettings
    from marc_pipeline.index.make import make_index
    from marc_pipeline.storage import Storage
    from marc_schemas.files import PublishedFile
    from marc_schemas.moments import Moments
    from marc_schemas.release import Release

    def build() -> dict[str, Any]:
        receipt = make_index(
            [PublishedFile.model_validate(file) for file in order["files"]],
            base=Release.model_validate(order["base"]) if order["base"] else None,
            storage=Storage(),
            table_uri=order["table_uri"],
            index_uri=order["index_uri"],
            work_uri=order["work_uri"],
            plan_id=order["plan_id"],
            bundle=order["bundle"],
            buckets=order["buckets"],
            moments=Moments.model_validate(order["moments"]),
            dim=order["dim"],
            mantissa_bits=23,
            settings=IndexSettings.model_validate(order["settings"]),
        )
        (file,) = receipt.index.files
        return {
            "factory": receipt.index.factory,
            "path": f"{receipt.index.uri}/{file.path}",
            "changed": receipt.index.build.changed,
            "receipt": receipt.model_dump(mode="json"),
        }

    return build


def autofaiss(order: Order) -> Build:
    """``autofaiss.build_index`` from .npy files to an index file, its tuning and its own measurements included."""
    from autofaiss import build_index  # type: ignore[import-not-found]

    def build() -> dict[str, Any]:
        path = order["path"]
        _, facts = build_index(
            embeddings=order["embeddings"],
            index_path=path,
            index_infos_path=f"{path}.json",
            metric_type="ip",
            verbose=logging.WARNING,
            **order["options"],
        )
        return {"factory": facts["index_key"], "path": path}

    return build


def memory_mb(name: str) -> float:
    """Not getrusage's figure: a process inherits that from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1]) / 1024


def main() -> None:
    order: Order = json.load(sys.stdin)
    build = {"ours": ours, "autofaiss": autofaiss}[order["builder"]](order)
    before, started, used = memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    facts = build()
    measured = {
        "seconds": time.perf_counter() - started,
        "processor": time.process_time() - used,
        "peak_mb": memory_mb("VmHWM") - before,
    }
    answer = {**facts, **measured}
    Path(order["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
