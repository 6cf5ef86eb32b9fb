"""The identity of a plan: plan_id is a hash of the date, the catalogue, the bundle and the settings."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from marc_pipeline.catalogue.source import CatalogueSource, find_source
from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError
from marc_pipeline.model.bundle import Bundle, open_bundle
from marc_pipeline.releases import log as release_log
from marc_schemas.bundle import LongTexts
from marc_schemas.feature_table import bucket_number
from marc_schemas.identity import digest
from marc_schemas.plan import FORMAT_VERSION
from marc_schemas.release import Release

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanIdentity:
    """The inputs of a plan, and the plan_id made of them. Known before Spark starts.

    Attributes:
        plan_id: hash of the inputs below.
        ds: date of the snapshot.
        source: the catalogue of the date.
        bundle: the current bundle; for chosen buckets, the bundle of the date's release.
        buckets: number of buckets; for chosen buckets, that of the date's release.
        mantissa_bits: number of mantissa bits that vectors are stored with.
        long_texts: whether texts beyond the bundle's maximum are cut or pooled.
        chosen: buckets of a backfill; None for the whole date.
        recompute: whether vectors of unchanged texts are computed again as well.
    """

    plan_id: str
    ds: str
    source: CatalogueSource
    bundle: Bundle
    buckets: int
    mantissa_bits: int
    long_texts: LongTexts
    chosen: tuple[int, ...] | None = None
    recompute: bool = False


def identify_plan(
    deployment: Deployment, *, ds: str, chosen: Sequence[int] = (), recompute: bool = False
) -> PlanIdentity:
    """Find the catalogue and the bundle of a date, and compute the plan_id of a run. Needs no Spark.

    Args:
        deployment: settings and storage.
        ds: date of the snapshot.
        chosen: buckets to replace in the release of the date; empty for the whole date. A date without a release is
            always planned whole, because a release contains all buckets.
        recompute: re-encode unchanged items as well.

    Raises:
        UserError: no catalogue for the date, no bundle, or buckets that the release of the date does not have.
    """
    settings, storage = deployment.settings, deployment.storage
    seen = release_log.read_log(storage, settings.table_uri).live(ds) if chosen or recompute else None
    live = seen if chosen else None
    if chosen and live is None:
        log.warning("plan: %s has no release, so the whole date is planned instead of buckets %s", ds, list(chosen))
    if live is not None:
        _require_replaceable(settings, live, chosen)
    bundle = open_bundle(storage, live.bundle.uri if live else settings.bundle_uri)
    buckets = live.table.buckets if live else settings.buckets
    some = tuple(sorted(set(chosen))) if live else None
    source = find_source(settings.catalogue, settings.catalogue_uri(ds), ds=ds, storage=storage)
    files = sorted((file.uri.rsplit("/", 1)[1], file.digest) for file in source.files)
    wanted = settings.catalogue
    parts = [
        FORMAT_VERSION, ds, files, source.format, wanted.id_column, wanted.updated_at_column, wanted.rendering,
        bundle.version, buckets, settings.mantissa_bits, settings.encode.long_texts, some,
        _recomputed(seen, some) if recompute else None,
    ]  # fmt: skip
    return PlanIdentity(
        plan_id=digest(parts),
        ds=ds,
        source=source,
        bundle=bundle,
        buckets=buckets,
        mantissa_bits=settings.mantissa_bits,
        long_texts=settings.encode.long_texts,
        chosen=some,
        recompute=recompute,
    )


def _recomputed(live: Release | None, chosen: tuple[int, ...] | None) -> list[str]:
    """Files whose vectors are recomputed; as part of the plan_id, they make a repeated recomputation a new plan."""
    files = live.table.files if live else ()
    return [file.path for file in files if chosen is None or bucket_number(file.path) in chosen]


def _require_replaceable(settings: Settings, live: Release, chosen: Sequence[int]) -> None:
    unknown = sorted(set(chosen) - set(range(live.table.buckets)))
    if unknown:
        raise UserError(f"no bucket {unknown[0]}: release {live.release_id} has buckets 0 to {live.table.buckets - 1}")
    if live.table.template != settings.catalogue.rendering:
        raise UserError(
            f"release {live.release_id} of {live.ds} was made with template {live.table.template!r}, the configuration "
            f"has {settings.catalogue.rendering!r}: backfill the whole date"
        )
    if live.table.mantissa_bits != settings.mantissa_bits:
        raise UserError(
            f"release {live.release_id} of {live.ds} stores {live.table.mantissa_bits} mantissa bits, the "
            f"configuration has {settings.mantissa_bits}: backfill the whole date"
        )
    if live.table.long_texts != settings.encode.long_texts:
        raise UserError(
            f"release {live.release_id} of {live.ds} was made with encode.long_texts {live.table.long_texts}, the "
            f"configuration has {settings.encode.long_texts}: backfill the whole date"
        )


def require_expected(identity: PlanIdentity, expected: str | None) -> None:
    """Compare the plan_id with the one that an earlier task of the run announced.

    Raises:
        UserError: the catalogue, the bundle or the settings changed in between.
    """
    if expected is not None and identity.plan_id != expected:
        raise UserError(
            f"the catalogue, the bundle or the settings of {identity.ds} changed while the run was under way: plan "
            f"{expected} is now {identity.plan_id}; start the run again"
        )
