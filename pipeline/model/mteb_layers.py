"""Every layer of a backbone as an encoder for the tasks of mteb, from one pass over each text.

The package mteb is loaded when its tasks are first wanted; without it the module opens all the same.
"""

import fcntl
import hashlib
import importlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config import EncodeSettings, TrainSettings
from pipeline.errors import PipelineError, Unencodable, UserError
from pipeline.model.backbone import PACKAGE, PooledLayers, blocks, load_backbone
from pipeline.model.encoder import Encoder, choose_device, choose_dtype
from pipeline.model.states import TEXTS_AT_ONCE, cutting_tokenizer
from pipeline.resources import TaskResources

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask
    from mteb.models.model_meta import ModelMeta
    from mteb.results import TaskResult
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

# The tasks of Skean et al., "Layer by Layer: Uncovering Hidden Representations in Language Models", ICML 2025 (arXiv
# 2502.02013): those of MTEB's English benchmark that are neither retrieval nor of whole paragraphs.
PAPER_TASKS = (
    "AmazonCounterfactualClassification", "AmazonReviewsClassification", "ArxivClusteringS2S", "AskUbuntuDupQuestions",
    "BIOSSES", "Banking77Classification", "BiorxivClusteringS2S", "EmotionClassification", "MTOPDomainClassification",
    "MTOPIntentClassification", "MassiveIntentClassification", "MassiveScenarioClassification", "MedrxivClusteringS2S",
    "MindSmallReranking", "RedditClustering", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STS17",
    "STSBenchmark", "SciDocsRR", "SprintDuplicateQuestions", "StackExchangeClustering", "StackOverflowDupQuestions",
    "ToxicConversationsClassification", "TweetSentimentExtractionClassification", "TwentyNewsgroupsClustering",
    "TwitterSemEval2015", "TwitterURLCorpus",
)  # fmt: skip
# Where tasks are looked up first: a benchmark says which languages and splits of a task it means.
BENCHMARKS = ("MTEB(eng, v1)", "MTEB(eng, v2)")
INSTALL = "the tasks of MTEB need the package mteb: pip install 'marc-pipeline[mteb]'"
DIGEST_BYTES = 16
FINGERPRINT_CHARS = 10
# What a configuration says of the machine and the file, not of the model.
NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}

log = logging.getLogger(__name__)


# States


class StateCache:
    """Pooled states of texts at every layer, in files that only grow; usable after a process that was killed.

    ``layer-NNN.f32`` holds float32 rows of one layer, ``index`` the digests of their texts in the same order. The index
    is written last: rows that it does not name are written again.

    Args:
        folder: is made; one process at a time.
        layers: files.
        width: numbers per row.

    Raises:
        UserError: another process has the folder.
    """

    def __init__(self, folder: Path, *, layers: int, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._row_bytes = 4 * width
        self._width = width
        self._lock = _locked(folder / "lock")
        self._index = folder / "index"
        self._layers = [folder / f"layer-{layer:03}.f32" for layer in range(layers)]
        for path in (self._index, *self._layers):
            path.touch()
        rows = min(
            self._index.stat().st_size // DIGEST_BYTES,
            *(path.stat().st_size // self._row_bytes for path in self._layers),
        )
        # What one file lacks, the others have for nothing.
        os.truncate(self._index, rows * DIGEST_BYTES)
        for path in self._layers:
            os.truncate(path, rows * self._row_bytes)
        digests = self._index.read_bytes()
        self._places = {
            digests[at : at + DIGEST_BYTES]: at // DIGEST_BYTES for at in range(0, len(digests), DIGEST_BYTES)
        }
        self._rows = rows

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.close()

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those texts that there are no states of, each once, in their order."""
        return [text for text in dict.fromkeys(texts) if _digest(text) not in self._places]

    def append(self, texts: Sequence[str], states: NDArray[np.float32]) -> None:
        """Keep the states [n, layers, width] of n texts that are missing."""
        for layer, path in enumerate(self._layers):
            _write_at(path, self._rows * self._row_bytes, np.ascontiguousarray(states[:, layer], "<f4").tobytes())
        digests = [_digest(text) for text in texts]
        _write_at(self._index, self._rows * DIGEST_BYTES, b"".join(digests))
        self._places.update((digest, self._rows + row) for row, digest in enumerate(digests))
        self._rows += len(digests)

    def read(self, layer: int, texts: Sequence[str]) -> NDArray[np.float32]:
        """States [n, width] of texts that are there, in their order."""
        places = np.array([self._places[_digest(text)] for text in texts], np.int64)
        if not len(places):
            return np.empty((0, self._width), np.float32)
        rows = np.memmap(self._layers[layer], dtype="<f4", mode="r", shape=(self._rows, self._width))
        return np.array(rows[places], np.float32)


def _locked(path: Path) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{path.parent} is in use by another process; wait for it, or name another folder") from None
    return file


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Write on top of whatever an earlier try left there, down to the disk."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


class EveryLayer:
    """A backbone whose pooled states of all layers are computed in one pass, once for every text.

    Args:
        train: backbone, pooling, max_tokens.
        encode: device, dtype and token budget, as the nights run the model.
        resources: cores and GPU.
        cache: folder for the states; one below it for each model, pooling, limit and dtype.

    Attributes:
        layers: blocks of the backbone; layer 0 is what the first one gets.
        width: numbers per vector.
        max_tokens: of a text; the rest is cut off.
        name: of the model as mteb wants it, ORGANISATION/MODEL.
        variant: what vectors depend on besides: pooling, limit, dtype, and a fingerprint of weights and tokenizer.
        computed: texts that went through the model so far.

    Raises:
        UserError: unknown backbone, or another process has the cache.
    """

    def __init__(self, train: TrainSettings, *, encode: EncodeSettings, resources: TaskResources, cache: Path) -> None:
        backbone = load_backbone(train.backbone)
        self.layers, self.width = len(blocks(backbone)[2]), int(backbone.config.hidden_size)
        tokenizer, self.max_tokens = cutting_tokenizer(backbone, train)
        device = choose_device(encode, resources)
        dtype = choose_dtype(encode, device)
        if device.type == "cpu":
            torch.set_num_threads(encode.threads or resources.cpus)
        self.name = _mteb_name(train.backbone)
        # Before the encoder, which alters the model.
        mark = _fingerprint(backbone, tokenizer)[:FINGERPRINT_CHARS]
        self.variant = f"{train.pooling}-{self.max_tokens}-{str(dtype).removeprefix('torch.')}-{mark}"
        self.computed = 0
        self._encoder = Encoder(
            PooledLayers(backbone, train.pooling),
            tokenizer,
            head=torch.nn.Identity(),
            device=device,
            dtype=dtype,
            token_budget=encode.token_budget,
        )
        folder = cache / f"{self.name.replace('/', '__')}-{self.variant}"
        self._cache = StateCache(folder, layers=self.layers + 1, width=self.width)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the cache."""
        self._cache.close()

    def states(self, layer: int, texts: Sequence[str]) -> NDArray[np.float32]:
        """Pooled states [n, width] of texts at a layer; what is not cached is computed, for all layers.

        Raises:
            Unencodable: a text cannot be encoded.
        """
        missing = self._cache.missing(texts)
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            part = missing[start : start + TEXTS_AT_ONCE]
            self._cache.append(part, self._encoder.encode(part).vectors)
            self.computed += len(part)
            log.info("states: %s of %s new texts", f"{start + len(part):,}", f"{len(missing):,}")
        return self._cache.read(layer, texts)

    def layer(self, number: int) -> "LayerEncoder":
        """The encoder of one layer.

        Raises:
            UserError: there is no such layer.
        """
        if not 0 <= number <= self.layers:
            raise UserError(f"layer {number} is wanted, the backbone has 0 (its embeddings) to {self.layers}")
        return LayerEncoder(self, number)


class LayerEncoder:
    """One layer as mteb's EncoderProtocol has it: texts in, pooled states out, compared by their cosine.

    Prompts and instructions are not added: a backbone knows none.
    """

    def __init__(self, every: EveryLayer, number: int) -> None:
        self._every = every
        self.number = number

    @property
    def mteb_model_meta(self) -> "ModelMeta":
        """Name and revision; the revision tells the layer, so that results of different layers never mix."""
        _mteb()
        from mteb.models.model_meta import ModelMeta, ScoringFunction  # noqa: PLC0415 - only who runs tasks has it

        facts: dict[str, Any] = {
            "name": self._every.name,
            "revision": f"layer-{self.number}-{self._every.variant}",
            "max_tokens": float(self._every.max_tokens),
            "embed_dim": self._every.width,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch"],
            "use_instructions": False,
        }
        return ModelMeta.create_empty(facts)

    def encode(self, inputs: Iterable[Any], **_: object) -> NDArray[np.float32]:
        """Vectors float32 [n, width] of batches of texts, in their order.

        Args:
            inputs: mteb's DataLoader; every batch has its texts under ``text``.
            _: what mteb says of task, split and prompt; vectors do not depend on it.

        Raises:
            UserError: the task is not one of texts.
        """
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise UserError("a language model encodes tasks of texts only")
            texts += batch["text"]
        return self._every.states(self.number, texts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:  # noqa: ANN401 - arrays or tensors
        """Cosines [n, m] of n with m vectors."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:  # noqa: ANN401
        """Cosine [n] of each vector with the other at its place."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)


def _unit(vectors: Any) -> Tensor:  # noqa: ANN401
    rows = torch.as_tensor(vectors).float()
    return functional.normalize(rows[None] if rows.ndim == 1 else rows, dim=-1)


def _mteb_name(backbone: str) -> str:
    """ORGANISATION/MODEL, of characters that a file's name may have."""
    if backbone.startswith(PACKAGE):
        parts = ["package", backbone.removeprefix(PACKAGE).split("/", 1)[0]]
    elif Path(backbone).is_dir():
        parts = ["local", Path(backbone).resolve().name]
    else:
        parts = ["hub", *backbone.strip("/").split("/")][-2:]
    return "/".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part).strip("_") or "model" for part in parts)


def _fingerprint(backbone: "PreTrainedModel", tokenizer: "Tokenizer") -> str:
    """Of everything that states depend on: architecture, weights, tokenizer and its limit."""
    config = {key: value for key, value in backbone.config.to_dict().items() if key not in NOT_THE_MODEL}
    said = [type(backbone).__name__, json.dumps(config, sort_keys=True, default=str), str(tokenizer.to_str())]
    found = xxhash.xxh3_128("\n".join(said).encode())
    for name, weights in sorted(backbone.state_dict().items()):
        found.update(f"{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
        found.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return str(found.hexdigest())


# Tasks


@dataclass(frozen=True)
class TaskRun:
    """What became of a task.

    Attributes:
        layer: None for a task that was skipped at every layer.
        score: the task's main score; None where it was skipped.
        skipped: why; empty where there is a score.
    """

    task: str
    layer: int | None
    score: float | None
    skipped: str = ""


def find_tasks(names: Sequence[str]) -> "list[AbsTask]":
    """Tasks by name, with the languages and splits of MTEB's English benchmark where it has them.

    Raises:
        UserError: there is no such task, or mteb is not installed.
    """
    mteb = _mteb()
    known = {task.metadata.name: task for name in reversed(BENCHMARKS) for task in mteb.get_benchmark(name).tasks}
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(known.get(name) or mteb.get_task(name))
        except (KeyError, ValueError):
            raise UserError(f"mteb knows no task {name!r}") from None
    return found


def run_tasks(every: EveryLayer, tasks: "Sequence[AbsTask]", layers: Sequence[int], results: Path) -> Iterator[TaskRun]:
    """Run tasks with mteb's own evaluator at layers; results that are there are not computed again.

    The data of a task is loaded once for all layers. A task whose data cannot be loaded, or that fails on its texts,
    is told of and skipped.

    Args:
        every: the backbone.
        tasks: of :func:`find_tasks`, or any others of mteb.
        layers: of the backbone.
        results: folder for mteb's result files: ``results/MODEL/layer-…/TASK.json`` below it.

    Yields:
        What became of each task, layer by layer.

    Raises:
        UserError: nothing could be run; a layer is not there; mteb is not installed.
    """
    mteb = _mteb()
    encoders = [every.layer(layer) for layer in layers]
    cache = mteb.ResultCache(results)
    ran, reasons = 0, []
    for task in tasks:
        for run in _run_task(mteb, cache, task, encoders):
            ran += run.score is not None
            if run.skipped:
                reasons.append(f"{run.task}: {run.skipped}")
            yield run
    if not ran:
        raise UserError(f"no task could be run; {reasons[0] if reasons else 'none was named'}")


def _run_task(mteb: Any, cache: Any, task: "AbsTask", encoders: "Sequence[LayerEncoder]") -> Iterator[TaskRun]:  # noqa: ANN401 - mteb is loaded late
    name = str(task.metadata.name)
    was_loaded = task.data_loaded
    if any(_is_unfinished(cache, task, encoder.mteb_model_meta) for encoder in encoders):
        try:
            with _quiet():
                task.load_data()
        except Exception as error:  # what a library says when there is no network, no file, no access
            log.debug("%s: its data cannot be loaded", name, exc_info=True)
            yield TaskRun(name, None, None, f"its data cannot be loaded: {_first_line(error)}")
            return
    try:
        for encoder in encoders:
            try:
                with _quiet():
                    found = mteb.evaluate(
                        encoder, task, cache=cache, co2_tracker=False, show_progress_bar=False, raise_error=True
                    )
            except (Unencodable, UserError, ValueError) as error:
                log.debug("%s fails at layer %d", name, encoder.number, exc_info=True)
                yield TaskRun(name, encoder.number, None, _first_line(error))
                continue
            results: list[TaskResult] = found.task_results
            yield TaskRun(name, encoder.number, float(results[0].get_score()))
    finally:
        if not was_loaded and task.data_loaded:
            task.unload_data()


def _is_unfinished(cache: Any, task: "AbsTask", meta: "ModelMeta") -> bool:  # noqa: ANN401
    """Whether a layer's result is not there, or not all of it; what a killed process left half written is removed."""
    path: Path = cache.get_task_result_path(task.metadata.name, meta)
    if not path.is_file():
        return True
    try:
        found = cache.load_task_result(task.metadata.name, meta)
    except ValueError:
        log.warning("%s is not whole: removed, its task runs again", path)
        path.unlink()
        return True
    return bool(found.get_missing_evaluations(task))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to take a newer task: these are the ones that others can be compared with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The task '.*' is superseded by", category=UserWarning)
        yield


def _first_line(error: BaseException) -> str:
    said = str(error).strip()
    first = said.splitlines()[0] if said else type(error).__name__
    return first if isinstance(error, PipelineError) else f"{type(error).__name__}: {first}"


def _mteb() -> Any:  # noqa: ANN401 - it may not be there for a type checker either
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("mteb")
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise UserError(INSTALL) from None
