"""Texts of items, shown beside item ids."""

from collections.abc import Iterable
from textwrap import shorten
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from marc_pipeline.deployment import Deployment
from marc_pipeline.table.rows import plan_id_of
from marc_pipeline.work_area import Workspace
from marc_schemas.feature_table import bucket_number
from marc_schemas.identity import row_id

if TYPE_CHECKING:
    from marc_pipeline.reader.release import OpenRelease

SHOWN_CHARACTERS = 90


def item_texts(deployment: Deployment, release: "OpenRelease", ids: Iterable[str]) -> dict[str, str]:
    """Texts by item id, from the work areas of the plans that wrote the table's files.

    Items whose work area was deleted are missing from the result.
    """
    storage, table_uri, ids = deployment.storage, deployment.settings.table_uri, sorted(set(ids))
    wanted = {row_id(item) % release.facts.table.buckets for item in ids}
    found: dict[str, str] = {}
    for file in release.facts.table.files:
        if (bucket := bucket_number(file.path)) not in wanted:
            continue
        workspace = Workspace.of(deployment, plan_id_of(storage, table_uri, file))
        plan = workspace.read_plan()
        if plan is None:
            continue
        filesystem, path = storage.filesystem(workspace.items_uri(bucket, plan.base_release))
        try:
            rows = pq.read_table(
                path, filesystem=filesystem, columns=["item_id", "text"], filters=[("item_id", "in", ids)]
            )
        except FileNotFoundError:
            continue
        found.update(zip(rows["item_id"].to_pylist(), rows["text"].to_pylist(), strict=True))
    return found


def shortened(text: str) -> str:
    """A text on one line, cut to the width of a table cell."""
    return shorten(text, SHOWN_CHARACTERS, placeholder=" …")
