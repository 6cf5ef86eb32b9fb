"""The sweep over all layers: compute the moments of one part of the sample, and merge all parts to layer metrics.

Memory does not grow with the number of inputs: each block runs through the model, is added to the moments of every
layer, and is dropped. Each finished part is a file in the work area, so that a killed sweep resumes with the rest.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from marc_pipeline.config import EncodeSettings, LayerSettings, TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.layers.images import load_processor
from marc_pipeline.layers.measured import TOKEN_FIGURES
from marc_pipeline.layers.moments import LayerMoments
from marc_pipeline.layers.runners import ImageRunner, TextRunner
from marc_pipeline.model.backbone import load_tokenizer
from marc_pipeline.model.device import choose_device, choose_dtype, use_threads
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage, join

SAMPLE = "sample.parquet"
INPUT = "input"
"""Column of the sample: a text, or the path of an image."""


@dataclass(frozen=True)
class SweepPart:
    """Some blocks of a sample; Spark sends it to its Python workers.

    Attributes:
        uri: folder of the sweep and its sample.
        blocks: number, first row and end row (exclusive) of each block.
        images: whether the sample contains paths of images instead of texts.
    """

    storage: Storage
    uri: str
    number: int
    blocks: tuple[tuple[int, int, int], ...]
    train: TrainSettings
    encode: EncodeSettings
    layers: LayerSettings
    images: bool = False

    @property
    def file(self) -> str:
        """Uri of the part's result file."""
        return join(self.uri, "parts", f"{self.number:04d}.safetensors")

    @property
    def inputs(self) -> int:
        """Number of texts or images in the part."""
        return sum(stop - start for _, start, stop in self.blocks)


@dataclass(frozen=True)
class SweepFacts:
    """Facts of a sweep, or of one part of it, beside the moments.

    Attributes:
        weights_bytes: size of the model truncated after 0, 1, … L blocks.
        inputs: number of inputs, including left-out ones.
        left_out: inputs that the model could not process.
        left_out_because: reason for the first of them.
        seconds: time of all inputs in the embeddings, and in each block.
    """

    layers: int
    width: int
    max_tokens: int
    dtype: str
    device: str
    weights_bytes: list[int]
    inputs: int
    left_out: int
    left_out_because: str
    seconds: list[float]


def run_part(part: SweepPart, resources: TaskResources) -> int:
    """Compute the moments of a part and write them to its file, unless the file exists; return its number of inputs."""
    if part.storage.stat(part.file) is not None:
        return part.inputs
    # The threads run the model on a CPU, and the sums on every machine.
    use_threads(part.encode.threads or resources.cpus)
    runner = _runner(part, resources)
    inputs = _sample(part.storage, part.uri)
    facts, before = runner.facts, runner.measured.seconds()
    width, settings = facts["width"], part.layers
    moments = [
        LayerMoments(width, order=settings.order, temperature=settings.temperature, seed=settings.seed)
        for _ in range(facts["layers"] + 1)
    ]
    failed: list[str] = []
    for number, start, stop in part.blocks:
        states = runner.run(inputs[start:stop], start)
        failed += states.failed.values()
        kept = np.setdiff1d(np.arange(stop - start), list(states.failed))
        for layer, found in enumerate(moments):
            plain = torch.from_numpy(states.plain[kept, layer])  # [n, D + 3]
            views = torch.from_numpy(states.views[:, kept, layer]).transpose(0, 1)  # [n, q, D]
            found.add(plain[:, :width], plain[:, width : width + len(TOKEN_FIGURES)], views, block=number)
    part_facts = SweepFacts(
        **facts,
        inputs=part.inputs,
        left_out=len(failed),
        left_out_because=failed[0] if failed else "",
        seconds=(runner.measured.seconds() - before).tolist(),
    )
    tensors = {f"{layer}.{name}": value for layer, one in enumerate(moments) for name, value in one.tensors().items()}
    with part.storage.staged(part.file) as staged:
        save_file(tensors, staged, metadata={"facts": json.dumps(asdict(part_facts))})
        part.storage.publish(staged, part.file)
    return part.inputs


def merge_parts(parts: Sequence[SweepPart]) -> tuple[SweepFacts, list[dict[str, float]]]:
    """Fetch and merge all parts, one after the other; return the facts and the metrics of every layer.

    Raises:
        UserError: parts differ in dtype or device, or the model could not process any input.
    """
    found: list[SweepFacts] = []
    moments: list[LayerMoments] = []
    with TemporaryDirectory(prefix="marc-sweep-") as name:
        file = Path(name) / "part"
        for part in parts:
            part.storage.fetch(part.file, file)
            with safe_open(file, framework="pt") as opened:
                found.append(SweepFacts(**json.loads(_metadata(opened)["facts"])))
                for layer in range(found[-1].layers + 1):
                    own = _moments(opened, layer)
                    if layer < len(moments):
                        moments[layer].merge(own)
                    else:
                        moments.append(own)
    facts = _summed(found, parts[0])
    metrics = []
    while moments:
        metrics.append(moments.pop(0).figures())
    return facts, metrics


def _metadata(file: Any) -> dict[str, str]:  # noqa: ANN401 - safetensors has no static type for it
    found: dict[str, str] = file.metadata()
    return found


def _moments(file: Any, layer: int) -> LayerMoments:  # noqa: ANN401 - safetensors has no static type for it
    prefix = f"{layer}."
    return LayerMoments.from_tensors(
        {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    )


def _summed(found: Sequence[SweepFacts], part: SweepPart) -> SweepFacts:
    first = found[0]
    ways = sorted({f"{facts.dtype} on {facts.device.partition(':')[0]}" for facts in found})
    if len(ways) > 1:
        raise UserError(
            f"parts of the sweep differ in dtype or device, {' and '.join(ways)}: set encode.dtype and encode.device, "
            f"so that all workers use the same, or delete {part.uri}"
        )
    left_out = sum(facts.left_out for facts in found)
    because = next((facts.left_out_because for facts in found if facts.left_out), "")
    inputs = sum(facts.inputs for facts in found)
    if left_out == inputs:
        raise UserError(f"none of {inputs} {'images' if part.images else 'texts'} can be processed; first: {because}")
    return replace(
        first,
        inputs=inputs,
        left_out=left_out,
        left_out_because=because,
        seconds=np.sum([facts.seconds for facts in found], axis=0).tolist(),
    )


def require_kind(backbone: str, *, images: bool) -> None:
    """Check early that the backbone can read the inputs.

    Raises:
        UserError: the backbone has no tokenizer, or no image processor.
    """
    if images:
        load_processor(backbone)
    else:
        load_tokenizer(backbone)


def _runner(part: SweepPart, resources: TaskResources) -> TextRunner | ImageRunner:
    """Return the runner of a part. The process caches one, and drops it before it loads another model."""
    wanted = (part.train, part.encode, part.layers, part.images, resources)
    if wanted not in _RUNNERS:
        _RUNNERS.clear()
        device = choose_device(part.encode, resources)
        dtype = choose_dtype(part.encode, device)
        _RUNNERS[wanted] = (
            ImageRunner(part.train, part.layers, device=device, dtype=dtype)
            if part.images
            else TextRunner(part.train, part.encode, part.layers, device=device, dtype=dtype)
        )
    return _RUNNERS[wanted]


_RUNNERS: dict[tuple[object, ...], TextRunner | ImageRunner] = {}


@lru_cache(maxsize=1)
def _sample(storage: Storage, uri: str) -> list[str]:
    with TemporaryDirectory(prefix="marc-sweep-") as name:
        file = Path(name) / SAMPLE
        storage.fetch(join(uri, SAMPLE), file)
        texts: list[str] = pq.read_table(file)[INPUT].to_pylist()
    return texts
