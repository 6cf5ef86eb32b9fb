"""Benchmark scores by layer: read them from tables and result files of mteb, and compare the layers of each model."""

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
    LayerComparison,
    LayerMean,
    LayerScore,
    ModelCurve,
    ScoreReport,
    TaskWinner,
)

COLUMNS = ("family", "size", "layer", "task", "main_score")
TABLES = (".csv", ".parquet")
# A layer with a smaller share of the model's tasks is not counted, because its mean is not comparable.
COUNTS = Fraction(15, 16)
# "layer-7", "layer_7", "layer7": the name of a folder, or a part of it.
LAYER = re.compile(r"(?<![a-z0-9])layer[-_ ]?(\d{1,5})(?![0-9])", re.IGNORECASE)
# "410m", "1.4b", "8B": the size in the name of a model.
SIZE = re.compile(r"[-_. ](\d+(?:\.\d+)?[kmbt])(?![a-z0-9])", re.IGNORECASE)
# mteb writes this file beside its results.
MODEL_FILE = "model_meta.json"
# Folders between the folder of a model and its results.
BETWEEN = {"results", "mteb", "scores"}

log = logging.getLogger(__name__)


Placed = tuple[LayerScore, str]
"""A score and its place in the input."""


# Read


def read_scores(paths: Iterable[Path | str]) -> list[LayerScore]:
    """Read scores from tables and from folders of result files.

    A table is CSV or Parquet with the columns family, size, layer, task and main_score. A folder has results of mteb 2
    (``MODEL/REVISION/TASK.json``), or result files in other folders. A folder such as ``layer-7`` in the path of a
    file gives the layer; it may be part of a longer name.

    Raises:
        UserError: a path does not exist or has no scores, a column is missing, a value is not a number, or a score
            is given twice.
    """
    found: list[Placed] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _folder(path)
        elif not path.is_file():
            raise UserError(f"{path}: no such file or folder")
        elif path.suffix.lower() in TABLES:
            found += _table(path)
        elif path.suffix.lower() == ".json":
            found += _results([path], path)
        else:
            raise UserError(f"{path}: scores are read from .csv, .parquet and .json files, and from folders")
    seen: dict[tuple[str, str, int, str], str] = {}
    for score, place in found:
        key = score.family, score.size, score.layer, score.task
        if key in seen:
            model = f"{score.family} {score.size}".strip()
            raise UserError(f"{place}: {model}, layer {score.layer}, {score.task} is given twice, first at {seen[key]}")
        seen[key] = place
    return [score for score, _ in found]


def _table(path: Path) -> Iterator[Placed]:
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
            raise UserError(f"{place}: layer {_shown(row['layer'])} is not a whole number from 0 to {MOST_LAYERS:,}")
        if score is None:
            raise UserError(f"{place}: main_score {_shown(row['main_score'])} is not a number")
        yield LayerScore(family=family, size=size, layer=layer, task=task, score=score), place
    if empty:
        raise UserError(f"{path}: the table has no rows")


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their numbers; the first row after the header is 1."""
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
    """A number in the range of scores; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        # Python accepts "1_000"; in a table it is an error.
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
    """One result file; ``variant`` is the rest of the name of the layer's folder, for example the pooling."""

    path: Path
    model: str
    variant: str
    layer: int
    task: str
    score: float


def _folder(folder: Path) -> Iterator[Placed]:
    files = sorted(path for path in folder.rglob("*.json") if path.name != MODEL_FILE)
    found = list(_results(files, folder))
    if not found:
        raise UserError(f"{folder}: has no results of mteb (TASK.json with a main_score)")
    return iter(found)


def _results(files: Sequence[Path], source: Path) -> Iterator[Placed]:
    """Scores of result files. If a model has several variants, the variant is added to the family."""
    results = [result for path in files if (result := _result(path)) is not None]
    if not results and source in files:
        raise UserError(f"{source}: has no scores of mteb")
    variants: dict[str, set[str]] = defaultdict(set)
    for result in results:
        variants[result.model].add(result.variant)
    for result in results:
        family, size = _family_and_size(result.model)
        if len(variants[result.model]) > 1:
            family = f"{family} ({result.variant or 'plain'})"
        score = LayerScore(family=family, size=size, layer=result.layer, task=result.task, score=result.score)
        yield score, str(result.path)


def _result(path: Path) -> _Result | None:
    """The result in a file; None if the file is not a result, or if its score is not a number."""
    content = _json(path)
    if not isinstance(content, dict):
        return None
    if "mteb_dataset_name" in content:
        raise UserError(f"{path}: written by mteb before 1.11; run its task again with a newer version")
    if not isinstance(content.get("task_name"), str) or not isinstance(content.get("scores"), dict):
        return None
    try:
        mains = [entry["main_score"] for entries in content["scores"].values() for entry in entries]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: a score has no main_score") from None
    if not mains:
        raise UserError(f"{path}: it has no scores")
    model, variant, layer = _whose(path)
    numbers = [_number(main) for main in mains]
    if None in numbers:
        log.warning("%s: its main score is not a number; it is treated as missing", path)
        return None
    # As in mteb, all splits and subsets have the same weight.
    score = math.fsum(number for number in numbers if number is not None) / len(numbers)
    return _Result(path, model, variant, layer, _text(content["task_name"]), score)


def _whose(path: Path) -> tuple[str, str, int]:
    """Model, variant and layer of a result file, from its path and from the file of mteb beside it."""
    folders = path.absolute().parent.parts[1:]
    places = [place for place, name in enumerate(folders) if LAYER.search(name)]
    if not places:
        raise UserError(f"{path}: no folder in its path names the layer, as layer-7 does")
    place = places[-1]
    match = LAYER.search(folders[place])
    assert match is not None  # noqa: S101 - searched above
    rest = LAYER.sub("", folders[place]).strip("-_ .")
    model = _model_file(path.parent / MODEL_FILE)
    if not model:
        # The nearest ORGANISATION__MODEL, as mteb names folders; else the folder above that of the layer.
        named = [name for name in reversed(folders) if "__" in name]
        above = [name for name in reversed(folders[:place]) if name.lower() not in BETWEEN]
        model = next(iter([*named, *above]), "")
    short = LAYER.sub("", model.replace("__", "/").rsplit("/", 1)[-1]).strip("-_ .")
    # If the layer is part of the name of the model, there is no variant.
    variant = "" if rest.endswith(short) and short else rest
    return short or "model", variant, int(match.group(1))


def _model_file(path: Path) -> str:
    """The name of the model that mteb wrote beside its results; empty if there is none."""
    content = _json(path) if path.is_file() else None
    name = content.get("name") if isinstance(content, dict) else None
    return name if isinstance(name, str) else ""


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a complete JSON file; delete it and run its task again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _family_and_size(model: str) -> tuple[str, str]:
    """``pythia-410m-deduped`` gives pythia-deduped and 410m; a name without a size is the whole family."""
    match = SIZE.search(model)
    if match is None:
        return model, ""
    return model[: match.start()] + model[match.end() :], match.group(1)


# Comparison


def judge_scores(scores: Iterable[LayerScore]) -> ScoreReport:
    """Return the curve of every model, its best layer, and the best layer of every task; any order of scores."""
    models: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    tasks: set[str] = set()
    for score in scores:
        models[score.family, score.size][score.layer][score.task] = score.score
        tasks.add(score.task)
    curves = [_curve(family, size, layers) for (family, size), layers in models.items()]
    return ScoreReport(tasks=sorted(tasks), models=sorted(curves, key=_order))


def _order(curve: ModelCurve) -> tuple[str, float, str, str]:
    """Sort key: family, then size."""
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


def _compare(means: Mapping[int, tuple[float, int]]) -> LayerComparison | None:
    """Compare the best with the final layer, from the mean of each layer and its number of tasks."""
    if len(means) < 2:
        return None
    last, best = max(means), max(sorted(means), key=lambda layer: means[layer][0])
    final, gain = means[last][0], means[best][0] - means[last][0]
    return LayerComparison(
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
    """None if the final mean is not positive, or so small that the percentage overflows."""
    share = 100 * gain / final if final > 0 else math.inf
    return share if math.isfinite(share) else None


def _winner(task: str, layers: Mapping[int, Mapping[str, float]], final: float | None) -> TaskWinner:
    scores = {layer: layers[layer][task] for layer in sorted(layers) if task in layers[layer]}
    best = max(scores, key=lambda layer: scores[layer])
    gain = None if final is None else scores[best] - final
    return TaskWinner(task=task, layer=best, score=scores[best], layers=len(scores), final=final, gain=gain)


def _mean(scores: Iterable[float]) -> float:
    """The exactly rounded mean: equal for every order of the scores."""
    numbers = list(scores)
    return math.fsum(numbers) / len(numbers)
