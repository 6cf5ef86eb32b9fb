"""Encoders for the tasks of mteb, one per layer of a backbone; each text goes through the model once.

The module imports the optional package mteb at the first use of a task.
"""

import importlib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from marc_pipeline.config import EncodeSettings, TrainSettings
from marc_pipeline.errors import PipelineError, Unencodable, UserError
from marc_pipeline.layers.state_cache import StateCache
from marc_pipeline.model.backbone import PACKAGE, PooledLayers, blocks, load_backbone
from marc_pipeline.model.device import choose_device, choose_dtype
from marc_pipeline.model.encoder import Encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.training.states import TEXTS_AT_ONCE, cutting_tokenizer

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask
    from mteb.models.model_meta import ModelMeta
    from mteb.results import TaskResult
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

# The tasks of Skean et al., "Layer by Layer: Uncovering Hidden Representations in Language Models", ICML 2025 (arXiv
# 2502.02013): the tasks of MTEB's English benchmark, without retrieval and without whole paragraphs.
PAPER_TASKS = (
    "AmazonCounterfactualClassification", "AmazonReviewsClassification", "ArxivClusteringS2S", "AskUbuntuDupQuestions",
    "BIOSSES", "Banking77Classification", "BiorxivClusteringS2S", "EmotionClassification", "MTOPDomainClassification",
    "MTOPIntentClassification", "MassiveIntentClassification", "MassiveScenarioClassification", "MedrxivClusteringS2S",
    "MindSmallReranking", "RedditClustering", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STS17",
    "STSBenchmark", "SciDocsRR", "SprintDuplicateQuestions", "StackExchangeClustering", "StackOverflowDupQuestions",
    "ToxicConversationsClassification", "TweetSentimentExtractionClassification", "TwentyNewsgroupsClustering",
    "TwitterSemEval2015", "TwitterURLCorpus",
)  # fmt: skip
# Tasks are looked up here first: a benchmark selects the languages and splits of its tasks.
BENCHMARKS = ("MTEB(eng, v1)", "MTEB(eng, v2)")
INSTALL = "the tasks of MTEB need the package mteb: pip install 'marc-pipeline[mteb]'"
FINGERPRINT_CHARS = 10
# Keys of a model's configuration that describe the machine or the file, not the model.
NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}

log = logging.getLogger(__name__)


class EveryLayer:
    """A backbone that computes the pooled states of all layers in one pass, once per text.

    Args:
        train: backbone, pooling, max_tokens.
        encode: device, dtype and token budget, as in the nightly runs.
        resources: cores and GPU.
        cache: folder for the states, with a subfolder for each model, pooling, limit and dtype.

    Attributes:
        layers: number of blocks of the backbone; layer 0 is the input of the first block.
        name: name of the model for mteb, ORGANISATION/MODEL.
        variant: the other inputs of the vectors: pooling, limit, dtype, and a fingerprint of weights and tokenizer.
        computed: number of texts that went through the model so far.

    Raises:
        UserError: the backbone is unknown, or another process uses the cache.
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
        # Computed before the encoder is made, because the encoder changes the model.
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
        """Release the lock on the cache."""
        self._cache.close()

    def states(self, layer: int, texts: Sequence[str]) -> NDArray[np.float32]:
        """Pooled states [n, width] of texts at a layer; missing texts are computed, for all layers.

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
            UserError: the backbone has no such layer.
        """
        if not 0 <= number <= self.layers:
            raise UserError(f"there is no layer {number}: the backbone has layers 0 (embeddings) to {self.layers}")
        return LayerEncoder(self, number)


class LayerEncoder:
    """The encoder of one layer for mteb (its EncoderProtocol): pooled states of texts, compared by cosine.

    Prompts and instructions are not added, because a backbone is not trained on prompts.
    """

    def __init__(self, every: EveryLayer, number: int) -> None:
        self._every = every
        self.number = number

    @property
    def mteb_model_meta(self) -> "ModelMeta":
        """Name and revision. The revision contains the layer, so results of different layers are kept apart."""
        _mteb()
        from mteb.models.model_meta import ModelMeta, ScoringFunction  # noqa: PLC0415 - mteb is optional

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
        """Return vectors float32 [n, width] of mteb's batches of texts; they do not depend on task, split and prompt.

        Raises:
            UserError: the inputs of the task are not texts.
        """
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise UserError("a language model encodes texts only: name tasks whose inputs are texts")
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
    """ORGANISATION/MODEL, with characters that are allowed in file names."""
    if backbone.startswith(PACKAGE):
        parts = ["package", backbone.removeprefix(PACKAGE).split("/", 1)[0]]
    elif Path(backbone).is_dir():
        parts = ["local", Path(backbone).resolve().name]
    else:
        parts = ["hub", *backbone.strip("/").split("/")][-2:]
    return "/".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part).strip("_") or "model" for part in parts)


def _fingerprint(backbone: "PreTrainedModel", tokenizer: "Tokenizer") -> str:
    """Hash of all inputs of the states: architecture, weights, tokenizer and its limit."""
    config = {key: value for key, value in backbone.config.to_dict().items() if key not in NOT_THE_MODEL}
    parts = [type(backbone).__name__, json.dumps(config, sort_keys=True, default=str), str(tokenizer.to_str())]
    found = xxhash.xxh3_128("\n".join(parts).encode())
    for name, weights in sorted(backbone.state_dict().items()):
        found.update(f"{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
        found.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return str(found.hexdigest())


# Tasks


@dataclass(frozen=True)
class TaskRun:
    """Result of a task at a layer.

    Attributes:
        layer: None if the task was skipped at every layer.
        score: the main score of the task; None if it was skipped.
        skipped: the reason; empty if there is a score.
    """

    task: str
    layer: int | None
    score: float | None
    skipped: str = ""


def find_tasks(names: Sequence[str]) -> "list[AbsTask]":
    """Return tasks by name; tasks of MTEB's English benchmark with its languages and splits.

    Raises:
        UserError: mteb has no such task, or it is not installed.
    """
    mteb = _mteb()
    known = {task.metadata.name: task for name in reversed(BENCHMARKS) for task in mteb.get_benchmark(name).tasks}
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(known.get(name) or mteb.get_task(name))
        except (KeyError, ValueError):
            raise UserError(f"mteb has no task {name!r}") from None
    return found


def run_tasks(every: EveryLayer, tasks: "Sequence[AbsTask]", layers: Sequence[int], results: Path) -> Iterator[TaskRun]:
    """Run tasks at layers with the evaluator of mteb; existing results are not computed again.

    The data of a task is loaded once for all layers. A task is skipped, with its reason, if its data cannot be loaded
    or if it fails on its texts.

    Args:
        every: the backbone.
        tasks: from :func:`find_tasks`, or other tasks of mteb.
        layers: numbers of layers.
        results: folder for the result files of mteb: ``results/MODEL/layer-…/TASK.json`` below it.

    Yields:
        The result of each task, layer by layer.

    Raises:
        UserError: no task could be run, a layer does not exist, or mteb is not installed.
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
        raise UserError(f"no task could be run; {reasons[0] if reasons else 'name at least one'}")


def _run_task(mteb: Any, cache: Any, task: "AbsTask", encoders: "Sequence[LayerEncoder]") -> Iterator[TaskRun]:  # noqa: ANN401 - mteb is optional
    name = str(task.metadata.name)
    was_loaded = task.data_loaded
    if any(_is_unfinished(cache, task, encoder.mteb_model_meta) for encoder in encoders):
        try:
            with _quiet():
                task.load_data()
        except Exception as error:  # libraries raise many types without network, file or access
            log.debug("%s: cannot load its data", name, exc_info=True)
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
    """Whether the result of a layer is missing or incomplete; a damaged file of a killed process is deleted."""
    path: Path = cache.get_task_result_path(task.metadata.name, meta)
    if not path.is_file():
        return True
    try:
        found = cache.load_task_result(task.metadata.name, meta)
    except ValueError:
        log.warning("%s is incomplete: deleted, its task runs again", path)
        path.unlink()
        return True
    return bool(found.get_missing_evaluations(task))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress mteb's advice to use a newer task, because published results exist for the older one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The task '.*' is superseded by", category=UserWarning)
        yield


def _first_line(error: BaseException) -> str:
    message = str(error).strip()
    first = message.splitlines()[0] if message else type(error).__name__
    return first if isinstance(error, PipelineError) else f"{type(error).__name__}: {first}"


def _mteb() -> Any:  # noqa: ANN401 - mteb is optional, also for the type checker
    """Import the package mteb.

    Raises:
        UserError: mteb is not installed.
    """
    try:
        return importlib.import_module("mteb")
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise UserError(INSTALL) from None
