"""Benchmark scores by layer: reading tables and result folders, and comparing the layers of each model."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_pipeline.errors import UserError
from marc_pipeline.layers.scores import COUNTS, judge_scores, read_scores
from marc_schemas.scores import LayerComparison, LayerScore, ModelCurve, ScoreReport

HEADER = "family,size,layer,task,main_score\n"
Table = dict[tuple[str, str, int, str], float]


@pytest.fixture(scope="session")
def report(published_scores: Path) -> ScoreReport:
    return judge_scores(read_scores([published_scores]))


def scores(layers: dict[int, dict[str, float]], *, family: str = "m", size: str = "") -> list[LayerScore]:
    return [
        LayerScore(family=family, size=size, layer=layer, task=task, score=score)
        for layer, tasks in layers.items()
        for task, score in tasks.items()
    ]


def curve(layers: dict[int, dict[str, float]]) -> ModelCurve:
    (model,) = judge_scores(scores(layers)).models
    return model


def recorded(model: ModelCurve) -> LayerComparison:
    assert model.as_recorded is not None
    return model.as_recorded


# The published table


# Published figures: final and best layer with mean and number of tasks, gain in percent, whether the model is complete.
QUOTED = [
    ("Pythia", "410m", 25, (24, 0.468, 32), (17, 0.519, 32), 10.8, True),
    ("Pythia", "160m", 13, (12, 0.435, 32), (8, 0.470, 32), 8.1, True),
    ("mamba", "370m", 49, (48, 0.336, 32), (16, 0.504, 30), None, False),
    ("mamba", "790m", 35, (29, 0.447, 32), (17, 0.479, 31), None, False),
    ("LLM2Vec-mntp-unsup-simcse", "8B", 32, (32, 0.642, 32), (24, 0.667, 31), 3.8, False),
]


@pytest.mark.parametrize(("family", "size", "layers", "final", "best", "percent", "complete"), QUOTED)
def test_published_figures_are_reproduced(
    report: ScoreReport,
    family: str,
    size: str,
    layers: int,
    final: tuple[int, float, int],
    best: tuple[int, float, int],
    percent: float | None,
    complete: bool,
) -> None:
    (model,) = (model for model in report.models if (model.family, model.size) == (family, size))
    found = model.as_recorded
    assert found is not None
    assert len(model.layers) == layers
    assert (found.final_layer, pytest.approx(found.final, abs=5.1e-4), found.final_tasks) == final
    assert (found.best_layer, pytest.approx(found.best, abs=5.1e-4), found.best_tasks) == best
    assert percent is None or round(found.percent or 0, 1) == pytest.approx(percent, abs=0.051)
    assert model.complete is complete
    # Both comparisons of a complete model are equal.
    assert (model.same_tasks == found) is complete


def test_every_model_equals_a_computation_with_pandas(published_scores: Path, report: ScoreReport) -> None:
    frame = pd.read_csv(published_scores, dtype={"size": str})
    assert [model.name for model in report.models] != sorted(model.name for model in report.models)
    groups = dict(iter(frame.groupby(["family", "size"])))
    assert {(model.family, model.size) for model in report.models} == set(groups)
    assert len(report.tasks) == frame["task"].nunique() == 32
    for model in report.models:
        table = groups[model.family, model.size].pivot(index="layer", columns="task", values="main_score")
        present = table.notna().sum(axis=1)
        assert {mean.layer: mean.tasks for mean in model.layers} == present.to_dict()
        assert {mean.layer: mean.mean for mean in model.layers} == pytest.approx(table.mean(axis=1).to_dict())
        assert model.missing_scores == int(table.isna().sum().sum())
        span = range(int(table.index.min()), int(table.index.max()) + 1)
        assert model.absent_layers == sorted(set(span) - set(table.index))
        assert model.complete == (table.notna().all(axis=None) and len(table) == len(span) > 1)
        counting = table[present >= 15 / 16 * table.shape[1]]
        for found, means in (
            (model.as_recorded, counting.mean(axis=1)),
            (model.same_tasks, counting.dropna(axis=1).mean(axis=1)),
        ):
            if len(counting) < 2:
                assert found is None
                continue
            assert found is not None
            assert (found.best_layer, found.final_layer) == (means.idxmax(), means.index[-1])
            assert (found.best, found.final) == pytest.approx((means.max(), means.iloc[-1]))
            assert found.gain == pytest.approx(means.max() - means.iloc[-1])
            assert found.percent == pytest.approx(100 * (means.max() / means.iloc[-1] - 1))
        assert {w.task: w.layer for w in model.winners} == table.idxmax().to_dict()
        assert {w.task: w.score for w in model.winners} == pytest.approx(table.max().to_dict())
        assert {w.task: w.layers for w in model.winners} == table.notna().sum().to_dict()


def test_which_published_models_are_complete(report: ScoreReport) -> None:
    complete = {f"{model.family} {model.size}" for model in report.models if model.complete}
    assert {"Pythia 14m", "Pythia 70m", "Pythia 160m", "Pythia 410m"} <= complete
    # Three layers without one task each make a model incomplete.
    assert not complete & {"mamba 370m", "mamba 790m", "LLM2Vec-mntp-unsup-simcse 8B", "Pythia 1b", "bert base"}


def test_parquet_gives_the_same_report_as_csv(published_scores: Path, report: ScoreReport, tmp_path: Path) -> None:
    frame = pd.read_csv(published_scores, dtype={"size": str}, float_precision="round_trip")
    frame.sample(frac=1, random_state=1).to_parquet(tmp_path / "scores.parquet")
    assert judge_scores(read_scores([tmp_path / "scores.parquet"])) == report


# LayerComparison


def test_layers_may_start_at_1_and_the_lowest_of_equal_layers_is_best() -> None:
    model = curve({1: {"a": 0.1}, 2: {"a": 0.3}, 3: {"a": 0.2}})
    found = recorded(model)
    assert model.complete
    assert (found.best_layer, found.final_layer, found.layers, found.percent) == (2, 3, 3, pytest.approx(50))
    equal = curve({0: {"a": 0.1}, 1: {"a": 0.3}, 2: {"a": 0.3}})
    assert (recorded(equal).best_layer, equal.winners[0].layer, recorded(equal).gain) == (1, 1, 0)


def test_an_absent_layer_makes_a_model_incomplete() -> None:
    model = curve({0: {"a": 0.1}, 3: {"a": 0.3}})
    assert (model.complete, model.absent_layers, model.partial_layers, model.missing_scores) == (False, [1, 2], [], 0)
    assert recorded(model) == model.same_tasks


def test_a_layer_without_a_hard_task_is_compared_over_shared_tasks() -> None:
    tasks = {f"t{number:02}": 0.5 for number in range(16)}
    easy = {task: 0.5 for task in tasks if task != "t07"}
    model = curve({0: easy, 1: tasks | {"t07": 0.02}, 2: tasks | {"t00": 0.4, "t07": 0.1}})
    found, shared = recorded(model), model.same_tasks
    assert shared is not None
    assert (found.best_layer, found.best_tasks, found.final_tasks) == (0, 15, 16)
    assert (shared.best_tasks, shared.final_tasks, shared.gain) == (15, 15, pytest.approx(0.1 / 15))
    assert [mean.same_tasks_mean for mean in model.layers] == pytest.approx([0.5, 0.5, 7.4 / 15])
    assert (model.partial_layers, model.missing_scores, model.complete) == ([0], 1, False)


def test_a_layer_with_too_few_tasks_is_not_counted() -> None:
    tasks = {f"t{number}": 0.5 for number in range(8)}
    model = curve({0: tasks, 1: {"t0": 0.9}, 2: {"t1": 0.3}, 3: tasks, 4: {"t0": 0.99}})
    found = recorded(model)
    assert (found.layers, found.final_layer, found.best_layer) == (2, 3, 0)
    assert [mean.same_tasks_mean is None for mean in model.layers] == [False, True, True, False, True]
    # The winner of a task may be a layer that is not counted; its gain refers to the final counted layer.
    assert (model.winners[0].layer, model.winners[0].final, model.winners[0].layers) == (4, 0.5, 4)


@pytest.mark.parametrize(
    "layers", [{0: {"a": 0.5}}, {0: {"a": 0.5}, 1: {"b": 0.5}}, {0: {"a": 1.0, "b": 1.0}, 1: {"a": 1.0}}]
)
def test_too_few_scores_give_no_comparison(layers: dict[int, dict[str, float]]) -> None:
    model = curve(layers)
    assert model.as_recorded is model.same_tasks is None
    assert not model.complete


@pytest.mark.parametrize("final", [0.0, -0.2])
def test_a_final_score_of_0_or_less_has_no_percentage(final: float) -> None:
    found = recorded(curve({0: {"a": 0.5}, 1: {"a": final}}))
    assert (found.percent, found.gain) == (None, 0.5 - final)


def test_models_are_ordered_by_family_and_size() -> None:
    sizes = ["8B", "14m", "1.4b", "160m", "", "odd"]
    every = [score for size in sizes for score in scores({0: {"a": 0.1}}, size=size)]
    assert [model.size for model in judge_scores(every).models] == ["14m", "160m", "1.4b", "8B", "", "odd"]
    assert judge_scores([]) == ScoreReport(tasks=[], models=[])


TABLES = st.dictionaries(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["", "1b"]), st.integers(0, 6), st.sampled_from("tuvw")),
    st.floats(-1e9, 1e9),
    min_size=1,
)


def of(table: Table) -> list[LayerScore]:
    return [
        LayerScore(family=family, size=size, layer=layer, task=task, score=score)
        for (family, size, layer, task), score in table.items()
    ]


@given(table=TABLES, seed=st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(table: Table, seed: int) -> None:
    rows = of(table)
    shuffled = random.Random(seed).sample(rows, len(rows))  # noqa: S311
    assert judge_scores(shuffled) == judge_scores(rows)


@given(table=TABLES)
def test_invariants_of_every_report(table: Table) -> None:
    report = judge_scores(of(table))
    assert ScoreReport.model_validate_json(report.model_dump_json()) == report
    assert sum(mean.tasks for model in report.models for mean in model.layers) == len(table)
    for model in report.models:
        size = len(model.tasks) * len(model.layers)
        assert model.missing_scores == size - sum(mean.tasks for mean in model.layers)
        if model.complete:
            assert model.as_recorded == model.same_tasks
            assert not model.absent_layers + model.partial_layers
            assert model.missing_scores == 0
        for found in filter(None, (model.as_recorded, model.same_tasks)):
            assert found.gain == found.best - found.final >= 0
            assert found.best_layer <= found.final_layer
            assert min(found.best_tasks, found.final_tasks) > 0
            assert found.gain == 0 or found.best_layer != found.final_layer
        if model.as_recorded is not None:
            assert min(model.as_recorded.best_tasks, model.as_recorded.final_tasks) >= COUNTS * len(model.tasks)
        for winner in model.winners:
            assert winner.gain is None or winner.gain >= 0
            assert winner.score == max(
                score for key, score in table.items() if key[:2] == (model.family, model.size) and key[3] == winner.task
            )


# Tables


def table_of(folder: Path, text: str | bytes) -> Path:
    path = folder / "scores.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the column family is missing"),
        ("family,size,layer,task,score\na,b,1,t,0.5\n", "the column main_score is missing"),
        ("family,size,layer,task,main_score,task\na,b,1,t,0.5,u\n", "there are two columns task"),
        (HEADER, "the table has no rows"),
        (HEADER + "a,b,1,t,0.5\na,b,2,t,good\n", r"scores.csv, row 2: main_score 'good' is not a number"),
        *(
            (f"{HEADER}a,b,1,t,{score}\n", f"row 1: main_score '{score}' is not a number")
            for score in ("", "nan", "-inf", "1e400", "1e308", "1_0")
        ),
        *(
            (f"{HEADER}a,b,{layer},t,0.5\n", f"row 1: layer '{layer}' is not a whole number from 0 to 99,999")
            for layer in ("1.5", "-1", "9999999999999", "nan", "final")
        ),
        (HEADER + ",b,1,t,0.5\n", "row 1: family is empty"),
        (HEADER + "a,b,1, ,0.5\n", "row 1: task is empty"),
        (HEADER + "a,b,1,t,0.5\n\na,b,1,t\n", "row 2: 4 cells, the header has 5"),
        (HEADER + "a,b,1,t,0.5,6\n", "row 1: 6 cells, the header has 5"),
        (HEADER + "a,b,1,t,0.5\na,b,1,u,0.5\na,b,1.0,t,0.6\n", r"row 3: a b, layer 1, t is given twice, .*, row 1"),
        (HEADER + 'a,b,1,"t\nu",1\na,b,1,"t\nu",1\n', "row 2: a b, layer 1, t u is given twice"),
        (HEADER.encode() + b"a,b,1,t\xff,0.5\n", "not a CSV file in UTF-8"),
        (HEADER + 'a,b,1,"t,0.5\n', "not a CSV file in UTF-8"),
        (HEADER + "a,b,1,t" + "x" * 200_000 + ",0.5\n", "not a CSV file in UTF-8"),
        (HEADER + "a,b,1,t," + "x" * 1000 + "\n", r"main_score 'x{39}… is not a number"),
    ],
)
def test_an_invalid_table_is_refused_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read_scores([table_of(tmp_path, text)])
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_tables_may_have_other_columns_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufefftask, main_score,note,layer,size,family\r\n"a, b",1e-1,x,07,,  m \r\n\r\nü,-.5,y,8.0,,m\r\n'
    found = read_scores([table_of(tmp_path, text)])
    assert [(s.family, s.size, s.layer, s.task, s.score) for s in found] == [
        ("m", "", 7, "a, b", 0.1),
        ("m", "", 8, "ü", -0.5),
    ]


def test_invalid_parquet_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a Parquet file that can be read"):
        read_scores([path])
    columns: dict[str, Any] = {"family": ["a"], "size": ["b"], "task": ["t"]}
    for more, message in (
        ({"layer": [1], "main_score": [None]}, "row 1: main_score None is not a number"),
        ({"layer": [1], "main_score": [True]}, "row 1: main_score True is not a number"),
        ({"main_score": [None]}, "the column layer is missing"),
    ):
        pq.write_table(pa.table(columns | more), path)
        with pytest.raises(UserError, match=message):
            read_scores([path])


def test_missing_files_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_scores([tmp_path / "nothing.csv"])
    (tmp_path / "scores.xlsx").touch()
    with pytest.raises(UserError, match=r"scores are read from \.csv, \.parquet and \.json files"):
        read_scores([tmp_path / "scores.xlsx"])


def test_a_score_in_two_tables_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        table_of(tmp_path / name, HEADER + "a,b,1,t,0.5\n")
    with pytest.raises(UserError, match=r"two/scores.csv, row 1: .* is given twice, first at .*one/scores.csv, row 1"):
        read_scores([tmp_path / "one" / "scores.csv", tmp_path / "two" / "scores.csv"])


@given(rows=st.lists(st.tuples(*[st.text(max_size=4)] * 5), max_size=4), tail=st.binary(max_size=8))
def test_any_table_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("hostile") / "scores.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER.strip().split(","), *rows])
    path.write_bytes(path.read_bytes() + tail)
    try:
        judge_scores(read_scores([path]))
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 - some of the tables are valid


# Result folders


def result(path: Path, *mains: float | None, task: str | None = None, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [{"main_score": main, "hf_subset": f"s{number}", "languages": []} for number, main in enumerate(mains)]
    content = {"task_name": task or path.stem, "mteb_version": "2.26.24", "scores": {"test": entries}, **more}
    path.write_text(json.dumps(content))


def read(folder: Path) -> list[tuple[str, str, int, str, float]]:
    return sorted((s.family, s.size, s.layer, s.task, s.score) for s in read_scores([folder]))


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("EleutherAI__pythia-410m/layer-7/STS12.json", ("pythia", "410m")),
        ("results/EleutherAI__pythia-410m/layer-7-mean-256/STS12.json", ("pythia", "410m")),
        ("pythia-410m/layer-7/results/EleutherAI__pythia-410m/no_revision_available/STS12.json", ("pythia", "410m")),
        ("pythia-410m/layer-7/STS12.json", ("pythia", "410m")),
        ("pythia-410m/results/layer_7/STS12.json", ("pythia", "410m")),
        ("pythia-410m/Layer7/mteb/STS12.json", ("pythia", "410m")),
        ("x__pythia-410m-layer-7/abc123/STS12.json", ("pythia", "410m")),
        ("pythia-1.4b-deduped/layer-7/STS12.json", ("pythia-deduped", "1.4b")),
        ("state-spaces__mamba-370m-hf/rev/experiments/layer_7/STS12.json", ("mamba-hf", "370m")),
        ("all-MiniLM-L6-v2/layer-07/STS12.json", ("all-MiniLM-L6-v2", "")),
    ],
)
def test_the_path_gives_model_and_layer(tmp_path: Path, path: str, model: tuple[str, str]) -> None:
    result(tmp_path / path, 0.25, 0.75)
    assert read(tmp_path) == [(*model, 7, "STS12", 0.5)]
    for inside in ((tmp_path / path).parent, tmp_path / path):
        assert read(inside) == [(*model, 7, "STS12", 0.5)]


def test_the_file_of_mteb_beside_a_result_names_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "somewhere" / "layer-3"
    result(folder / "STS12.json", 0.5)
    (folder / "model_meta.json").write_text(json.dumps({"name": "org/m-2b", "revision": "layer-3"}))
    (folder / "run_settings.jsonl").write_text("{}\n")
    (folder / "STS12_predictions.json").write_text(json.dumps({"default": [1]}))
    (folder / "list.json").write_text("[1, 2]")
    assert read(tmp_path) == [("m", "2b", 3, "STS12", 0.5)]


def test_splits_and_subsets_have_the_same_weight_as_in_mteb(tmp_path: Path) -> None:
    path = tmp_path / "m" / "layer-1" / "T.json"
    result(path, 0.1, 0.2)
    content = json.loads(path.read_text())
    content["scores"]["dev"] = [{"main_score": 0.9, "hf_subset": "a", "languages": []}]
    path.write_text(json.dumps(content))
    assert read(tmp_path)[0][-1] == pytest.approx(0.4)


def test_each_variant_of_a_model_is_a_family(tmp_path: Path) -> None:
    for pooling in ("mean", "last"):
        for layer in (0, 1):
            result(tmp_path / "x__pythia-14m" / f"layer-{layer}-{pooling}" / "T.json", 0.5)
    assert {(family, size) for family, size, *_ in read(tmp_path)} == {
        ("pythia (mean)", "14m"),
        ("pythia (last)", "14m"),
    }


def test_a_score_that_is_not_a_number_counts_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, score in (("0/A", 0.5), ("0/B", 0.5), ("1/A", 0.5), ("1/B", float("nan"))):
        result(tmp_path / "m" / f"layer-{name}.json", score)
    (model,) = judge_scores(read_scores([tmp_path])).models
    assert (model.complete, model.partial_layers) == (False, [1])
    assert "layer-1/B.json: its main score is not a number" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"task_name": "A", "scores": {"test"', "not a complete JSON file; delete it and run its task again"),
        (b"\xff\xfe{", "not a complete JSON file"),
        ("[" * 100_000, "not a complete JSON file"),
        ('{"task_name": "A", "scores": {"test": [{}]}}', "a score has no main_score"),
        ('{"task_name": "A", "scores": {"test": [1]}}', "a score has no main_score"),
        ('{"task_name": "A", "scores": {"test": 1}}', "a score has no main_score"),
        ('{"task_name": "A", "scores": {}}', "it has no scores"),
        ('{"mteb_dataset_name": "A", "test": {}}', r"mteb before 1\.11"),
    ],
)
def test_an_invalid_result_is_refused_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "layer-1" / "A.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as refused:
        read_scores([tmp_path])
    assert str(path) in str(refused.value)


def test_results_without_a_layer_and_folders_without_results_are_refused(tmp_path: Path) -> None:
    result(tmp_path / "x__y" / "layers" / "A.json", 0.5)
    other = tmp_path / "other" / "layer-1" / "other.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    for path, message in (
        (tmp_path / "x__y", "no folder in its path names the layer"),
        (tmp_path / "other", "has no results of mteb"),
        (other, "has no scores of mteb"),
    ):
        with pytest.raises(UserError, match=message):
            read_scores([path])


def test_tables_and_results_together(tmp_path: Path) -> None:
    table = table_of(tmp_path, HEADER + "pythia,14m,0,A,0.5\n")
    result(tmp_path / "runs" / "pythia-14m" / "layer-1" / "A.json", 0.6)
    (model,) = judge_scores(read_scores([table, tmp_path / "runs"])).models
    assert model.complete
    result(tmp_path / "runs" / "pythia-14m" / "layer-0" / "A.json", 0.6)
    with pytest.raises(UserError, match=r"pythia 14m, layer 0, A is given twice, first at .*scores.csv, row 1"):
        read_scores([table, tmp_path / "runs"])
