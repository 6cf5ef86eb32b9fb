"""Commands that publish or withdraw releases: plan, run, backfill, rollback, vacuum."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from marc_pipeline.cli.options import Ds, Json, State, print_json, print_lines, print_table
from marc_pipeline.cli.releases import print_release
from marc_pipeline.config import EncodeSettings, parse_ds
from marc_pipeline.errors import UserError
from marc_pipeline.nightly.stages import cut_and_lost
from marc_schemas.plan import Plan

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from marc_pipeline.catalogue.rows import SampledText
    from marc_pipeline.catalogue.source import CatalogueSource
    from marc_pipeline.deployment import Deployment

# Sentences are counted in this many texts; a sentence in a larger share of them is a candidate for boilerplate.
BOILERPLATE_SAMPLE, BOILERPLATE_SHARE = 1000, 0.2


def plan(
    context: typer.Context,
    ds: Ds,
    bucket: Annotated[list[int] | None, typer.Option("--bucket", help="Show only these buckets.")] = None,
    sample: Annotated[
        int, typer.Option("--sample", min=0, help="Show this many texts before and after cleaning, changed ones first.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Show what a run would do: items, tokens, time and cost. Publishes nothing."""
    from marc_pipeline.nightly.plan_identity import identify_plan
    from marc_pipeline.nightly.stages import plan_stage
    from marc_pipeline.spark.session import configured_session

    deployment = context.ensure_object(State).deployment
    settings = deployment.settings
    identity = identify_plan(deployment, ds=parse_ds(ds))
    with configured_session(settings, name=f"marc plan {ds}") as spark:
        made = plan_stage(spark, deployment, identity)
        shown = _sampled(spark, deployment, identity.source, limit=sample) if sample else None
    unknown = sorted(set(bucket or []) - set(range(made.buckets)))
    if unknown:
        raise UserError(f"no bucket {unknown[0]}: the table has buckets 0 to {made.buckets - 1}")
    if bucket:
        made = made.model_copy(update={"work": tuple(work for work in made.work if work.bucket in bucket)})
    if as_json:
        print_json({**describe_plan(made, settings.encode), **({} if shown is None else asdict(shown))})
    else:
        print_plan(made, settings.encode)
        if shown is not None:
            print_sample(shown)


def run(context: typer.Context, ds: Ds, as_json: Json = False) -> None:
    """Run all stages for a date and publish a release. If the same catalogue is already published, do nothing."""
    from marc_pipeline.nightly.run import run_all

    deployment = context.ensure_object(State).deployment
    outcome = run_all(deployment, ds=parse_ds(ds))
    print_release(deployment, outcome.release, fresh=outcome.fresh, as_json=as_json)


def backfill(
    context: typer.Context,
    ds: Ds,
    bucket: Annotated[list[int] | None, typer.Option("--bucket", help="Replace only these buckets.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Re-encode unchanged items as well.")] = False,
    as_json: Json = False,
) -> None:
    """Replace a date, or some buckets of it. The date may be released or damaged. Other partitions stay unchanged."""
    from marc_pipeline.nightly.run import backfill as run_backfill

    deployment = context.ensure_object(State).deployment
    outcome = run_backfill(deployment, ds=parse_ds(ds), buckets=bucket or (), recompute=recompute)
    print_release(deployment, outcome.release, fresh=outcome.fresh, as_json=as_json)


def rollback(
    context: typer.Context,
    release_id: Annotated[str, typer.Argument(help="The release to restore; `marc releases` lists them.")],
    as_json: Json = False,
) -> None:
    """Roll back to an earlier release. Later dates are withdrawn. No file is deleted, and you can undo it."""
    from marc_pipeline.releases.roll_back import roll_back

    deployment = context.ensure_object(State).deployment
    rows = roll_back(deployment.storage, deployment.settings.table_uri, release_id)
    if as_json:
        done = [
            {"release_id": r.release_id, "ds": r.ds, "withdrawn": r.withdrawn, "restores": r.restores} for r in rows
        ]
        print_json({"rolled_back_to": release_id, "published": done})
    elif not rows:
        print_lines([f"release {release_id} is live already; nothing changed"])
    else:
        undo = "undo with `marc rollback"
        print_lines(
            [
                f"{r.ds}: withdrawn; {undo} {r.supersedes}`"
                if r.withdrawn
                else f"{r.ds}: release {r.release_id} restores the content of release {r.restores}"
                for r in rows
            ]
        )


def vacuum(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted; delete nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Retire old releases, and delete files that no release needs.

    Files of retired releases are kept for the grace period, for open readers and running jobs.
    """
    from marc_pipeline.releases import retention

    deployment = context.ensure_object(State).deployment
    done = retention.vacuum(deployment, dry_run=dry_run)
    if as_json:
        print_json({**asdict(done), "dry_run": dry_run})
        return
    would = "would be " if dry_run else ""
    kept = deployment.settings.retention
    print_table(
        None,
        ["", ""],
        [
            ["kept", f"{kept.days} dates, {kept.releases_per_day} releases of each; {kept.grace_hours:g} h of grace"],
            [f"{would}retired", ", ".join(done.retired) or "none"],
            [f"{would}forgotten", ", ".join(done.forgotten) or "none"],
            [f"{would}removed", f"{len(done.files):,} files, {done.bytes / 1e6:,.1f} MB"],
        ],
    )


def describe_plan(made: Plan, encode: EncodeSettings) -> dict[str, object]:
    """The JSON object of ``marc plan --json``."""
    totals = (
        *("items", "new", "changed", "unchanged", "deleted", "tokens", "tokens_error", "cut_texts", "lost_tokens"),
        "seconds",
    )
    return {
        **{name: getattr(made, name) for name in totals},
        "cost": encode.cost(made.seconds),
        **made.model_dump(mode="json", exclude={"work"}),
        "work": [work.model_dump(mode="json", exclude={"previous"}) for work in made.work],
    }


def print_plan(made: Plan, encode: EncodeSettings) -> None:
    """Print the buckets of a plan, then its totals."""
    names = ("items", "new", "changed", "unchanged", "deleted", "tokens")
    rows = [[str(work.bucket), *(f"{getattr(work, name):,}" for name in names)] for work in made.work]
    rows.append(["all", *(f"{getattr(made, name):,}" for name in names)])
    print_table(f"Plan {made.plan_id} of {made.ds}", ["bucket", *names], rows, right=tuple(range(7)))
    seconds = "unknown before the first run" if made.seconds is None else f"about {made.seconds:,.0f} s"
    quarantined = ", ".join(f"{count:,} {reason}" for reason, count in made.quarantined.items()) or "none"
    cost = encode.cost(made.seconds)
    facts = [
        ["bundle", made.bundle],
        ["compared with", made.base_release or "none: this is the first release"],
        ["rows read", f"{made.rows_read:,}"],
        ["quarantined", quarantined],
        ["tokens", _tokens(made)],
        *([["cut texts", cut_and_lost(made)]] if made.cut_texts else []),
        ["encode time", seconds],
        *([] if cost is None else [["cost", f"about {cost:,.2f}"]]),
    ]
    print_table(None, ["", ""], facts)


@dataclass(frozen=True)
class Sample:
    """The part of ``marc plan --sample``.

    Attributes:
        sample: texts before and after cleaning.
        sampled_texts: number of cleaned texts in which sentences were counted.
        boilerplate: sentences in more than a fifth of them, with the number of texts.
    """

    sample: "list[SampledText]"
    sampled_texts: int
    boilerplate: list[tuple[str, int]]


def _sampled(spark: "SparkSession", deployment: "Deployment", source: "CatalogueSource", *, limit: int) -> Sample:
    from marc_pipeline.catalogue.cleaning import common_sentences
    from marc_pipeline.catalogue.rows import sample_cleaned, sample_texts

    catalogue, storage = deployment.settings.catalogue, deployment.storage
    texts = sample_texts(spark, source, catalogue, storage=storage, limit=BOILERPLATE_SAMPLE)
    shown = sample_cleaned(spark, source, catalogue, storage=storage, limit=limit)
    return Sample(shown, len(texts), common_sentences(texts, BOILERPLATE_SHARE))


def print_sample(found: Sample) -> None:
    """Print texts before and after cleaning, and sentences that ``catalogue.boilerplate`` could remove."""
    rows = [
        [text.item_id, text.before, "unchanged" if text.after == text.before else text.after or "empty: quarantined"]
        for text in found.sample
    ]
    print_table("Texts before and after cleaning", ["item", "before", "after"], rows, lines=True)
    if found.boilerplate:
        counts = [[sentence, f"{count:,}"] for sentence, count in found.boilerplate]
        names = ["candidate for catalogue.boilerplate", f"of {found.sampled_texts:,} texts"]
        print_table(None, names, counts, right=(1,))


def _tokens(made: Plan) -> str:
    if made.tokens_exact:
        return f"{made.tokens:,} (exact)"
    share = made.tokens_error / made.tokens if made.tokens else 0.0
    return f"{made.tokens:,} ± {100 * share:.1f} % (from a sample)"


COMMANDS = (plan, run, backfill, rollback, vacuum)
