"""Made-up data for the reports of evaluations, layers and benchmark scores, and all reports that the tests write."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import HOSTILE

from pipeline.evaluation_report import evaluation_page, write_evaluation_report
from pipeline.layer_findings import METRICS, layer_findings, recommend, with_choice
from pipeline.layer_report import layer_page, write_layer_report
from pipeline.layer_scores import judge_scores
from pipeline.layer_scores_report import score_page, write_score_report
from pipeline.report.sections import ReportPage
from schemas.evaluation import Evaluation, Family, Summary, SystemScore
from schemas.files import Contract
from schemas.layers import JudgedLayer, JudgedModel, LayerReport
from schemas.scores import LayerScore, ScoreReport

NAN = math.nan

# Evaluations

SYSTEMS: list[tuple[str, Family, int | None, float]] = [
    # Not in the order of the families.
    ("marc", "marc", 2, 0.7012),
    ("marc-no-constraints", "ablation", 2, 0.6950),
    ("marc-crossing", "ablation", 2, 0.7003),
    ("pca-layer-10", "layer", 10, 0.6790),
    ("pca-layer-2", "layer", 2, 0.6910),
    ("pca-layer-0", "layer", 0, 0.6890),
    ("autoencoder", "baseline", 2, 0.6901),
    ("mrl", "baseline", 10, 0.6780),
    ("contrastive", "baseline", 10, 0.6760),
    ("marc-tuned", "marc", 10, 0.7040),
    ("bundle:ba04743a58d17c34", "bundle", 10, 0.6800),
    ("random", "reference", None, 0.6735),
]


def summary(system: str, family: Family, layer: int | None, dim: int, auc: float, *, seeds: int) -> Summary:
    difference, many = (None if system == "marc" else auc - 0.7012), seeds > 1
    over_seeds, over_users = (
        (None, None) if difference is None or not shown else (difference - reach, difference + reach)
        for shown, reach in ((many, 0.0034), (True, 0.0056))
    )
    return Summary(
        system=system,
        family=family,
        layer=layer,
        dim=dim,
        seeds=seeds,
        auc=auc,
        auc_std=0.0021 if many else NAN,
        cold_auc=auc - 0.0501,
        cold_auc_std=0.0043 if many else NAN,
        warm_auc=auc + 0.01,
        log_loss=1.3402 - auc,
        log_loss_std=0.0032 if many else NAN,
        bytes_per_item=4 * dim,
        compared_with=None if difference is None else "marc",
        difference=difference,
        low=over_seeds[0],
        high=over_seeds[1],
        p_value=0.0127 if over_seeds[0] is not None else None,
        cold_difference=difference,
        user_low=over_users[0],
        user_high=over_users[1],
        train_seconds=12.5,
    )


def evaluation_of(
    *, seeds: int = 5, dims: Sequence[int] = (32, 64), without: Sequence[Family] = (), **changes: Any
) -> Evaluation:
    """An AUC grows with the dimension so that no two tables are alike; ``changes`` are those of all summaries."""
    rows = [(name, family, layer, dim, auc + dim / 100_000) for dim in dims for name, family, layer, auc in SYSTEMS]
    rows += [("ids", "reference", None, 0, 0.6728), ("final-full", "reference", 10, 384, 0.6805)]
    summaries = [summary(*row, seeds=seeds).model_copy(update=changes) for row in rows if row[1] not in without]
    return Evaluation(
        training_id="0123abcd",
        backbone="sentence-transformers/all-MiniLM-L6-v2",
        layers=10,
        width=384,
        users=610,
        items=9742,
        rows=(80_669, 10_083, 10_084),
        cold_rows=3358,
        chosen_layer=2,
        scores=[system_score(s, seed) for s in summaries for seed in range(seeds)],
        summaries=summaries,
        findings=["At d = 32 marc beats pca-layer-2: +0.0102.", "The mid-layer advantage at d = 32 is confirmed."],
    )


def system_score(s: Summary, seed: int) -> SystemScore:
    same = {name for name in SystemScore.model_fields if name in Summary.model_fields}
    return SystemScore(**s.model_dump(include=same), seed=seed, validation_auc=0.68, epoch=7, score_seconds=2.5)


# Layers


def model_of(
    backbone: str = "a/model", *, pooling: str = "mean", place: int = 0, clicks: bool = True, count: int = 5,
    undefined: Sequence[str] = ("lidar",), **changes: Any,
) -> JudgedModel:  # fmt: skip
    """Layer l's value of metric m is l + m / 10 + place / 100; some metrics are nowhere defined."""
    judged = [
        JudgedLayer(
            layer=number,
            depth=number / (count - 1),
            metrics={
                metric.name: NAN if metric.name in undefined else number + m / 10 + place / 100
                for m, metric in enumerate(METRICS)
            },
            seconds=0.5 + 2.0 * number + place,
            weights_bytes=2_000_000 + 1_000_000 * number,
            test_auc=[0.6 + 0.01 * number, 0.62 + 0.01 * number] if clicks else [],
            fold_auc=[0.7 - 0.01 * (number - 2) ** 2 - 0.001 * place] if clicks and number else [],
        )
        for number in range(count)
    ]
    facts = {
        "sweep_id": f"{place}", "backbone": backbone, "layers": count - 1, "width": 384, "pooling": pooling,
        "max_tokens": 48, "dtype": "float32", "device": "cpu", "inputs": 1234, "judged": judged,
    }  # fmt: skip
    return with_choice(JudgedModel.model_validate({**facts, **changes}))


def layers_of(*models: JudgedModel, **changes: Any) -> LayerReport:
    facts = {
        "report_id": "0123", "ds": "2026-11-20", "dim": 64 * bool(models[0].judged[0].test_auc), "sample": 1234,
        "views": 4, "probability": 0.3, "block": 500, "order": 1.0, "temperature": 0.1, "models": models,
        "recommendations": recommend(models), "findings": layer_findings(models),
    }  # fmt: skip
    return LayerReport.model_validate({**facts, **changes})


LAYERS = {
    "clicks": layers_of(model_of(left_out=34, left_out_because="ValueError: <no> token")),
    "no clicks": layers_of(model_of(clicks=False)),
    "poolings": layers_of(model_of(), model_of(pooling="last", place=1), model_of(pooling="cls", place=2)),
    "models": layers_of(model_of(), model_of("b/other", place=1, count=13)),
    "images": layers_of(model_of(clicks=False, max_tokens=0, inputs=77), kind="images", ds="", sample=77),
    "nothing defined": layers_of(model_of(clicks=False, undefined=[metric.name for metric in METRICS])),
    "one layer": layers_of(model_of(count=2)),
    "hostile": layers_of(*(model_of(name, place=place) for place, name in enumerate(HOSTILE))),
    "hostile, no clicks": layers_of(*(model_of(name, place=n, clicks=False) for n, name in enumerate(HOSTILE))),
}

# Benchmark scores


def scores_of(*models: tuple[str, str], layers: int = 5, without: Sequence[tuple[int, str]] = ()) -> ScoreReport:
    """Every model's tasks win at layer 1, 2 and 3; the last model lacks the scores of ``without``."""
    return judge_scores(
        LayerScore(
            family=family, size=size, layer=layer, task=task, score=0.5 + 0.01 * number - 0.02 * abs(layer - best)
        )
        for number, (family, size) in enumerate(models)
        for layer in range(layers)
        for task, best in (("early", 1), ("middle", 2), ("late", 3))
        if number < len(models) - 1 or (layer, task) not in without
    )


def grid_of(families: Sequence[str], sizes: Sequence[str], tasks: Sequence[str]) -> ScoreReport:
    """Three layers and all tasks of the models that pairs of family and size name."""
    return judge_scores(
        LayerScore(family=family, size=size, layer=layer, task=task, score=0.1 * layer * number)
        for family, size in zip(families, sizes, strict=True)
        for layer in range(3)
        for number, task in enumerate(tasks)
    )


# Two names that differ in their ends only have the same title in a plot.
NAMES = [name for name in HOSTILE if not name.endswith("/other")]
HOSTILE_SCORES = grid_of(NAMES, ["1b"] * len(NAMES), NAMES)
MANY_SCORES = grid_of(
    [f"family {number % 9}" for number in range(16)],
    [f"{number}m" for number in range(16)],
    [f"task {task}" for task in range(40)],
)

# All


@dataclass(frozen=True)
class ReportCase:
    """A report to write.

    Attributes:
        name: of its files.
        plots: the PNG files that its data gives.
    """

    name: str
    data: Contract
    page: Callable[[Any], ReportPage]
    write: Callable[[Any, Path], list[Path]]
    plots: Sequence[str]


BY_LAYER, BY_DIMENSION, ABLATIONS = EVALUATION_PLOTS = ["auc_by_layer.png", "auc_by_dimension.png", "ablations.png"]
LAYER_PLOTS = ["auc_by_depth.png", "metrics_by_depth.png", "cost_by_depth.png"]
SCORE_PLOTS = ["scores_by_layer.png", "task_winners.png"]
ALL_FAMILIES: list[Family] = ["reference", "layer", "baseline", "ablation", "marc", "bundle"]
SCORES: dict[str, tuple[ScoreReport, list[str]]] = {
    "hostile": (HOSTILE_SCORES, SCORE_PLOTS),
    "many": (MANY_SCORES, SCORE_PLOTS),
    "incomplete": (scores_of(("a", ""), ("b", "7b"), without=[(2, "early")]), SCORE_PLOTS),
    "nothing": (scores_of(layers=1), []),
    "one model": (scores_of(("a", ""), layers=1), []),
    "two models": (scores_of(("a", ""), ("b", ""), layers=1), []),
}
EVALUATIONS: dict[str, tuple[Evaluation, list[str]]] = {
    "whole": (evaluation_of(), EVALUATION_PLOTS),
    "one seed": (evaluation_of(seeds=1, dims=(32,), cold_auc=NAN), EVALUATION_PLOTS),
    "one dimension": (evaluation_of(dims=(16,)), EVALUATION_PLOTS),
    "three dimensions": (evaluation_of(dims=(16, 32, 64)), EVALUATION_PLOTS),
    "four dimensions": (evaluation_of(dims=(8, 16, 32, 64)), EVALUATION_PLOTS),
    "no layers": (evaluation_of(without=["layer"]), [BY_DIMENSION, ABLATIONS]),
    "no ablations": (evaluation_of(without=["ablation"]), [BY_LAYER, BY_DIMENSION]),
    "no differences": (evaluation_of(difference=None, low=None, high=None), [BY_LAYER, BY_DIMENSION]),
    "references": (evaluation_of(without=ALL_FAMILIES[1:]), [BY_DIMENSION]),
    "no comparison": (evaluation_of(without=["reference", "baseline", "marc"]), EVALUATION_PLOTS),
    "no systems": (evaluation_of(without=ALL_FAMILIES), []),
}
CASES = {
    f"evaluation: {title}": ReportCase("evaluation", data, evaluation_page, write_evaluation_report, files)
    for title, (data, files) in EVALUATIONS.items()
}
CASES |= {
    f"layers: {title}": ReportCase("layers", data, layer_page, write_layer_report, LAYER_PLOTS[data.dim == 0 :])
    for title, data in LAYERS.items()
    if title not in ("no clicks", "models")
}
CASES |= {
    f"scores: {title}": ReportCase("scores", data, score_page, write_score_report, files)
    for title, (data, files) in SCORES.items()
}
