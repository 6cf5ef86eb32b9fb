"""The sweep over all layers: a part of the sample in one process, and the sum of all parts.

Nothing grows with layers × texts: a block of texts goes through the model, is added to the moments of every layer, and
is forgotten. A part that is done lies in the work area; a sweep that was killed goes on with those that are not.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.config import EncodeSettings, LayerSettings, TrainSettings
from pipeline.errors import Unencodable, UserError
from pipeline.model.backbone import blocks, load_backbone
from pipeline.model.encoder import Encoder, choose_device, choose_dtype, use_threads
from pipeline.model.images import ImageEncoder, image_views, load_processor, load_vision, read_images
from pipeline.model.measured import TOKEN_FIGURES, MeasuredLayers, weights_bytes
from pipeline.model.moments import LayerMoments
from pipeline.model.states import cutting_tokenizer
from pipeline.model.tokens import CHARACTERS_PER_TOKEN
from pipeline.model.views import text_views
from pipeline.resources import TaskResources
from pipeline.storage import Storage, join

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = "sample.parquet"
INPUT = "input"
"""Column of the sample: a text, or the path of an image."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepPart:
    """Some blocks of a sample; travels to Spark's Python workers.

    Attributes:
        uri: folder of the sweep, with its sample.
        number: of this part.
        blocks: number, first row and row behind the last one, of each block.
        train: backbone, pooling, max_tokens.
        encode: device, dtype and token budget, as the nights run the model.
        layers: views, order, temperature, seed.
        images: whether the sample holds paths of images instead of texts.
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
        """Where the part leaves what it found."""
        return join(self.uri, "parts", f"{self.number:04d}.safetensors")

    @property
    def inputs(self) -> int:
        """Texts or images of the part."""
        return sum(stop - start for _, start, stop in self.blocks)


@dataclass(frozen=True)
class SweepFacts:
    """What a sweep found out besides the moments; of a part, or of all of them.

    Attributes:
        layers, width, max_tokens, dtype, device: how the model was run.
        weights_bytes: of the model truncated after 0, 1, … L blocks.
        inputs: that went in; left_out: that could not be run, with the reason of the first.
        seconds: of all inputs through the embeddings, and through each block.
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


class Subject(Protocol):
    """A model that is swept, and how its inputs and their views reach it."""

    measured: MeasuredLayers
    facts: dict[str, Any]

    def run(self, inputs: Sequence[str], first: int) -> "Swept":
        """All layers of some inputs, the first of which has that number in the sample."""


@dataclass(frozen=True)
class Swept:
    """What a block of n inputs is to the model.

    Attributes:
        plain: pooled states and token figures [n, L + 1, D + 3].
        views: pooled states [q, n, L + 1, D] of q views.
        failed: reasons, by row, of inputs that could not be run, or whose views could not.
    """

    plain: NDArray[np.float32]
    views: NDArray[np.float32]
    failed: dict[int, str]


class Texts:
    """Texts through a language model, as the nights run it."""

    def __init__(
        self, train: TrainSettings, encode: EncodeSettings, layers: LayerSettings, resources: TaskResources
    ) -> None:
        backbone = load_backbone(train.backbone)
        tokenizer, max_tokens = cutting_tokenizer(backbone, train)
        device = choose_device(encode, resources)
        dtype = choose_dtype(encode, device)
        if device.type == "cpu":
            use_threads(encode.threads or resources.cpus)
        self.measured = MeasuredLayers(backbone, train.pooling, order=layers.order)
        self.facts = _facts(backbone, device, dtype, max_tokens=max_tokens)
        # Characters that noise is put on: of what is cut off nobody sees any.
        self._characters = CHARACTERS_PER_TOKEN * max_tokens
        self._layers = layers
        self._encoder = Encoder(
            self.measured,
            tokenizer,
            head=torch.nn.Identity(),
            device=device,
            dtype=dtype,
            token_budget=encode.token_budget,
        )

    def run(self, inputs: Sequence[str], first: int) -> Swept:
        """All layers of some texts and of their views."""
        wanted = self._layers
        cut = [text[: self._characters] for text in inputs]
        views = text_views(cut, views=wanted.views, seed=wanted.seed, probability=wanted.probability, first=first)
        failed: dict[int, str] = {}
        with self.measured.measuring():
            plain = self._encoded(inputs, failed)
        width = self.facts["width"]
        seen = np.empty((len(views), *plain.shape[:2], width), np.float32)
        for place, texts in enumerate(views):
            seen[place] = self._encoded(texts, failed)[..., :width]
        return Swept(plain, seen, failed)

    def _encoded(self, texts: Sequence[str], failed: dict[int, str]) -> NDArray[np.float32]:
        ((_, encoded),) = self._encoder.stream([(None, texts)])
        failed.update(encoded.failed)
        if len(encoded.failed) == len(texts):
            raise Unencodable(f"none of {len(texts)} texts can be encoded; the first: {encoded.failed[0]}")
        return encoded.vectors


class Images:
    """Images through a vision model."""

    def __init__(
        self, train: TrainSettings, encode: EncodeSettings, layers: LayerSettings, resources: TaskResources
    ) -> None:
        device = choose_device(encode, resources)
        dtype = choose_dtype(encode, device)
        if device.type == "cpu":
            use_threads(encode.threads or resources.cpus)
        backbone = load_vision(train.backbone)
        self.measured = MeasuredLayers(backbone, train.pooling, order=layers.order)
        self.facts = _facts(backbone, device, dtype, max_tokens=0)
        self._layers = layers
        self._encoder = ImageEncoder(self.measured, load_processor(train.backbone), device=device, dtype=dtype)

    def run(self, inputs: Sequence[str], first: int) -> Swept:
        """All layers of some images and of their views; each is named by its path."""
        wanted = self._layers
        images, broken = read_images([Path(path) for path in inputs])
        if not images:
            raise UserError(f"none of {len(inputs)} images can be read; the first: {inputs[0]}: {broken[0]}")
        whole = np.setdiff1d(np.arange(len(inputs)), list(broken))
        views: list[list[Image]] = [[] for _ in range(wanted.views)]
        for place, image in zip(whole.tolist(), images, strict=True):
            made = image_views([image], views=wanted.views, seed=wanted.seed, first=first + place)
            for seen, (view,) in zip(views, made, strict=True):
                seen.append(view)
        with self.measured.measuring():
            found = self._encoder.encode(images)
        plain = np.zeros((len(inputs), *found.shape[1:]), np.float32)
        plain[whole] = found
        width = self.facts["width"]
        looked = np.zeros((wanted.views, *plain.shape[:2], width), np.float32)
        for number, seen in enumerate(views):
            looked[number, whole] = self._encoder.encode(seen)[..., :width]
        return Swept(plain, looked, {place: f"{inputs[place]}: {reason}" for place, reason in broken.items()})


def _facts(backbone: "PreTrainedModel", device: torch.device, dtype: torch.dtype, *, max_tokens: int) -> dict[str, Any]:
    return {
        "layers": len(blocks(backbone)[2]),
        "width": backbone.config.hidden_size,
        "max_tokens": max_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "weights_bytes": weights_bytes(backbone, item_bytes=dtype.itemsize),
    }


def run_part(part: SweepPart, resources: TaskResources) -> int:
    """Sweep a part and leave its moments as a file, unless it lies there; how many inputs it has."""
    if part.storage.stat(part.file) is not None:
        return part.inputs
    subject = _subject(part.train, part.encode, part.layers, resources, images=part.images)
    inputs = _sample(part.storage, part.uri)
    facts, before = subject.facts, subject.measured.seconds()
    width, settings = facts["width"], part.layers
    moments = [
        LayerMoments(width, order=settings.order, temperature=settings.temperature, seed=settings.seed)
        for _ in range(facts["layers"] + 1)
    ]
    failed: list[str] = []
    for number, start, stop in part.blocks:
        swept = subject.run(inputs[start:stop], start)
        failed += swept.failed.values()
        whole = np.setdiff1d(np.arange(stop - start), list(swept.failed))
        for layer, found in enumerate(moments):
            plain = torch.from_numpy(swept.plain[whole, layer])
            views = torch.from_numpy(swept.views[:, whole, layer]).transpose(0, 1)
            found.add(plain[:, :width], plain[:, width : width + len(TOKEN_FIGURES)], views, block=number)
    facts_here = SweepFacts(
        **facts,
        inputs=part.inputs,
        left_out=len(failed),
        left_out_because=failed[0] if failed else "",
        seconds=(subject.measured.seconds() - before).tolist(),
    )
    tensors = {f"{layer}.{name}": value for layer, one in enumerate(moments) for name, value in one.tensors().items()}
    with part.storage.staged(part.file) as staged:
        save_file(tensors, staged, metadata={"facts": json.dumps(asdict(facts_here))})
        part.storage.publish(staged, part.file)
    return part.inputs


def merge_parts(parts: Sequence[SweepPart]) -> tuple[SweepFacts, list[dict[str, float]]]:
    """The metrics of every layer over all parts, layer by layer: one layer's moments are in memory at a time."""
    with TemporaryDirectory(prefix="marc-sweep-") as name:
        files = [Path(name) / f"{part.number}" for part in parts]
        for part, file in zip(parts, files, strict=True):
            part.storage.fetch(part.file, file)
        opened = [safe_open(file, framework="pt") for file in files]
        facts = _summed([SweepFacts(**json.loads(_metadata(file)["facts"])) for file in opened])
        metrics = []
        for layer in range(facts.layers + 1):
            first, *rest = (_moments(file, layer) for file in opened)
            for other in rest:
                first.merge(other)
            metrics.append({key: float(value) for key, value in asdict(first.figures()).items()})
    return facts, metrics


def _metadata(file: Any) -> dict[str, str]:  # noqa: ANN401 - safetensors has no static type for it
    found: dict[str, str] = file.metadata()
    return found


def _moments(file: Any, layer: int) -> LayerMoments:  # noqa: ANN401 - safetensors has no static type for it
    prefix = f"{layer}."
    return LayerMoments.from_tensors(
        {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    )


def _summed(found: Sequence[SweepFacts]) -> SweepFacts:
    first = found[0]
    return SweepFacts(
        **{key: getattr(first, key) for key in ("layers", "width", "max_tokens", "dtype", "device", "weights_bytes")},
        inputs=sum(facts.inputs for facts in found),
        left_out=sum(facts.left_out for facts in found),
        left_out_because=next((facts.left_out_because for facts in found if facts.left_out), ""),
        seconds=np.sum([facts.seconds for facts in found], axis=0).tolist(),
    )


@lru_cache(maxsize=1)
def _subject(
    train: TrainSettings, encode: EncodeSettings, layers: LayerSettings, resources: TaskResources, *, images: bool
) -> Subject:
    return (Images if images else Texts)(train, encode, layers, resources)


@lru_cache(maxsize=1)
def _sample(storage: Storage, uri: str) -> list[str]:
    with TemporaryDirectory(prefix="marc-sweep-") as name:
        file = Path(name) / SAMPLE
        storage.fetch(join(uri, SAMPLE), file)
        texts: list[str] = pq.read_table(file)[INPUT].to_pylist()
    return texts
