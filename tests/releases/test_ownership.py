"""A vacuum deletes what belongs to its own table, also where folders are shared, moved or mixed up."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from marc_pipeline.config import Settings, load_settings
from marc_pipeline.errors import GateRefused, UserError
from marc_pipeline.releases import retention
from marc_pipeline.releases.ownership import OWNER, claim
from published import Site, items
from vacuumed import AT_ONCE, VacuumedSite

NEXT = "2026-11-21"


@dataclass(frozen=True)
class SharedSite(VacuumedSite):
    """A site whose table lies beside that of another site, with the same indexes and work area."""

    name: str = "item_vectors"

    @property
    def table_uri(self) -> str:
        return str(self.root / self.name)

    @property
    def settings(self) -> Settings:
        return super().settings.model_copy(update={"table_uri": self.table_uri})


def owners(site: Site) -> list[Path]:
    return [site.root / "indexes" / OWNER, site.root / "work" / "plans" / OWNER]


def test_a_second_table_is_refused_before_it_writes_and_its_vacuum_deletes_nothing(tmp_path: Path) -> None:
    first, second = SharedSite(tmp_path), SharedSite(tmp_path, name="other_vectors")
    live = first.publish(items(12))
    before = first.files()
    with pytest.raises(
        UserError, match=r"belongs to another table, \.\./item_vectors as seen from there.*set index_uri"
    ):
        second.publish(items(9))
    with pytest.raises(UserError, match="belongs to another table"):
        second.vacuum(1000, AT_ONCE)
    assert first.files() == before
    first.assert_whole(live)


def test_files_from_before_the_claim_are_kept_unless_a_release_named_them(tmp_path: Path) -> None:
    """Two tables shared their folders before there were claims; the first one to run again claims them."""
    first, second = SharedSite(tmp_path), SharedSite(tmp_path, name="other_vectors")
    live = second.publish(items(9, seed=1), plan_id="second")
    for owner in owners(second):
        owner.unlink()
    old = first.publish(items(12), plan_id="first")
    for owner in owners(first):
        os.utime(owner, (owner.stat().st_mtime + 60,) * 2)
    first.publish(items(12, seed=2), plan_id="again")
    first.vacuum(1000, AT_ONCE)
    second.assert_whole(live)
    assert first.written_by(old) == set()


def test_without_a_claim_a_vacuum_deletes_only_what_releases_named(tmp_path: Path) -> None:
    site = VacuumedSite(tmp_path)
    dead = site.dead_run(items(12, seed=5), plan_id="dead")
    old, _ = site.publish(items(12)), site.publish(items(12, seed=1), plan_id="again")
    for owner in owners(site):
        owner.unlink()
    unclaimed = {path for path in site.written_by(dead) if not path.startswith(site.table_uri)}
    site.vacuum(1000, AT_ONCE)
    assert site.written_by(old) == set()
    assert site.written_by(dead) == unclaimed != set()
    site.assert_whole()


def test_a_moved_site_still_owns_its_folders(tmp_path: Path) -> None:
    site = VacuumedSite(tmp_path / "here")
    old = site.publish(items(12))
    shutil.copytree(site.root, tmp_path / "there")
    moved = VacuumedSite(tmp_path / "there")
    claim(moved.deployment)
    moved.publish(items(12, seed=1), plan_id="again")
    moved.vacuum(1000, AT_ONCE)
    assert moved.written_by(old) == set()
    site.assert_whole(old)


def test_the_claim_of_a_table_that_is_gone_can_be_deleted(tmp_path: Path) -> None:
    SharedSite(tmp_path, name="gone").publish(items(9), plan_id="gone")
    shutil.rmtree(tmp_path / "gone")
    site = SharedSite(tmp_path)
    for owner in owners(site):
        with pytest.raises(UserError, match=f"or delete {owner} if that table is gone"):
            claim(site.deployment)
        owner.unlink()
    claim(site.deployment)
    assert [json.loads(owner.read_text()) for owner in owners(site)] == [
        {"table": "../item_vectors"}, {"table": "../../item_vectors"}
    ]  # fmt: skip


def test_a_vacuum_with_another_index_uri_than_the_releases_is_refused(tmp_path: Path) -> None:
    site = VacuumedSite(tmp_path)
    site.publish(items(12))
    site.publish(items(12, seed=1), plan_id="again")
    elsewhere = site.with_retention(AT_ONCE)
    elsewhere = elsewhere.with_settings(elsewhere.settings.model_copy(update={"index_uri": str(tmp_path / "empty")}))
    before, log = site.files(), site.log
    with pytest.raises(UserError, match=r"none of the \d+ files of releases is in .*empty, the index_uri"):
        retention.vacuum(elsewhere)
    assert (site.files(), site.log) == (before, log)


def test_a_vacuum_of_more_orphans_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "FEW_ORPHANS", 5)
    site = VacuumedSite(tmp_path)
    site.publish(items(12))
    for number in range(3):
        site.dead_run(items(12, seed=9 + number), ds=NEXT, plan_id=f"dead {number}")
    before = site.files()
    with pytest.raises(GateRefused, match=r"files belong to no release of .*, the limit is 0\.5 of them"):
        site.vacuum(1000)
    assert site.files() == before
    assert site.vacuum(1000, AT_ONCE.model_copy(update={"max_orphan_fraction": 1.0})).files
    site.assert_whole()


OVERLAPS = {
    "equal": {"index_uri": "data/bundles"},
    "inside": {"work_uri": "data/item_vectors/work"},
    "around": {"table_uri": "data"},
    "through a link": {"bundle_uri": "link"},
    "on S3": {"table_uri": "s3://shop/a/", "index_uri": "s3://shop/a/indexes"},
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlapping_folders_are_refused_when_they_are_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "data" / "work").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "work")
    lines = "".join(f"{key}: {uri}\n" for key, uri in OVERLAPS[name].items())
    config = tmp_path / "marc.yaml"
    config.write_text(f'catalogue: {{uri: "c/{{ds}}.csv", template: "{{title}}"}}\n{lines}')
    with pytest.raises(UserError, match="overlap"):
        load_settings(config)


def test_folders_with_a_common_beginning_do_not_overlap(tmp_path: Path) -> None:
    config = tmp_path / "marc.yaml"
    config.write_text(
        'catalogue: {uri: "c/{ds}.csv", template: "{title}"}\ntable_uri: data/index\nindex_uri: data/indexes\n'
    )
    assert load_settings(config).table_uri.endswith("index")
