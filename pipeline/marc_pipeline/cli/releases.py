"""Commands that show published releases, and repair their log: files, verify, repair, releases, summary."""

import shlex
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from marc_pipeline.cli.item_texts import item_texts, shortened
from marc_pipeline.cli.options import At, Ds, Json, MaybeDs, State, print_json, print_lines, print_table
from marc_pipeline.config import parse_ds
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.nightly.stages import cut_and_lost, planned_and_actual
from marc_pipeline.releases import log as release_log
from marc_pipeline.work_area import Workspace
from marc_schemas.feature_table import MANTISSA_BITS
from marc_schemas.release import IndexFacts, Release, TableFacts

if TYPE_CHECKING:
    from marc_pipeline.reader.release import OpenRelease


def files(context: typer.Context, ds: MaybeDs = None, at: At = None, as_json: Json = False) -> None:
    """Print the Parquet files of a release, one per line. Any engine that reads Parquet can use them."""
    with open_chosen(context.ensure_object(State).deployment, ds, at) as release:
        if as_json:
            print_json({"release_id": release.facts.release_id, "ds": release.facts.ds, "files": release.files()})
        else:
            print_lines(release.files())


def verify(context: typer.Context, ds: MaybeDs = None, as_json: Json = False) -> None:
    """Verify every byte of a release. Covers files, checksums, rows, bundle and index. Exit code 1 means problems."""
    from marc_pipeline.reader.verify import verify as check

    deployment = context.ensure_object(State).deployment
    storage, table_uri = deployment.storage, deployment.settings.table_uri
    release = release_log.find_release(storage, table_uri, ds=parse_ds(ds) if ds else None)
    problems = check(storage, release, table_uri=table_uri)
    if as_json:
        print_json({"release_id": release.release_id, "ds": release.ds, "ok": not problems, "problems": problems})
    elif problems:
        print_lines(problems)
    else:
        checked = f"{len(release.table.files) + len(release.index.files)} files, {release.counts.items:,} items"
        print_lines([f"release {release.release_id} of {release.ds} is intact: {checked}"])
    if problems:
        raise CorruptFile(f"release {release.release_id} has {len(problems)} problems")


def repair(context: typer.Context, as_json: Json = False) -> None:
    """Set commits aside that a power cut left incomplete. No run acknowledged them; a publication does the same."""
    deployment = context.ensure_object(State).deployment
    found = release_log.repair(deployment.storage, deployment.settings.table_uri)
    if as_json:
        print_json({"set_aside": found})
    else:
        print_lines([f"set aside as {uri}" for uri in found] or ["nothing to repair: every commit is whole"])


def releases(
    context: typer.Context,
    ds: Annotated[str | None, typer.Option("--ds", help="List only the releases of this date; default: all.")] = None,
    as_json: Json = False,
) -> None:
    """List the releases, newest last, with the state of each. Readers of a date see its live release."""
    deployment = context.ensure_object(State).deployment
    found = release_log.read_releases(deployment.storage, deployment.settings.table_uri)
    if ds is not None:
        found = [release for release in found if release.ds == parse_ds(ds)]
    states = _states(found)
    if as_json:
        listed = [{**r.facts(), "created_at": r.created_at.isoformat(), "state": states[r.release_id]} for r in found]
        print_json({"releases": listed})
        return
    rows = [
        [f"{r.release_id}\n{r.bundle.version}", f"{r.ds} {states[r.release_id]}\n{r.index.recall:.4f}", _counts(r)]
        for r in found
    ]
    print_table(None, ["release\nbundle", "date and state\nrecall", "items\nchanges"], rows, lines=True)


def summary(
    context: typer.Context,
    ds: Ds,
    since: Annotated[
        float | None, typer.Option(help="Unix time, in seconds. An older release is shown as: nothing to do.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the release of a date. Prints counts, locations, timings, and one example look-up with texts."""
    deployment = context.ensure_object(State).deployment
    with open_chosen(deployment, ds) as opened:
        release = opened.facts
    fresh = since is None or release.created_at.timestamp() >= since
    print_release(deployment, release, fresh=fresh, as_json=as_json)


def print_release(deployment: Deployment, release: Release, *, fresh: bool, as_json: bool) -> None:
    """Print counts, locations, timings and one example look-up; ``fresh`` if the last run published the release."""
    if as_json:
        print_json({**release.facts(), "fresh": fresh})
        return
    counts = release.counts
    if fresh:
        done = (
            f"{counts.encoded:,} texts encoded ({counts.new:,} new and {counts.changed:,} changed items), "
            f"{counts.reused:,} vectors reused, {counts.deleted:,} items removed, "
            f"{counts.quarantined:,} rows quarantined"
        )
    else:
        done = "nothing: this catalogue is published already. 0 texts encoded, no new release"
    seconds = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in release.seconds.items())
    facts = [
        ["done", done],
        ["items", f"{counts.items:,} vectors of {release.table.dim} dimensions, bundle {release.bundle.version}"],
        *([["space", release.audit.space.described(release.table.dim)]] if release.audit.space else []),
        ["table", f"{release.table.uri} ({_table(release.table)})"],
        ["index", f"{release.index.uri} ({_index(release.index)})"],
        *([["cut texts", cut_and_lost(counts)]] if fresh and counts.cut_texts else []),
        *([["quarantine", release.quarantine_uri]] if release.quarantine_uri else []),
        *([["time", seconds]] if fresh else []),
        *([["encode", _planned(deployment, release)]] if fresh and counts.tokens else []),
        ["look-up", _example(deployment, release)],
    ]
    print_table(f"Release {release.release_id} of {release.ds}", ["", ""], facts)


def open_chosen(deployment: Deployment, ds: str | None, at: str | None = None) -> "OpenRelease":
    """Open the release that the options select."""
    from marc_pipeline.reader.release import open_release

    return open_release(
        deployment.settings.table_uri,
        ds=parse_ds(ds) if ds else None,
        at=_moment(at) if at else None,
        storage=deployment.storage,
    )


def _index(index: IndexFacts) -> str:
    figures, facts = index.figures, [index.factory]
    recall = f"recall@{index.k} {index.recall:.4f}"
    if figures.recall_low < figures.recall_high:
        recall += f" (of all items {figures.recall_low:.4f} to {figures.recall_high:.4f})"
    facts += [recall, f"{figures.latency_ms:.2f} ms a query", f"{index.bytes_per_item:,.0f} bytes per item"]
    if index.build.tombstones:
        facts.append(f"{index.build.tombstones:,} tombstones")
    return ", ".join(facts)


def _table(table: TableFacts) -> str:
    facts = [f"version {table.version}", f"{len(table.files)} files", f"{table.bytes_per_item:,.0f} bytes per item"]
    if table.mantissa_bits < MANTISSA_BITS:
        facts.append(f"{table.mantissa_bits} mantissa bits")
    return ", ".join(facts)


def _planned(deployment: Deployment, release: Release) -> str:
    plan, seconds = Workspace.of(deployment, release.plan_id).read_plan(), release.seconds.get("encode", 0.0)
    if plan is None:
        return f"{release.counts.tokens:,} tokens, {seconds:,.1f} s"
    return planned_and_actual(plan, tokens=release.counts.tokens, seconds=seconds)


def _counts(release: Release) -> str:
    """The number of items and, on a second line, the changes; counts of zero are left out."""
    counts = ("new", "changed", "reused", "deleted", "quarantined")
    changes = ", ".join(f"{count:,} {name}" for name in counts if (count := getattr(release.counts, name)))
    return f"{release.counts.items:,} items\n{changes}".rstrip()


def _example(deployment: Deployment, release: Release) -> str:
    """One example look-up and its result, with texts. Only the required blocks are read."""
    from marc_pipeline.reader.release import OpenRelease

    with OpenRelease(release, uri=deployment.settings.table_uri, storage=deployment.storage) as opened:
        first = opened.first_item()
        names, scores = opened.similar([first], min(3, release.counts.items))
        near = [(name, score) for name, score in zip(names[0], scores[0], strict=True) if name is not None]
        texts = item_texts(deployment, opened, [first, *(name for name, _ in near)])

    def line(item: str, mark: str) -> str:
        return f"{mark}: {shortened(texts[item])}" if item in texts else mark

    answer = [line(name, f"→ {name} ({score:.3f})") for name, score in near]
    return "\n".join([f"marc lookup --item {shlex.quote(first)} -k 3", line(first, first), *answer])


def _states(releases: list[Release]) -> dict[str, str]:
    """The state of each release: live, superseded, withdrawal or retired."""
    live = {release.release_id for release in release_log.live_releases(releases).values()}
    kinds = {r.release_id: "live" if r.release_id in live else "superseded" for r in releases}
    kinds |= {r.release_id: "withdrawal" for r in releases if r.withdrawn}
    return kinds | {r.release_id: f"retired {r.retired_at:%Y-%m-%d %H:%M}" for r in releases if r.retired_at}


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"--at {text!r} is not a time; write it like 2026-11-20T06:00:00+00:00") from None


COMMANDS = (files, verify, repair, releases, summary)
