"""Commands that compare the layers of a model: layers, scores, mteb."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marc_pipeline.cli.options import Json, State, print_json, print_lines, print_table
from marc_pipeline.config import parse_ds

if TYPE_CHECKING:
    from marc_pipeline.layers.mteb import TaskRun
    from marc_pipeline.report.sections import ReportTable

Out = Annotated[Path, typer.Option(help="Folder for tables and plots.")]
# Subfolder of the results for hidden states; mteb writes its own files beside it.
STATES = "states"

log = logging.getLogger(__name__)


def layers(
    context: typer.Context,
    ds: Annotated[str, typer.Option("--ds", help="Date of the catalogue.")] = "",
    images: Annotated[Path | None, typer.Option(help="Folder of images: evaluate a vision model instead.")] = None,
    backbone: Annotated[
        list[str] | None, typer.Option(help="Model to evaluate (repeatable); default: train.backbone.")
    ] = None,
    pooling: Annotated[
        list[str] | None, typer.Option(help="Pooling to evaluate (repeatable); default: train.pooling.")
    ] = None,
    sample: Annotated[int | None, typer.Option(min=2, help="Overrides layers.sample.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report, tables and plots.")] = Path("layers"),
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Make the recommendation the default for training with this backbone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate every layer of a model, and recommend one. Shows metrics, downstream AUC and cost per layer."""
    from marc_pipeline.layers import judge as stages
    from marc_pipeline.layers.report import choice_table, layer_table, write_layer_report

    deployment = context.ensure_object(State).deployment
    settings = deployment.settings
    if sample is not None:
        settings = settings.model_copy(update={"layers": settings.layers.model_copy(update={"sample": sample})})
        deployment = deployment.with_settings(settings)
    if adopt:
        stages.require_adoptable(settings, backbones=backbone or (), images=str(images or ""))
    report = stages.judge_layers(
        deployment,
        ds=parse_ds(ds) if ds else "",
        images=str(images or ""),
        backbones=backbone or (),
        poolings=pooling or (),
    )
    written = [str(path) for path in write_layer_report(report, out)]
    adopted = stages.adopt(deployment, report) if adopt else None
    if as_json:
        facts = json.loads(report.model_dump_json())
        print_json({**facts, "adopted": adopted is not None, "files": written})
        return
    for model in report.models:
        _print(f"{model.backbone}, {model.pooling} pooling (* layer to keep)", layer_table(model, brief=True))
        _print("Choice of each metric", choice_table(model))
    print_table("Findings", [""], [[sentence] for sentence in report.findings])
    advice = [
        [f"layer {one.layers} of {one.backbone}, {one.pooling} pooling", one.reason] for one in report.recommendations
    ]
    if advice:
        print_table(
            "Adopted" if adopted else "Recommended (--adopt makes it the default for training)", ["", ""], advice
        )
    print_table("Written", [""], [[path] for path in written])


def scores(
    paths: Annotated[list[Path], typer.Argument(help="CSV or Parquet tables, or folders with result files of mteb.")],
    out: Out = Path("scores"),
    as_json: Json = False,
) -> None:
    """Compare layers by benchmark scores, published or your own. Shows the best layer and its lead."""
    _report(paths, out, as_json=as_json)


def mteb(
    context: typer.Context,
    backbone: Annotated[str | None, typer.Option(help="Overrides train.backbone.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Run only this task (repeatable); default: the 32 tasks of the paper.")
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Evaluate only this layer (repeatable); 0 is the embeddings; default: all."),
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="mean, last or cls; overrides train.pooling.")] = None,
    results: Annotated[Path, typer.Option(help="Folder for results of mteb and hidden states.")] = Path("mteb"),
    out: Out = Path("scores"),
    as_json: Json = False,
) -> None:
    """Run MTEB tasks on every layer of a backbone. Compares the scores by layer. Each text is encoded once."""
    from marc_pipeline.bundles.choices import with_train
    from marc_pipeline.layers.mteb import PAPER_TASKS, EveryLayer, find_tasks, run_tasks
    from marc_pipeline.resources import machine

    settings = context.ensure_object(State).settings
    train = with_train(settings, {"backbone": backbone, "pooling": pooling}).train
    tasks = find_tasks(task or PAPER_TASKS)
    skipped = []
    with EveryLayer(train, encode=settings.encode, resources=machine(), cache=results / STATES) as every:
        wanted = sorted(set(range(every.layers + 1) if layer is None else layer))
        log.info("mteb: tasks: %d, layers: %d of %s", len(tasks), len(wanted), every.name)
        for run in run_tasks(every, tasks, wanted, results):
            _tell(run)
            if run.skipped:
                skipped.append({"task": run.task, "layer": run.layer, "reason": run.skipped})
    _report([results], out, as_json=as_json, more={"skipped": skipped})


def _tell(run: "TaskRun") -> None:
    place = run.task if run.layer is None else f"{run.task}, layer {run.layer}"
    if run.skipped:
        log.warning("mteb: %s skipped: %s", place, run.skipped)
    else:
        log.info("mteb: %s: %.4f", place, run.score)


def _report(paths: Iterable[Path], out: Path, *, as_json: bool, more: dict[str, object] | None = None) -> None:
    from marc_pipeline.layers.scores import judge_scores, read_scores
    from marc_pipeline.layers.scores_report import SHARED, model_table, score_findings, shared_table, write_score_report

    report = judge_scores(read_scores(paths))
    written = [str(path) for path in write_score_report(report, out)]
    if as_json:
        found = json.loads(report.model_dump_json())
        print_json({**found, "findings": score_findings(report), **(more or {}), "files": written})
        return
    _print("Scores by layer, as recorded", model_table(report))
    _print(SHARED, shared_table(report))
    print_lines([f"- {finding}" for finding in score_findings(report)])
    print_table("Written", [""], [[path] for path in written])


def _print(title: str, table: "ReportTable") -> None:
    """Print a table of a report; print nothing if it has no rows."""
    if table.rows:
        print_table(title, list(table.header), [list(row) for row in table.rows], right=tuple(table.numbers))


COMMANDS = (layers, scores, mteb)
