"""The encoder beside its peers: the same weights, texts and cores, rounds interleaved, in one table per set of texts.

    python tests/benchmarks/encode.py [--texts both] [--items 2000] [--layers 6] [--runs 5] [--only ours,default]

A round starts every system in turn, lets it work on a few texts, measures it on all of them and stops it again, so
that nothing idles beside another. What is shown is the median of the rounds; starting is shown apart.

The peers run sentence-transformers as one would at best: the dtype and the batch size that were fastest in a pass over
the same texts beforehand. Ray and Daft (``pip install 'ray[data]' daft``) take part where they are installed. Every
system gives the pooled states (here our compressor changes nothing), and each text's vector is compared with the one
that sentence-transformers gives in float32 for the text alone; "compressed" is the same after a whitened PCA of 64
numbers, which is nearer to what is published and less forgiving.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from material import (
    BACKBONE,
    CORES,
    MAX_TOKENS,
    add_data,
    cpu,
    environment,
    long_tail,
    matrix_rate,
    native_bfloat16,
    netflix,
    plain_bundle,
    quiet,
    sample,
    whole_tokenizer,
)
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from marc_pipeline.config import EncodeSettings, SparkSettings
from marc_pipeline.model.backbone import blocks, load_backbone
from marc_pipeline.model.bundle import Bundle
from marc_pipeline.model.compressor import fit_pca
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.session import spark_session
from marc_pipeline.storage import Storage

WARM_UP = 64
PART = 1024
COMPRESSED = 64
# Of the best rate of matrix products: below it, something else ran on the cores.
DISTURBED = 0.9
DEFAULT, BEST = "sentence-transformers, its default", "sentence-transformers, best batch"
BATCHES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Answer:
    """Vectors in the order of the texts.

    Attributes:
        vectors: float32 [n, D].
        padded: tokens that went through the model, padding included, where that is known.
        seconds: from the first batch to the last, of systems that start and stop their workers in every call.
    """

    vectors: NDArray[np.float32]
    padded: int | None = None
    seconds: float | None = None


Encode = Callable[[list[str]], Answer]


@dataclass(frozen=True)
class System:
    """One line of the table. ``needs`` is a package; ``start`` loads the model and whatever runs it."""

    name: str
    start: Callable[[], AbstractContextManager[Encode]]
    needs: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


@dataclass(frozen=True)
class Setting:
    """How sentence-transformers is run."""

    dtype: str = "float32"
    batch: int = 32

    def __str__(self) -> str:
        return f"{self.dtype}, batch {self.batch}"


@dataclass
class Measured:
    """What the rounds of one system gave."""

    name: str
    start: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    padded: int | None = None
    cosine: float | None = None
    compressed: float | None = None
    missing: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


# The systems.


@contextmanager
def ours(bundle: Bundle, dtype: str) -> Iterator[Encode]:
    """The encoder as a bucket's worker loads it."""
    load_encoder.cache_clear()
    settings = EncodeSettings.model_validate({"device": "cpu", "dtype": dtype})
    encoder = load_encoder(Storage(), bundle.uri, bundle.version, settings, TaskResources(cpus=CORES))

    def encode(texts: list[str]) -> Answer:
        found = encoder.encode(texts)
        return Answer(found.vectors, found.padded_tokens)

    yield encode


def transformer(folder: str, setting: Setting, *, threads: int) -> Any:
    """sentence-transformers on the same weights: mean pooling, the same limit."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model_kwargs = {"dtype": getattr(torch, setting.dtype), "attn_implementation": "sdpa"}
    model = SentenceTransformer(folder, device="cpu", model_kwargs=model_kwargs)
    model.max_seq_length = MAX_TOKENS
    return model


@contextmanager
def one_process(folder: str, setting: Setting) -> Iterator[Encode]:
    """``encode`` in this process."""
    model, padded = transformer(folder, setting, threads=CORES), 0

    def count(_module: nn.Module, inputs: tuple[dict[str, torch.Tensor], ...]) -> None:
        nonlocal padded
        padded += inputs[0]["input_ids"].numel()

    model[0].register_forward_pre_hook(count)

    def encode(texts: list[str]) -> Answer:
        nonlocal padded
        padded = 0
        return Answer(model.encode(texts, batch_size=setting.batch, show_progress_bar=False), padded)

    yield encode


@contextmanager
def pool(folder: str, setting: Setting) -> Iterator[Encode]:
    """``encode`` with its pool of processes, one thread each."""
    model = transformer(folder, setting, threads=CORES)
    with environment(OMP_NUM_THREADS="1"):
        workers = model.start_multi_process_pool(["cpu"] * CORES)

    def encode(texts: list[str]) -> Answer:
        return Answer(model.encode(texts, batch_size=setting.batch, pool=workers, chunk_size=parts(len(texts))))

    try:
        # Processes that are not up yet leave all work to the first one: enough of it that everybody comes to some.
        encode([f"warm up {number}" for number in range(512)])
        yield encode
    finally:
        model.stop_multi_process_pool(workers)


@contextmanager
def spark(folder: str, setting: Setting) -> Iterator[Encode]:
    """Spark's own way to run a model over a column."""
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

        def encode(texts: list[str]) -> Answer:
            frame = pd.DataFrame({"place": range(len(texts)), "text": texts})
            rows = session.createDataFrame(frame).repartition(2 * CORES)
            found = rows.select("place", embed("text").alias("vector")).toPandas().sort_values("place")
            return Answer(np.stack(found["vector"].to_numpy()).astype(np.float32))

        yield encode


def meet(folder: str) -> None:
    """Wait in a worker until all are there: what begins earlier would count another one's start as work."""
    import tempfile

    tempfile.mkstemp(dir=folder)
    limit = time.monotonic() + 60
    while len(os.listdir(folder)) < CORES and time.monotonic() < limit:  # noqa: PTH208 - only their number
        time.sleep(0.01)


@contextmanager
def ray_data(folder: str, setting: Setting) -> Iterator[Encode]:
    """Ray Data's actors; they are started in every call."""
    import logging

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

    # One core more than there are in its books: the actors hold all others, and moving rows takes one at times.
    ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # All actors are up before the first batch begins.
    context.wait_for_min_actors_s = 120

    def encode(texts: list[str]) -> Answer:
        rows = ray.data.from_arrow(pa.table({"place": np.arange(len(texts)), "text": texts}))
        found = (
            rows.repartition(2 * CORES)
            .map_batches(Worker, batch_size=parts(len(texts)), num_cpus=1, concurrency=CORES)
            .to_pandas()
            .sort_values("place")
        )
        vectors = np.stack(found["vector"].to_numpy()).astype(np.float32)
        return Answer(vectors, seconds=float(np.ptp(np.stack(found["times"].to_numpy()))))

    try:
        yield encode
    finally:
        ray.shutdown()


@contextmanager
def daft_udf(folder: str, setting: Setting) -> Iterator[Encode]:
    """Daft's class with one process per core; they are started in every call."""
    import daft

    floats = daft.DataType.list(daft.DataType.float32())
    returned = daft.DataType.struct({"vector": floats, "times": daft.DataType.list(daft.DataType.float64())})

    def encode(texts: list[str]) -> Answer:
        @daft.cls(max_concurrency=CORES, use_process=True)
        class Worker:
            def __init__(self, place: str) -> None:
                self.model = transformer(folder, setting, threads=1)
                meet(place)

            @daft.method.batch(return_dtype=returned, batch_size=parts(len(texts)))
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
        return Answer(vectors, seconds=float(np.ptp([made["times"] for made in found["made"]])))

    yield encode


def parts(count: int) -> int:
    """Rows that a worker gets at once: large parts pad less, and of two for each core nobody waits long."""
    return max(8, min(PART, -(-count // (2 * CORES))))


def systems(bundle: Bundle, best: dict[str, Setting], fastest: Setting) -> list[System]:
    """All of them.

    Args:
        bundle: the weights.
        best: by dtype, the best batch size.
        fastest: the better one of these: what runs in the peers' workers.
    """
    folder = backbone_folder(bundle)
    native = ["bfloat16"] if native_bfloat16() else []
    found = [System(f"ours, {dtype}", lambda dtype=dtype: ours(bundle, dtype)) for dtype in [*native, "float32"]]
    st = "sentence_transformers"
    found.append(System(f"{DEFAULT} ({Setting()})", lambda: one_process(folder, Setting()), st))
    found += [
        System(f"{BEST} ({setting})", lambda setting=setting: one_process(folder, setting), st)
        for setting in best.values()
        if setting != Setting()
    ]
    found += [
        System(
            f"sentence-transformers, pool of {CORES} processes ({fastest})",
            lambda: pool(folder, fastest),
            st,
        ),
        System(f"Spark predict_batch_udf, local[{CORES}] ({fastest})", lambda: spark(folder, fastest), st),
        System(f"Ray Data map_batches ({fastest})", lambda: ray_data(folder, fastest), "ray"),
        System(f"Daft class UDF ({fastest})", lambda: daft_udf(folder, fastest), "daft"),
    ]
    return found


# The measurement.


def sweep(bundle: Bundle, texts: list[str], batches: Sequence[int]) -> dict[Setting, float]:
    """Texts per second of sentence-transformers by dtype and batch size, one pass each."""
    rates = {}
    for dtype in (*(["bfloat16"] if native_bfloat16() else []), "float32"):
        for batch in batches:
            with one_process(backbone_folder(bundle), Setting(dtype, batch)) as encode:
                encode(texts[:WARM_UP])
                started = time.monotonic()
                encode(texts)
                rates[Setting(dtype, batch)] = len(texts) / (time.monotonic() - started)
    return rates


def measure(
    chosen: Sequence[System], texts: list[str], reference: NDArray[np.float32], runs: int
) -> tuple[list[Measured], list[float]]:
    """Every system in turn, so many times; and the rate of float32 products before each, which others' work lowers."""
    results = {
        system.name: Measured(system.name, missing="" if system.installed else "not installed") for system in chosen
    }
    compressor = fit_pca(reference, dim=COMPRESSED)[0] if len(reference) > 2 * COMPRESSED else None
    before: list[float] = []
    # Who interrupts it gets the table of what was measured until then.
    with suppress(KeyboardInterrupt):
        for _ in range(runs):
            for system in chosen:
                result = results[system.name]
                if not result.missing:
                    before.append(matrix_rate(torch.float32, tries=2))
                    one_round(system, texts, result, reference, compressor)
    return list(results.values()), before


def one_round(
    system: System,
    texts: list[str],
    result: Measured,
    reference: NDArray[np.float32],
    compressor: nn.Module | None,
) -> None:
    """Start, warm up, measure, stop. Quality is the worst of all rounds."""
    started = time.monotonic()
    with system.start() as encode:
        encode(texts[:WARM_UP])
        ready = time.monotonic()
        answer = encode(texts)
        done = time.monotonic()
    result.start.append(ready - started)
    result.seconds.append(answer.seconds or done - ready)
    result.padded = answer.padded
    result.cosine = min(result.cosine or 1.0, worst_cosine(answer.vectors, reference))
    if compressor is not None:
        with torch.inference_mode():
            pair = [compressor(torch.from_numpy(vectors)).numpy() for vectors in (answer.vectors, reference)]
        result.compressed = min(result.compressed or 1.0, worst_cosine(*pair))


def worst_cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """The smallest cosine of a row with the same row of the other, in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def alone(bundle: Bundle, texts: list[str]) -> NDArray[np.float32]:
    """Each text by itself in float32: no padding, no neighbours."""
    distinct = sorted(set(texts))
    with one_process(backbone_folder(bundle), Setting(batch=1)) as encode:
        vectors = dict(zip(distinct, encode(distinct).vectors, strict=True))
    return np.stack([vectors[text] for text in texts])


def arithmetic(bundle: Bundle, lengths: Sequence[int]) -> float:
    """FLOP that the model takes for texts of these lengths: linear layers of its blocks, and attention."""
    model = load_backbone(backbone_folder(bundle))
    stack = blocks(model)[2]
    weights = sum(layer.weight.numel() for layer in stack.modules() if isinstance(layer, nn.Linear))
    # Queries times keys, and their softmax times values, over all heads.
    attention = 4.0 * len(stack) * model.config.hidden_size * sum(length**2 for length in lengths)
    return 2.0 * weights * sum(lengths) + attention


def backbone_folder(bundle: Bundle) -> str:
    return str(Path(bundle.uri) / "backbone")


# The tables.


@dataclass(frozen=True)
class Report:
    """Everything that one table shows."""

    texts: str
    layers: int
    items: int
    tokens: int
    flop: float
    rates: dict[str, float]
    batches: dict[str, float]
    systems: list[Measured]
    before: list[float]

    def rate(self, *starts: str) -> float | None:
        """Texts per second of the fastest system whose name begins so."""
        found = [self.items / s.median for s in self.systems if s.median and s.name.startswith(starts)]
        return max(found, default=None)

    def figures(self) -> dict[str, Any]:
        measured = [
            {
                **asdict(system),
                "texts_per_second": system.median and self.items / system.median,
                "tokens_per_second": system.median and self.tokens / system.median,
            }
            for system in self.systems
        ]
        return {**asdict(self), "systems": measured}


def show(report: Report, console: Console) -> None:
    table = Table(title=title(report), title_justify="left")
    columns = ("texts/s", "tokens/s", "× default", "× best", "padding", "min cosine", "compressed", "spread", "start s")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    default, best = report.rate(DEFAULT), report.rate("sentence-transformers")
    for system in report.systems:
        if system.median is None:
            table.add_row(system.name, system.missing)
            continue
        rate = report.items / system.median
        table.add_row(
            system.name,
            f"{rate:,.0f}",
            f"{report.tokens / system.median:,.0f}",
            number(default and rate / default, ".2f"),
            number(best and rate / best, ".2f"),
            number(system.padded and 1 - report.tokens / system.padded, ".1%"),
            number(system.cosine, ".6f"),
            number(system.compressed, ".6f"),
            f"{(max(system.seconds) - min(system.seconds)) / system.median:.0%}",
            f"{statistics.median(system.start):.1f}",
        )
    console.print(table)
    if report.batches:
        console.print(
            "sentence-transformers, texts/s by batch size, one pass: "
            + "; ".join(f"{setting}: {rate:,.0f}" for setting, rate in report.batches.items())
        )
    console.print(limit(report))
    most = report.rates["float32"]
    if min(report.before) < DISTURBED * most:
        least, middle = (f"{found / most:.0%}" for found in (min(report.before), statistics.median(report.before)))
        console.print(f"others used the cores too: before a system began, they gave {least} to {middle} of that rate")


def title(report: Report) -> str:
    rates = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in report.rates.items())
    return (
        f"{report.items:,} texts ({report.texts}), {report.tokens / report.items:.1f} tokens each; {BACKBONE}, "
        f"{report.layers} layers\n{CORES} cores of {cpu()}, torch {torch.__version__}; matrix products: {rates} GFLOP/s"
    )


def limit(report: Report) -> str:
    """How far ours is from what this CPU multiplies at all."""
    lines = [f"the model takes {report.flop / report.tokens / 1e6:.1f} MFLOP per token"]
    for dtype, most in report.rates.items():
        rate = report.rate(f"ours, {dtype}")
        reached = f", ours reaches {rate * report.flop / report.items / most / 1e9:.0%} of it" if rate else ""
        lines.append(
            f"at {most:,.0f} GFLOP/s ({dtype}) that is {report.items * most * 1e9 / report.flop:,.0f} texts/s{reached}"
        )
    return "; ".join(lines)


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# The command.


def main() -> None:
    arguments = parse()
    # Where a shell starts it in the background, it would not hear of Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if importlib.util.find_spec("sentence_transformers") is None:
        raise SystemExit("the reference is sentence-transformers: pip install sentence-transformers")
    console = Console(width=190)
    rates = {dtype: matrix_rate(getattr(torch, dtype)) for dtype in ("float32", *["bfloat16"] * native_bfloat16())}
    reports = []
    with tempfile.TemporaryDirectory(prefix="encode-benchmark-") as folder, quiet():
        for layers in arguments.layers:
            bundle = plain_bundle(Path(folder), layers)
            for name in ("netflix", "long-tail") if arguments.texts == "both" else (arguments.texts,):
                reports.append(compare(bundle, name, arguments, rates))
                show(reports[-1], console)
    if arguments.json:
        facts = {"cores": CORES, "cpu": cpu(), "torch": torch.__version__, "max_tokens": MAX_TOKENS}
        figures = {**facts, "tables": [report.figures() for report in reports]}
        arguments.json.write_text(json.dumps(figures, indent=1))


def parse() -> argparse.Namespace:
    def numbers(value: str) -> list[int]:
        return [int(one) for one in value.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", choices=("netflix", "long-tail", "both"), default="both")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument(
        "--layers", type=numbers, default=[6], help="truncate the weights, as in 6,3: one table for each"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--batches", type=numbers, default=list(BATCHES), help="sizes that the peers' best is sought in"
    )
    words = lambda value: value.split(",")  # noqa: E731
    parser.add_argument("--only", type=words, default="", help="systems whose names hold one of these words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as well")
    add_data(parser)
    return parser.parse_args()


def compare(bundle: Bundle, name: str, arguments: argparse.Namespace, rates: dict[str, float]) -> Report:
    corpus = netflix(arguments.data)
    texts = sample(corpus, arguments.items) if name == "netflix" else long_tail(corpus, arguments.items)
    lengths = [len(one.ids) for one in whole_tokenizer(MAX_TOKENS).encode_batch(texts)]
    # Who asks for ours and the default alone need not wait for the others' best.
    found = {Setting(): 0.0}
    if not all(word and (word in DEFAULT or word.startswith("ours")) for word in arguments.only):
        found = sweep(bundle, texts, arguments.batches)
    best = {setting.dtype: setting for setting in sorted(found, key=found.__getitem__)}
    everyone = systems(bundle, best, max(found, key=found.__getitem__))
    chosen = [system for system in everyone if any(word.lower() in system.name.lower() for word in arguments.only)]
    measured, before = measure(chosen, texts, alone(bundle, texts), arguments.runs)
    return Report(
        texts=name,
        layers=bundle.card.layers_kept,
        items=len(texts),
        tokens=sum(lengths),
        flop=arithmetic(bundle, lengths),
        rates=rates,
        batches={str(setting): rate for setting, rate in found.items() if rate},
        systems=measured,
        before=before,
    )


if __name__ == "__main__":
    main()
