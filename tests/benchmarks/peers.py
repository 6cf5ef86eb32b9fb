"""The encoders that encode.py compares: marc, sentence-transformers, Spark, Ray Data and Daft."""

import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from material import MAX_TOKENS, environment, native_bfloat16
from measuring import CORES
from numpy.typing import NDArray
from torch import nn

from marc_pipeline.config import EncodeSettings, SparkSettings
from marc_pipeline.model.bundle import Bundle
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.session import spark_session
from marc_pipeline.storage import Storage

PART = 1024
DEFAULT, BEST = "sentence-transformers, its default", "sentence-transformers, best batch"
LIBRARY = "sentence_transformers"


@dataclass(frozen=True)
class Encoded:
    """Vectors in the order of the texts.

    Attributes:
        vectors: float32 [n, D].
        padded: tokens that went through the model, with padding; None if unknown.
        seconds: from the first to the last batch, for systems that start their workers in every call.
    """

    vectors: NDArray[np.float32]
    padded: int | None = None
    seconds: float | None = None


Encode = Callable[[list[str]], Encoded]


@dataclass(frozen=True)
class System:
    """One row of the table: ``start`` loads the model, ``needs`` is the package that must be installed."""

    name: str
    start: Callable[[], AbstractContextManager[Encode]]
    needs: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


@dataclass(frozen=True)
class Setting:
    """Data type and batch size of sentence-transformers."""

    dtype: str = "float32"
    batch: int = 32

    def __str__(self) -> str:
        return f"{self.dtype}, batch {self.batch}"


def backbone_folder(bundle: Bundle) -> str:
    return str(Path(bundle.uri) / "backbone")


def part_size(count: int) -> int:
    """Rows per worker call: two parts per core balance the load; large parts need less padding."""
    return max(8, min(PART, -(-count // (2 * CORES))))


@contextmanager
def marc(bundle: Bundle, dtype: str) -> Iterator[Encode]:
    """The encoder as a bucket's worker loads it."""
    load_encoder.cache_clear()
    settings = EncodeSettings.model_validate({"device": "cpu", "dtype": dtype})
    encoder = load_encoder(Storage(), bundle.uri, bundle.version, settings, TaskResources(cpus=CORES))

    def encode(texts: list[str]) -> Encoded:
        found = encoder.encode(texts)
        return Encoded(found.vectors, found.padded_tokens)

    yield encode


def transformer(folder: str, setting: Setting, *, threads: int) -> Any:
    """sentence-transformers with the same weights, mean pooling and token limit."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model_kwargs = {"dtype": getattr(torch, setting.dtype), "attn_implementation": "sdpa"}
    model = SentenceTransformer(folder, device="cpu", model_kwargs=model_kwargs)
    model.max_seq_length = MAX_TOKENS
    return model


@contextmanager
def one_process(folder: str, setting: Setting) -> Iterator[Encode]:
    """sentence-transformers' ``encode`` in this process."""
    model, padded = transformer(folder, setting, threads=CORES), 0

    def count(_module: nn.Module, inputs: tuple[dict[str, torch.Tensor], ...]) -> None:
        nonlocal padded
        padded += inputs[0]["input_ids"].numel()

    model[0].register_forward_pre_hook(count)

    def encode(texts: list[str]) -> Encoded:
        nonlocal padded
        padded = 0
        return Encoded(model.encode(texts, batch_size=setting.batch, show_progress_bar=False), padded)

    yield encode


@contextmanager
def pool(folder: str, setting: Setting) -> Iterator[Encode]:
    """sentence-transformers' ``encode`` with its pool of processes, one thread each."""
    model = transformer(folder, setting, threads=CORES)
    with environment(OMP_NUM_THREADS="1"):
        workers = model.start_multi_process_pool(["cpu"] * CORES)

    def encode(texts: list[str]) -> Encoded:
        return Encoded(model.encode(texts, batch_size=setting.batch, pool=workers, chunk_size=part_size(len(texts))))

    try:
        # A process that is still starting leaves its work to the others: this warm-up is long enough for all.
        encode([f"warm up {number}" for number in range(512)])
        yield encode
    finally:
        model.stop_multi_process_pool(workers)


@contextmanager
def spark(folder: str, setting: Setting) -> Iterator[Encode]:
    """Spark's ``predict_batch_udf`` around sentence-transformers."""
    import pandas as pd
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import ArrayType, FloatType

    def make() -> Callable[[NDArray[Any]], NDArray[np.float32]]:
        model = transformer(folder, setting, threads=1)
        return lambda texts: model.encode(texts.tolist(), batch_size=setting.batch, show_progress_bar=False)

    conf = {"spark.driver.memory": "2g", "spark.sql.execution.arrow.maxRecordsPerBatch": "10000"}
    with (
        environment(TOKENIZERS_PARALLELISM="false"),
        spark_session(SparkSettings(master=f"local[{CORES}]", conf=conf), name="encode benchmark") as session,
    ):
        embed = predict_batch_udf(make, return_type=ArrayType(FloatType()), batch_size=PART)

        def encode(texts: list[str]) -> Encoded:
            frame = pd.DataFrame({"place": range(len(texts)), "text": texts})
            rows = session.createDataFrame(frame).repartition(2 * CORES)
            found = rows.select("place", embed("text").alias("vector")).toPandas().sort_values("place")
            return Encoded(np.stack(found["vector"].to_numpy()).astype(np.float32))

        yield encode


@contextmanager
def ray_data(folder: str, setting: Setting) -> Iterator[Encode]:
    """Ray Data's actors around sentence-transformers; they start in every call."""
    import pyarrow as pa
    import ray
    import ray.data

    class Worker:
        def __init__(self) -> None:
            self.model = transformer(folder, setting, threads=1)

        def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            began = time.monotonic()
            vectors = self.model.encode(batch["text"].tolist(), batch_size=setting.batch, show_progress_bar=False)
            times = np.tile([began, time.monotonic()], (len(vectors), 1))
            return {"place": batch["place"], "vector": vectors, "times": times}

    # Ray gets one core more than the machine has: the actors reserve all others, and moving rows needs one.
    ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # All actors have started before the first batch.
    context.wait_for_min_actors_s = 120

    def encode(texts: list[str]) -> Encoded:
        rows = ray.data.from_arrow(pa.table({"place": np.arange(len(texts)), "text": texts})).repartition(2 * CORES)
        batch_size = part_size(len(texts))
        mapped = rows.map_batches(Worker, batch_size=batch_size, num_cpus=1, concurrency=CORES)
        found = mapped.to_pandas().sort_values("place")
        vectors = np.stack(found["vector"].to_numpy()).astype(np.float32)
        return Encoded(vectors, seconds=float(np.ptp(np.stack(found["times"].to_numpy()))))

    try:
        yield encode
    finally:
        ray.shutdown()


def wait_for_all(folder: str) -> None:
    """Wait in a worker until all workers have started; otherwise the start of one counts as work of another."""
    tempfile.mkstemp(dir=folder)
    limit = time.monotonic() + 60
    while len(os.listdir(folder)) < CORES and time.monotonic() < limit:  # noqa: PTH208 - only their number
        time.sleep(0.01)


@contextmanager
def daft_udf(folder: str, setting: Setting) -> Iterator[Encode]:
    """Daft's class with one process per core around sentence-transformers; they start in every call."""
    import daft

    floats = daft.DataType.list(daft.DataType.float32())
    returned = daft.DataType.struct({"vector": floats, "times": daft.DataType.list(daft.DataType.float64())})

    def encode(texts: list[str]) -> Encoded:
        @daft.cls(max_concurrency=CORES, use_process=True)
        class Worker:
            def __init__(self, place: str) -> None:
                self.model = transformer(folder, setting, threads=1)
                wait_for_all(place)

            @daft.method.batch(return_dtype=returned, batch_size=part_size(len(texts)))
            def embed(self, column: Any) -> Any:
                began = time.monotonic()
                vectors = self.model.encode(column.to_pylist(), batch_size=setting.batch, show_progress_bar=False)
                times = [began, time.monotonic()]
                return [{"vector": vector, "times": times} for vector in vectors]

        rows = daft.from_pydict({"place": list(range(len(texts))), "text": texts})
        with tempfile.TemporaryDirectory() as place:
            found = rows.select(rows["place"], Worker(place).embed(rows["text"]).alias("made")).to_pydict()
        order = np.argsort(found["place"])
        vectors = np.array([made["vector"] for made in found["made"]], dtype=np.float32)[order]
        return Encoded(vectors, seconds=float(np.ptp([made["times"] for made in found["made"]])))

    yield encode


def systems(bundle: Bundle, best: dict[str, Setting], fastest: Setting) -> list[System]:
    """All systems.

    Args:
        bundle: the weights.
        best: the best batch size by dtype.
        fastest: the faster of these settings; the workers of the peers use it.
    """
    folder = backbone_folder(bundle)
    dtypes = [*["bfloat16"] * native_bfloat16(), "float32"]
    single = {f"{DEFAULT} ({Setting()})": Setting()} | {f"{BEST} ({s})": s for s in best.values() if s != Setting()}
    around: dict[str, tuple[Callable[[str, Setting], AbstractContextManager[Encode]], str]] = {
        f"sentence-transformers, pool of {CORES} processes": (pool, LIBRARY),
        f"Spark predict_batch_udf, local[{CORES}]": (spark, LIBRARY),
        "Ray Data map_batches": (ray_data, "ray"),
        "Daft class UDF": (daft_udf, "daft"),
    }
    return [
        *(System(f"marc, {dtype}", lambda dtype=dtype: marc(bundle, dtype)) for dtype in dtypes),
        *(
            System(name, lambda setting=setting: one_process(folder, setting), LIBRARY)
            for name, setting in single.items()
        ),
        *(
            System(f"{name} ({fastest})", lambda start=start: start(folder, fastest), needs)
            for name, (start, needs) in around.items()
        ),
    ]
