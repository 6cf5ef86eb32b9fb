"""Commands that train bundles and make them current: train, evaluate, promote, demote."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marc_pipeline.cli.options import Json, State, print_json, print_table
from marc_pipeline.config import parse_ds
from marc_pipeline.errors import UserError

if TYPE_CHECKING:
    from marc_pipeline.model.bundle import Bundle
    from marc_schemas.promotion import BundleComparison

TrainDs = Annotated[str, typer.Option("--ds", help="Date of the catalogue.")]
Layers = Annotated[int | None, typer.Option(help="Number of backbone layers to keep; overrides train.layers.")]
Names = Annotated[
    list[str] | None, typer.Option("--system", help="Evaluate only this system (repeatable); default: all.")
]


def train(
    context: typer.Context,
    ds: TrainDs,
    compressor: Annotated[str | None, typer.Option(help="marc or pca; overrides train.compressor.")] = None,
    regime: Annotated[str | None, typer.Option(help="frozen or tuned; overrides train.regime.")] = None,
    dim: Annotated[int | None, typer.Option(help="Dimensions of the vectors; overrides train.dim.")] = None,
    layers: Layers = None,
    seed: Annotated[int | None, typer.Option(help="Overrides train.seed.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Overrides train.max_steps.")] = None,
    promote: Annotated[bool, typer.Option(help="Make the bundle current if it passes the gate.")] = True,
    if_none: Annotated[bool, typer.Option("--if-none", help="Do nothing if there is a current bundle.")] = False,
    replace_marc: Annotated[
        bool, typer.Option("--replace-marc", help="Without interactions: let a PCA replace a MARC bundle.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a bundle, and make it current if it passes the gate.

    With interactions, the best of the new bundle, the current bundle and the PCA of a layer becomes current.
    """
    from marc_pipeline.bundles import run as stages
    from marc_pipeline.bundles.choices import with_train
    from marc_pipeline.model.bundle import open_bundle

    deployment = context.ensure_object(State).deployment
    settings = deployment.settings
    if if_none:
        try:
            _print_bundle(open_bundle(deployment.storage, settings.bundle_uri), as_json=as_json)
        except UserError:
            pass
        else:
            return
    given = {
        "compressor": compressor, "regime": regime, "dim": dim, "layers": layers, "seed": seed, "max_steps": max_steps,
    }  # fmt: skip
    wanted = deployment.with_settings(with_train(settings, given))
    done = stages.train_bundle(wanted, ds=parse_ds(ds), promote=promote, replace_marc=replace_marc)
    _print_bundle(done.bundle, done.comparison, as_json=as_json)


def evaluate(
    context: typer.Context,
    ds: TrainDs,
    out: Annotated[Path, typer.Option(help="Folder for tables and plots.")] = Path("evaluation"),
    system: Names = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Overrides evaluate.seeds.")] = None,
    dim: Annotated[list[int] | None, typer.Option(min=1, help="Overrides evaluate.dims (repeatable).")] = None,
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Compare MARC with baselines and ablations on the interactions. Writes a table, JSON and plots."""
    from marc_pipeline.bundles import run as stages
    from marc_pipeline.bundles.choices import with_train
    from marc_pipeline.evaluation.report import write_evaluation_report

    deployment = context.ensure_object(State).deployment
    settings = with_train(deployment.settings, {"layers": layers})
    wanted = {"seeds": seeds, "dims": tuple(dim) if dim else None}
    evaluate = settings.evaluate.model_copy(update={key: value for key, value in wanted.items() if value})
    deployment = deployment.with_settings(settings.model_copy(update={"evaluate": evaluate}))
    found = stages.evaluate(deployment, ds=parse_ds(ds), wanted=system or ())
    written = [str(path) for path in write_evaluation_report(found, out)]
    if as_json:
        # The contract writes NaN as a string, because JSON has no NaN.
        print_json({**json.loads(found.model_dump_json(exclude={"scores"})), "files": written})
        return
    rows = [
        [s.system, str(s.dim), f"{s.auc:.4f} ± {s.auc_std:.4f}", f"{s.cold_auc:.4f}", f"{s.log_loss:.4f}"]
        for s in sorted(found.summaries, key=lambda s: (s.dim, s.auc))
    ]
    print_table("Test AUC", ["system", "dim", "AUC", "cold items", "log loss"], rows, right=(1, 2, 3, 4))
    print_table("Findings", [""], [[sentence] for sentence in found.findings])
    print_table("Written", [""], [[path] for path in written])


def promote(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="Version of the bundle.")],
    ds: TrainDs,
    as_json: Json = False,
) -> None:
    """Evaluate a bundle, and make it current if it passes the gate.

    The gate compares it with the current bundle. The exit code is 3 if the gate refuses it.
    """
    from marc_pipeline.bundles import run as stages

    comparison = stages.evaluate_and_promote(context.ensure_object(State).deployment, version, ds=parse_ds(ds))
    if as_json:
        print_json(comparison.model_dump(exclude={"scores", "problems"}))
    else:
        print_table("Promoted", ["", ""], [["bundle", comparison.candidate], ["before", comparison.current or "none"]])
        _print_comparison(comparison)


def demote(context: typer.Context, as_json: Json = False) -> None:
    """Make the previous bundle current again."""
    from marc_pipeline.model.bundle import demote as step_back

    deployment = context.ensure_object(State).deployment
    version = step_back(deployment.storage, deployment.settings.bundle_uri)
    if as_json:
        print_json({"bundle": version})
    else:
        print_table(None, ["", ""], [["current bundle", version]])


def _print_bundle(bundle: "Bundle", comparison: "BundleComparison | None" = None, *, as_json: bool) -> None:
    card = bundle.card
    if as_json:
        gate = comparison and comparison.model_dump(exclude={"scores"})
        print_json({"bundle": bundle.version, "uri": bundle.uri, **card.model_dump(exclude={"files"}), "gate": gate})
        return
    rows = [
        ["bundle", bundle.version],
        ["folder", bundle.uri],
        ["backbone", f"{card.backbone}, {card.layers_kept} of {card.backbone_layers} layers, {card.pooling} pooling"],
        ["compressor", f"{card.compressor.kind}, {card.width} → {card.dim} dimensions"],
        *([name.replace("_", " "), f"{value:.4f}"] for name, value in card.metrics.items()),
    ]
    print_table("Bundle", ["", ""], rows)
    if comparison is not None:
        _print_comparison(comparison)


def _print_comparison(comparison: "BundleComparison") -> None:
    ranked = sorted(comparison.validation_auc, key=lambda name: -comparison.validation_auc[name])
    rows = [[name, f"{comparison.validation_auc[name]:.4f}", f"{comparison.auc[name]:.4f}"] for name in ranked]
    print_table("Gate: the validation part decides", ["", "validation AUC", "test AUC"], rows, right=(1, 2))
    if comparison.problems:
        print_table(None, [""], [[f"Bundle {comparison.candidate} was not promoted: {comparison.problems[0]}."]])
    if not comparison.beats_random:
        print_table(None, [""], [["No vector beats random ones: the texts say nothing about what users take."]])


COMMANDS = (train, evaluate, promote, demote)
