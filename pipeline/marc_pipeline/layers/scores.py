"""Benchmark scores by layer: read from tables and from the result files of mteb, and judged model by model."""

import csv
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from marc_pipeline.errors import UserError
from marc_schemas.scores import (
    LARGEST_SCORE,
    MOST_LAYERS,
    Comparison,
    LayerMean,
    LayerScore,
    ModelCurve,
    ScoreReport,
    TaskWinner,
)

COLUMNS = ("family", "size", "layer", "task", "main_score")
TABLES = (".csv", ".parquet")
# A layer that has fewer of the model's tasks does not count: its mean is of something else.
COUNTS = Fraction(15, 16)
# "layer-7", "layer_7", "layer7": a folder's name, or a part of it.
LAYER = re.compile(r"(?<![a-z0-9])layer[-_ ]?(\d{1,5})(?![0-9])", re.IGNORECASE)
# "410m", "1.4b", "8B": how names of models tell their size.
SIZE = re.compile(r"[-_. ](\d+(?:\.\d+)?[kmbt])(?![a-z0-9])", re.IGNORECASE)
# What mteb writes beside its results.
MODEL_FILE = "model_meta.json"
# Folders between a model's and its results that name neither.
BETWEEN = {"results", "mteb", "scores"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    """A score, and where it stands."""

    score: LayerScore
    place: str


# Read


def read_scores(paths: Iterable[Path | str]) -> list[LayerScore]:
    """Scores of tables and of folders of result files.

    A table is CSV or Parquet with the columns family, size, layer, task and main_score. A folder is one that mteb 2
    writes its results to (``MODEL/REVISION/TASK.json``), or one laid out by hand; somewhere in a file's path a folder
    ``layer-7`` tells the layer, alone or as part of a name.

    Args:
        paths: tables, folders, single result files.

    Raises:
        UserError: a path is not there or holds no scores, a column is missing, a value is no number, a score is
            told twice.
    """
    found: list[_Found] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _folder(path)
        elif not path.is_file():
            raise UserError(f"{path}: there is no such file or folder")
        elif path.suffix.lower() in TABLES:
            found += _table(path)
        elif path.suffix.lower() == ".json":
            found += _results([path], path)
        else:
            raise UserError(f"{path}: scores are read from .csv, .parquet and .json files, and from folders")
    seen: dict[tuple[str, str, int, str], str] = {}
    for one in found:
        score = one.score
        key = score.family, score.size, score.layer, score.task
        if key in seen:
            model = f"{score.family} {score.size}".strip()
            raise UserError(f"{one.place}: {model}, layer {score.layer}, {score.task} is there already: {seen[key]}")
        seen[key] = one.place
    return [one.score for one in found]


def _table(path: Path) -> Iterator[_Found]:
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _parquet_rows(path)
    empty = True
    for number, row in rows:
        empty = False
        place = f"{path}, row {number}"
        family, size, task = (_text(row[name]) for name in ("family", "size", "task"))
        if not family or not task:
            raise UserError(f"{place}: {'family' if not family else 'task'} is empty")
        layer, score = _whole(row["layer"]), _number(row["main_score"])
        if layer is None:
            raise UserError(f"{place}: layer {_shown(row['layer'])} is no whole number from 0 to {MOST_LAYERS:,}")
        if score is None:
            raise UserError(f"{place}: main_score {_shown(row['main_score'])} is no number")
        yield _Found(LayerScore(family=family, size=size, layer=layer, task=task, score=score), place)
    if empty:
        raise UserError(f"{path}: the table has no rows")


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their numbers, the first one after the header being 1."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _require_columns(path, header)
            number = 0
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise UserError(f"{path}, row {number}: {len(cells)} cells, the header has {len(header)}")
                yield number, dict(zip(header, cells, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        _require_columns(path, pq.read_schema(path).names)
        rows = pq.read_table(path, columns=list(COLUMNS)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from None
    yield from enumerate(rows, start=1)


def _require_columns(path: Path, names: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise UserError(f"{path}: the column {missing[0]} is missing; a table of scores has {', '.join(COLUMNS)}")
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: there are two columns {twice[0]}")


def _text(value: object) -> str:
    """A name on one line."""
    return "" if value is None else " ".join(str(value).split())


def _number(value: object) -> float | None:
    """A finite number of a size that scores have; None where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        # Python's own "1_000" is no number of a table.
        number = float("" if isinstance(value, str) and "_" in value else value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST_SCORE else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 0 <= number <= MOST_LAYERS and number == int(number) else None


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


@dataclass(frozen=True)
class _Result:
    """One result file.

    Attributes:
        variant: what the layer's folder says besides the layer: of which pooling the vectors are, for example.
    """

    path: Path
    model: str
    variant: str
    layer: int
    task: str
    score: float


def _folder(folder: Path) -> Iterator[_Found]:
    files = sorted(path for path in folder.rglob("*.json") if path.name != MODEL_FILE)
    found = list(_results(files, folder))
    if not found:
        raise UserError(f"{folder}: holds no results of mteb (TASK.json with a main_score)")
    return iter(found)


def _results(files: Sequence[Path], source: Path) -> Iterator[_Found]:
    """Scores of result files; the variant is part of the family where a model comes in several."""
    results = [result for path in files if (result := _result(path)) is not None]
    if not results and source in files:
        raise UserError(f"{source}: holds no scores of mteb")
    variants: dict[str, set[str]] = defaultdict(set)
    for result in results:
        variants[result.model].add(result.variant)
    for result in results:
        family, size = _family_and_size(result.model)
        if len(variants[result.model]) > 1:
            family = f"{family} ({result.variant or 'plain'})"
        score = LayerScore(family=family, size=size, layer=result.layer, task=result.task, score=result.score)
        yield _Found(score, str(result.path))


def _result(path: Path) -> _Result | None:
    """What a file says; None for a file that is no result, or one of a task that came to no number."""
    content = _json(path)
    if not isinstance(content, dict):
        return None
    if "mteb_dataset_name" in content:
        raise UserError(f"{path}: written by mteb before 1.11, whose format is not read")
    if not isinstance(content.get("task_name"), str) or not isinstance(content.get("scores"), dict):
        return None
    try:
        mains = [entry["main_score"] for entries in content["scores"].values() for entry in entries]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: a score without main_score") from None
    if not mains:
        raise UserError(f"{path}: there are no scores in it")
    model, variant, layer = _whose(path)
    numbers = [_number(main) for main in mains]
    if None in numbers:
        log.warning("%s: its main score is no number; it counts as missing", path)
        return None
    # As mteb does: every split and subset weighs the same.
    score = math.fsum(number for number in numbers if number is not None) / len(numbers)
    return _Result(path, model, variant, layer, _text(content["task_name"]), score)


def _whose(path: Path) -> tuple[str, str, int]:
    """Model, variant and layer of a result file, by its path and what mteb wrote beside it."""
    folders = path.absolute().parent.parts[1:]
    places = [place for place, name in enumerate(folders) if LAYER.search(name)]
    if not places:
        raise UserError(f"{path}: no folder of its path tells the layer, as layer-7 does")
    place = places[-1]
    match = LAYER.search(folders[place])
    assert match is not None  # noqa: S101 - searched above
    rest = LAYER.sub("", folders[place]).strip("-_ .")
    model = _model_file(path.parent / MODEL_FILE)
    if not model:
        # mteb's ORGANISATION__MODEL, the nearest one; else the folder above the layer's.
        named = [name for name in reversed(folders) if "__" in name]
        above = [name for name in reversed(folders[:place]) if name.lower() not in BETWEEN]
        model = next(iter([*named, *above]), "")
    bare = LAYER.sub("", model.replace("__", "/").rsplit("/", 1)[-1]).strip("-_ .")
    # A layer in the model's own name leaves no variant.
    variant = "" if rest.endswith(bare) and bare else rest
    return bare or "model", variant, int(match.group(1))


def _model_file(path: Path) -> str:
    """The name that mteb wrote beside its results; empty where there is none."""
    content = _json(path) if path.is_file() else None
    name = content.get("name") if isinstance(content, dict) else None
    return name if isinstance(name, str) else ""


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a whole JSON file; remove it and run its task again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _family_and_size(model: str) -> tuple[str, str]:
    """``pythia-410m-deduped`` is pythia-deduped, 410m; a name without a size is a family of its own."""
    match = SIZE.search(model)
    if match is None:
        return model, ""
    return model[: match.start()] + model[match.end() :], match.group(1)


# Judge


def judge_scores(scores: Iterable[LayerScore]) -> ScoreReport:
    """The curve of every model, its best layer and that of every task; the order of the scores does not matter."""
    models: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    tasks: set[str] = set()
    for score in scores:
        models[score.family, score.size][score.layer][score.task] = score.score
        tasks.add(score.task)
    curves = [_curve(family, size, layers) for (family, size), layers in models.items()]
    return ScoreReport(tasks=sorted(tasks), models=sorted(curves, key=_order))


def _order(curve: ModelCurve) -> tuple[str, float, str, str]:
    """By family, then from small to large."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt])", curve.size, re.IGNORECASE)
    number = float(match.group(1)) * 1000 ** "kmbt".index(match.group(2).lower()) if match else math.inf
    return curve.family.lower(), number, curve.family, curve.size


def _curve(family: str, size: str, layers: Mapping[int, Mapping[str, float]]) -> ModelCurve:
    present = sorted(layers)
    tasks = sorted({task for scores in layers.values() for task in scores})
    counting = [layer for layer in present if len(layers[layer]) >= COUNTS * len(tasks)]
    common = [task for task in tasks if counting and all(task in layers[layer] for layer in counting)]
    recorded = {layer: _mean(layers[layer].values()) for layer in present}
    same = {layer: _mean(layers[layer][task] for task in common) for layer in counting} if common else {}
    absent = sorted(set(range(present[0], present[-1])) - set(present))
    partial = [layer for layer in present if len(layers[layer]) < len(tasks)]
    final = layers[counting[-1]] if counting else {}
    return ModelCurve(
        family=family,
        size=size,
        tasks=tasks,
        layers=[
            LayerMean(layer=layer, tasks=len(layers[layer]), mean=recorded[layer], same_tasks_mean=same.get(layer))
            for layer in present
        ],
        complete=len(present) > 1 and not absent and not partial,
        absent_layers=absent,
        partial_layers=partial,
        missing_scores=sum(len(tasks) - len(layers[layer]) for layer in present),
        as_recorded=_compare({layer: (recorded[layer], len(layers[layer])) for layer in counting}),
        same_tasks=_compare({layer: (mean, len(common)) for layer, mean in same.items()}),
        winners=[_winner(task, layers, final.get(task)) for task in tasks],
    )


def _compare(means: Mapping[int, tuple[float, int]]) -> Comparison | None:
    """By the mean of each layer and the number of tasks that it is over."""
    if len(means) < 2:
        return None
    last, best = max(means), max(sorted(means), key=lambda layer: means[layer][0])
    final, gain = means[last][0], means[best][0] - means[last][0]
    return Comparison(
        layers=len(means),
        final_layer=last,
        final=final,
        final_tasks=means[last][1],
        best_layer=best,
        best=means[best][0],
        best_tasks=means[best][1],
        gain=gain,
        percent=_percent(gain, final),
    )


def _percent(gain: float, final: float) -> float | None:
    """None also where a final mean next to nothing makes the share a number without meaning."""
    share = 100 * gain / final if final > 0 else math.inf
    return share if math.isfinite(share) else None


def _winner(task: str, layers: Mapping[int, Mapping[str, float]], final: float | None) -> TaskWinner:
    scores = {layer: layers[layer][task] for layer in sorted(layers) if task in layers[layer]}
    best = max(scores, key=lambda layer: scores[layer])
    return TaskWinner(
        task=task,
        layer=best,
        score=scores[best],
        layers=len(scores),
        final=final,
        gain=None if final is None else scores[best] - final,
    )


def _mean(scores: Iterable[float]) -> float:
    """Exactly rounded: the same in any order."""
    numbers = list(scores)
    return math.fsum(numbers) / len(numbers)
