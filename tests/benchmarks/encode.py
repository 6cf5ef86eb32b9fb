"""Compare the encoder with other systems: same weights, texts and cores. One table per set of texts.

    python tests/benchmarks/encode.py [--texts both] [--items 2000] [--layers 6,3] [--runs 5] [--only marc,default]
        [--batches 32,64] [--data FOLDER]

One round starts each system in turn, warms it up, measures it on all texts and stops it. No system idles beside
another. The table shows medians of the rounds; the start is measured separately.

sentence-transformers runs with the data type and batch size that were fastest in an earlier pass over the same texts.
Ray and Daft (``pip install 'ray[data]' daft``) take part if they are installed. Every system returns pooled states:
the compressor of the bundle changes nothing. Each vector is compared with the vector that sentence-transformers
computes in float32 for the text alone. "compressed" compares both after a whitened PCA to 64 dimensions, which is
closer to the published vectors and stricter. ``--only`` chooses the systems whose names contain one of the words,
``--layers`` makes one table for each number of layers, ``--batches`` lists the batch sizes to try.
"""

import argparse
import importlib.util
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import numpy as np
import torch
from material import (
    BACKBONE,
    MAX_TOKENS,
    long_tail,
    matrix_rate,
    native_bfloat16,
    netflix,
    plain_bundle,
    quiet,
    sample,
    whole_tokenizer,
)
from measuring import PUBLIC_DATA, options, seconds_of, show, spread, working_folder, write_json
from numpy.typing import NDArray
from peers import DEFAULT, LIBRARY, Setting, System, backbone_folder, one_process, systems
from torch import nn

from marc_pipeline.model.backbone import blocks, load_backbone
from marc_pipeline.model.bundle import Bundle
from marc_pipeline.model.compressor import fit_pca

WARM_UP = 64
COMPRESSED = 64
# Share of the best rate of matrix products; below it, other processes used the cores.
DISTURBED = 0.9
COLUMNS = (
    "|texts/s:,.0f|tokens/s:,.0f|× default:.2f|× best:.2f|padding:.1%|min cosine:.6f|compressed:.6f|spread:.0%"
    "|start s:.1f"
)

Matrix = NDArray[np.float32]


@dataclass
class Measured:
    """The rounds of one system; ``cosine`` and ``compressed`` are the smallest cosines of all rounds."""

    name: str
    start: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    padded: int | None = None
    cosine: float | None = None
    compressed: float | None = None
    missing: str = ""

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    def add_round(self, system: System, texts: list[str], reference: Matrix, compressor: nn.Module | None) -> None:
        """Start the system, warm it up, measure it and stop it."""
        started = monotonic()
        with system.start() as encode:
            encode(texts[:WARM_UP])
            ready = monotonic()
            encoded = encode(texts)
            done = monotonic()
        self.start.append(ready - started)
        self.seconds.append(encoded.seconds or done - ready)
        self.padded = encoded.padded
        self.cosine = min(self.cosine or 1.0, least_cosine(encoded.vectors, reference))
        if compressor is not None:
            with torch.inference_mode():
                pair = [compressor(torch.from_numpy(vectors)).numpy() for vectors in (encoded.vectors, reference)]
            self.compressed = min(self.compressed or 1.0, least_cosine(*pair))


def least_cosine(left: Matrix, right: Matrix) -> float:
    """The smallest cosine between rows of the same number, in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def try_batches(bundle: Bundle, texts: list[str], batches: Sequence[int]) -> dict[Setting, float]:
    """Texts per second of sentence-transformers by dtype and batch size, one pass each."""
    rates = {}
    for dtype in (*["bfloat16"] * native_bfloat16(), "float32"):
        for batch in batches:
            with one_process(backbone_folder(bundle), Setting(dtype, batch)) as encode:
                encode(texts[:WARM_UP])
                rates[Setting(dtype, batch)] = len(texts) / seconds_of(lambda encode=encode: encode(texts))
    return rates


def measure(
    chosen: Sequence[System], texts: list[str], reference: Matrix, runs: int
) -> tuple[list[Measured], list[float]]:
    """All rounds, and the rate of float32 products before each measurement, which other processes lower."""
    results = [Measured(system.name, missing="" if system.installed else "not installed") for system in chosen]
    compressor = fit_pca(reference, dim=COMPRESSED)[0] if len(reference) > 2 * COMPRESSED else None
    before: list[float] = []
    # After Ctrl-C the table shows the finished measurements.
    with suppress(KeyboardInterrupt):
        for _ in range(runs):
            for system, result in zip(chosen, results, strict=True):
                if not result.missing:
                    before.append(matrix_rate(torch.float32, tries=2))
                    result.add_round(system, texts, reference, compressor)
    return results, before


def encoded_alone(bundle: Bundle, texts: list[str]) -> Matrix:
    """Vectors of sentence-transformers in float32, one text per batch: no padding."""
    distinct = sorted(set(texts))
    with one_process(backbone_folder(bundle), Setting(batch=1)) as encode:
        vectors = dict(zip(distinct, encode(distinct).vectors, strict=True))
    return np.stack([vectors[text] for text in texts])


def floating_operations(bundle: Bundle, lengths: Sequence[int]) -> float:
    """FLOP of the model for texts of these lengths: linear layers of its blocks, and attention."""
    model = load_backbone(backbone_folder(bundle))
    stack = blocks(model)[2]
    weights = sum(layer.weight.numel() for layer in stack.modules() if isinstance(layer, nn.Linear))
    # Queries times keys, and their softmax times values, over all heads.
    attention = 4.0 * len(stack) * model.config.hidden_size * sum(length**2 for length in lengths)
    return 2.0 * weights * sum(lengths) + attention


@dataclass(frozen=True)
class Comparison:
    """All figures of one table."""

    texts: str
    layers: int
    items: int
    tokens: int
    flop: float
    rates: dict[str, float]
    batches: dict[str, float]
    systems: list[Measured]
    before: list[float]

    def rate(self, prefix: str) -> float | None:
        """Texts per second of the fastest system whose name begins with the prefix."""
        return max(
            (self.items / s.median for s in self.systems if s.median and s.name.startswith(prefix)), default=None
        )

    def figures(self) -> dict[str, Any]:
        """The figures as JSON holds them."""
        measured = [
            {
                **asdict(system),
                "texts_per_second": system.median and self.items / system.median,
                "tokens_per_second": system.median and self.tokens / system.median,
            }
            for system in self.systems
        ]
        return {**asdict(self), "systems": measured}

    def row(self, system: Measured) -> list[Any]:
        """One row of the table."""
        if system.median is None:
            return [system.name, system.missing]
        rate, default, best = self.items / system.median, self.rate(DEFAULT), self.rate("sentence-transformers")
        times = [rate, self.tokens / system.median, default and rate / default, best and rate / best]
        padding = system.padded and 1 - self.tokens / system.padded
        quality = [padding, system.cosine, system.compressed]
        return [system.name, *times, *quality, spread(system.seconds), median(system.start)]

    def notes(self) -> list[str]:
        """Rates by batch size, the limit of the processor, and a warning if other processes used the cores."""
        lines = []
        if self.batches:
            rates = "; ".join(f"{setting}: {rate:,.0f}" for setting, rate in self.batches.items())
            lines.append(f"sentence-transformers, texts/s by batch size, one pass: {rates}")
        lines.append(f"the model needs {self.flop / self.tokens / 1e6:.1f} MFLOP per token")
        for dtype, most in self.rates.items():
            limit, rate = self.items * most * 1e9 / self.flop, self.rate(f"marc, {dtype}")
            reached = f"; marc reaches {rate / limit:.0%} of it" if rate else ""
            lines.append(f"limit of matrix products, {dtype}: {most:,.0f} GFLOP/s, {limit:,.0f} texts/s{reached}")
        shares = [rate / self.rates["float32"] for rate in self.before]
        if shares and min(shares) < DISTURBED:
            lines.append(
                f"other processes used the cores: before each system, matrix products reached {min(shares):.0%} "
                f"to {median(shares):.0%} of that rate"
            )
        return lines


def compare(bundle: Bundle, name: str, given: argparse.Namespace, rates: dict[str, float]) -> Comparison:
    """Measure the chosen systems on one set of texts."""
    corpus = netflix(given.data)
    texts = sample(corpus, given.items) if name == "netflix" else long_tail(corpus, given.items)
    lengths = [len(one.ids) for one in whole_tokenizer(MAX_TOKENS).encode_batch(texts)]
    found = {Setting(): 0.0}
    # marc and the default of sentence-transformers do not need the best batch size.
    if not all(word and (word in DEFAULT or word.startswith("marc")) for word in given.only.split(",")):
        found = try_batches(bundle, texts, given.batches)
    best = {setting.dtype: setting for setting in sorted(found, key=found.__getitem__)}
    everyone = systems(bundle, best, max(found, key=found.__getitem__))
    chosen = [
        system for system in everyone if any(word.lower() in system.name.lower() for word in given.only.split(","))
    ]
    measured, before = measure(chosen, texts, encoded_alone(bundle, texts), given.runs)
    return Comparison(
        texts=name,
        layers=bundle.card.layers_kept,
        items=len(texts),
        tokens=sum(lengths),
        flop=floating_operations(bundle, lengths),
        rates=rates,
        batches={str(setting): rate for setting, rate in found.items() if rate},
        systems=measured,
        before=before,
    )


def main() -> None:
    given = options(
        __doc__,
        texts=("both", "netflix", "long-tail"),
        items=2000,
        layers=[6],
        runs=5,
        batches=[8, 16, 32, 64, 128, 256],
        only="",
        data=PUBLIC_DATA,
    )
    # A shell that starts the command in the background switches Ctrl-C off.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if importlib.util.find_spec(LIBRARY) is None:
        raise SystemExit("sentence-transformers is the reference; install it: pip install sentence-transformers")
    rates = {dtype: matrix_rate(getattr(torch, dtype)) for dtype in ("float32", *["bfloat16"] * native_bfloat16())}
    found = []
    with working_folder() as folder, quiet():
        for layers in given.layers:
            bundle = plain_bundle(Path(folder), layers)
            for name in ("netflix", "long-tail") if given.texts == "both" else (given.texts,):
                one = compare(bundle, name, given, rates)
                title = f"{one.items:,} texts ({name}), {one.tokens / one.items:.1f} tokens each"
                show(f"{title}; {BACKBONE}, {layers} layers", COLUMNS, map(one.row, one.systems), notes=one.notes())
                found.append(one)
    write_json(given.json, {"max_tokens": MAX_TOKENS, "tables": [one.figures() for one in found]})


if __name__ == "__main__":
    main()
