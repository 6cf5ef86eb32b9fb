"""A log after a power cut: incomplete commits, which nobody acknowledged, hide nothing and stop nothing."""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from deltalake import DeltaTable

from command_line import marc
from marc_pipeline.releases.log import FOLDER, read_log, read_releases, repair
from marc_pipeline.storage.delta import LOG_FOLDER, set_aside, shorten_log
from published import Site, items
from vacuumed import AT_ONCE, VacuumedSite

DAYS = ("2026-11-20", "2026-11-21")
NEXT = "2026-11-22"
CUT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "a torn last line": lambda whole: whole[:-9],
}


@pytest.fixture
def site(tmp_path: Path) -> VacuumedSite:
    """A site whose last commit, of the second date, was not acknowledged."""
    site = VacuumedSite(tmp_path)
    for seed, ds in enumerate(DAYS):
        site.publish(items(12, seed=seed), ds=ds)
    return site


def newest(folder: str) -> Path:
    """The newest commit of a Delta table."""
    return sorted(Path(folder, LOG_FOLDER).glob("*.json"))[-1]


def record(site: Site) -> Path:
    """The file that the newest commit of the release log adds."""
    folder = f"{site.table_uri}/{FOLDER}"
    actions = [json.loads(line) for line in newest(folder).read_text().splitlines()]
    (added,) = [action["add"]["path"] for action in actions if "add" in action]
    return Path(folder, added)


def dates(site: Site) -> list[str]:
    return [release.ds for release in site.log]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("what", ["commit", "record"])
def test_readers_see_the_releases_before_a_torn_commit_and_the_next_one_takes_its_place(
    site: VacuumedSite, name: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    torn = newest(f"{site.table_uri}/{FOLDER}") if what == "commit" else record(site)
    torn.write_bytes(CUT[name](torn.read_bytes()))
    caplog.set_level(logging.WARNING)
    assert dates(site) == dates(site) == [DAYS[0]]
    assert len([line for line in caplog.messages if "a power cut left commit" in line]) == 1
    site.publish(items(12, seed=2), ds=NEXT, plan_id="next")
    assert dates(site) == [DAYS[0], NEXT]
    site.assert_whole()
    # A run of the lost date publishes it again.
    site.publish(items(12, seed=1), ds=DAYS[1])
    assert dates(site) == [DAYS[0], NEXT, DAYS[1]]


def test_a_missing_record_is_a_torn_commit(site: VacuumedSite) -> None:
    record(site).unlink()
    assert dates(site) == [DAYS[0]]


@pytest.mark.parametrize("name", CUT)
def test_a_torn_commit_of_the_feature_table_is_replaced(site: VacuumedSite, name: str) -> None:
    torn = newest(site.table_uri)
    torn.write_bytes(CUT[name](torn.read_bytes()))
    third = items(12, seed=2)
    site.publish(third, ds=NEXT, plan_id="next")
    site.assert_live(third, ds=NEXT)
    # The files of the date with the torn commit are committed again by its next release, and readers have them anyway.
    site.assert_whole()


def test_several_torn_commits_are_set_aside_and_a_table_with_no_whole_commit_is_new(site: VacuumedSite) -> None:
    folder = f"{site.table_uri}/{FOLDER}"
    commits = sorted(Path(folder, LOG_FOLDER).glob("*.json"))
    for commit in commits[1:]:
        commit.write_bytes(b"")
    assert dates(site) == []
    assert len(repair(site.storage, site.table_uri)) == len(commits) - 1
    commits[0].write_bytes(b"{")
    assert read_log(site.storage, site.table_uri).table is None
    site.publish(items(12), ds=NEXT, plan_id="next")
    assert dates(site) == [NEXT]


def test_repair_says_what_it_set_aside_and_changes_nothing_else(tmp_path: Path) -> None:
    site = VacuumedSite(tmp_path / "data")
    site.publish(items(12), ds=DAYS[0])
    (tmp_path / "marc.yaml").write_text(
        f'root: {site.root}\ncatalogue: {{uri: "none/{{ds}}.csv", template: "{{title}}"}}\n'
    )
    assert marc(tmp_path, "repair").stdout == "nothing to repair: every commit is whole\n"
    site.publish(items(12), ds=DAYS[1])
    torn = newest(f"{site.table_uri}/{FOLDER}")
    torn.write_bytes(content := torn.read_bytes()[:50])
    found = json.loads(marc(tmp_path, "repair", "--json").stdout)["set_aside"]
    assert [Path(place).read_bytes() for place in found] == [content]
    assert not torn.exists()
    assert dates(site) == [DAYS[0]]


def test_a_commit_in_place_of_a_torn_one_is_not_set_aside(site: VacuumedSite) -> None:
    """Two runs find the same torn commit; the second one is slow, and the first one has committed meanwhile."""
    folder = f"{site.table_uri}/{FOLDER}"
    torn = newest(folder)
    whole = torn.read_bytes()
    torn.write_bytes(b"")
    lock = os.open(torn.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    moved: list[str] = []
    slow = threading.Thread(target=lambda: moved.extend(set_aside(site.storage, folder)))
    slow.start()
    slow.join(0.3)
    assert slow.is_alive()
    torn.write_bytes(whole)
    os.close(lock)
    slow.join()
    assert moved == []
    assert dates(site) == [*DAYS]


def test_a_vacuum_after_a_power_cut_keeps_the_releases(site: VacuumedSite) -> None:
    newest(f"{site.table_uri}/{FOLDER}").write_bytes(b"")
    site.vacuum(1, AT_ONCE)
    assert dates(site) == [DAYS[0]]
    site.assert_whole()


def test_a_log_is_read_with_a_checkpoint_and_without_the_commits_before_it(site: VacuumedSite) -> None:
    folder = f"{site.table_uri}/{FOLDER}"
    table = DeltaTable(folder)
    before = site.log
    shorten_log(site.storage, table, folder)
    kept = Path(folder, LOG_FOLDER)
    assert sorted(path.name for path in kept.glob("*checkpoint*")) == [
        f"{table.version():020}.checkpoint.parquet", "_last_checkpoint"
    ]  # fmt: skip
    for commit in sorted(kept.glob("*.json"))[:-1]:
        commit.unlink()
    assert read_releases(site.storage, site.table_uri) == before
