"""The sweep over all layers: a part of the sample in one process, and the sum of all parts.

Nothing grows with the number of texts: a block of them goes through the model, is added to the moments of every layer,
and is forgotten. A part that is done lies in the work area; a sweep that was killed goes on with those that are not.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.config import EncodeSettings, LayerSettings, TrainSettings
from pipeline.errors import Unencodable, UserError
from pipeline.model.backbone import blocks, load_backbone, load_tokenizer
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
IMAGES_AT_ONCE = 16

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

    def __init__(self, part: SweepPart, device: torch.device, dtype: torch.dtype) -> None:
        train, layers = part.train, part.layers
        backbone = load_backbone(train.backbone, dtype=dtype)
        tokenizer, max_tokens = cutting_tokenizer(backbone, train)
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
            token_budget=part.encode.token_budget,
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
        # Where all failed there is nothing that tells a vector's shape.
        shape = (len(texts), self.facts["layers"] + 1, self.facts["width"] + len(TOKEN_FIGURES))
        return encoded.vectors if len(encoded.failed) < len(texts) else np.zeros(shape, np.float32)


class Images:
    """Images through a vision model."""

    def __init__(self, part: SweepPart, device: torch.device, dtype: torch.dtype) -> None:
        train, layers = part.train, part.layers
        backbone = load_vision(train.backbone, dtype=dtype)
        self.measured = MeasuredLayers(backbone, train.pooling, order=layers.order)
        self.facts = _facts(backbone, device, dtype, max_tokens=0)
        self._layers = layers
        self._encoder = ImageEncoder(self.measured, load_processor(train.backbone), device=device, dtype=dtype)

    def run(self, inputs: Sequence[str], first: int) -> Swept:
        """All layers of some images and of their views; each is named by its path."""
        wanted = self._layers
        layers, width = self.facts["layers"] + 1, self.facts["width"]
        plain = np.zeros((len(inputs), layers, width + len(TOKEN_FIGURES)), np.float32)
        looked = np.zeros((wanted.views, len(inputs), layers, width), np.float32)
        failed: dict[int, str] = {}
        # A photograph takes a hundred times what is left of it: few of them at a time.
        for start in range(0, len(inputs), IMAGES_AT_ONCE):
            images, broken = read_images([Path(path) for path in inputs[start : start + IMAGES_AT_ONCE]])
            failed.update({start + place: f"{inputs[start + place]}: {why}" for place, why in broken.items()})
            rows = [row for row in range(start, min(start + IMAGES_AT_ONCE, len(inputs))) if row not in failed]
            views: list[list[Image]] = [[] for _ in range(wanted.views)]
            for row, image in zip(rows, images, strict=True):
                made = image_views([image], views=wanted.views, seed=wanted.seed, first=first + row)
                for seen, (view,) in zip(views, made, strict=True):
                    seen.append(view)
            with self.measured.measuring():
                plain[rows], odd = self._encoded(images)
            for seen, space in zip(views, looked, strict=True):
                found, more = self._encoded(seen)
                space[rows], odd = found[..., :width], {**odd, **more}
            failed.update({rows[place]: f"{inputs[rows[place]]}: {why}" for place, why in odd.items()})
        return Swept(plain, looked, failed)

    def _encoded(self, images: Sequence[Image]) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Rows of images [n, L + 1, D + 3]; zeros, and the reason, for those that give NaN or infinity."""
        rows = np.zeros((len(images), self.facts["layers"] + 1, self.facts["width"] + len(TOKEN_FIGURES)), np.float32)
        failed: dict[int, str] = {}
        if not images:
            return rows, failed
        with suppress(Unencodable):
            rows[:] = self._encoder.encode(images)
            return rows, failed
        for place, image in enumerate(images):
            try:
                rows[place] = self._encoder.encode([image])[0]
            except Unencodable as error:
                failed[place] = str(error)
        return rows, failed


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
    # Of the model on a CPU, and of the sums on every machine.
    use_threads(part.encode.threads or resources.cpus)
    subject = _subject(part, resources)
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
    """The metrics of every layer over all parts, which are fetched and added up one after the other.

    Raises:
        UserError: parts were computed in different ways, or no input could be run.
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
        metrics.append({key: float(value) for key, value in asdict(moments.pop(0).figures()).items()})
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
            f"parts of the sweep were computed in different ways, {' and '.join(ways)}: set encode.dtype and "
            f"encode.device, so that all workers do the same, or delete {part.uri}"
        )
    left_out = sum(facts.left_out for facts in found)
    because = next((facts.left_out_because for facts in found if facts.left_out), "")
    inputs = sum(facts.inputs for facts in found)
    if left_out == inputs:
        raise UserError(f"none of {inputs} {'images' if part.images else 'texts'} can be run; the first: {because}")
    return replace(
        first,
        inputs=inputs,
        left_out=left_out,
        left_out_because=because,
        seconds=np.sum([facts.seconds for facts in found], axis=0).tolist(),
    )


def require_kind(backbone: str, *, images: bool) -> None:
    """Refuse a backbone that cannot read the inputs, before anything long begins.

    Raises:
        UserError: it has no tokenizer, or no image processor.
    """
    if images:
        load_processor(backbone)
    else:
        load_tokenizer(backbone)


def _subject(part: SweepPart, resources: TaskResources) -> Texts | Images:
    """The model of a part; the last one is kept, and let go before another is loaded."""
    wanted = (part.train, part.encode, part.layers, part.images, resources)
    if wanted not in _SUBJECTS:
        _SUBJECTS.clear()
        device = choose_device(part.encode, resources)
        _SUBJECTS[wanted] = (Images if part.images else Texts)(part, device, choose_dtype(part.encode, device))
    return _SUBJECTS[wanted]


_SUBJECTS: dict[tuple[object, ...], Texts | Images] = {}


@lru_cache(maxsize=1)
def _sample(storage: Storage, uri: str) -> list[str]:
    with TemporaryDirectory(prefix="marc-sweep-") as name:
        file = Path(name) / SAMPLE
        storage.fetch(join(uri, SAMPLE), file)
        texts: list[str] = pq.read_table(file)[INPUT].to_pylist()
    return texts
