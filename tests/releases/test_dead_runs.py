"""Files of runs that died: vacuum deletes them after the grace period, and touches no file of others."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from deltalake import DeltaTable

from day_content import OTHERS, THIRD, TOMORROW, VECTORS, YESTERDAY, held, plain
from marc_pipeline.config import RetentionSettings
from marc_pipeline.deployment import Deployment
from marc_pipeline.reader.release import open_release
from marc_pipeline.releases import retention
from marc_pipeline.releases.log import read_log
from marc_pipeline.releases.retention import Removal, vacuum
from marc_pipeline.storage import STAGED_PREFIX
from published import BUCKETS, DS, Encoded, items
from vacuumed import AT_ONCE, GRACE, LEAST, LONG_AGO, VacuumedSite, after, write_at

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def site(tmp_path: Path) -> VacuumedSite:
    return VacuumedSite(tmp_path / "site")


def half_encoded(site: VacuumedSite) -> Encoded:
    encoded = site.encoded(VECTORS, plan_id="dead")
    for bucket in (1, 3):
        Path(encoded.workspace.uri, "receipts", f"{bucket:05d}.json").unlink()
    return encoded


# These runs have the live release's vectors: except for the plan, its index file has the same name.
@pytest.mark.parametrize(
    "reached",
    [
        pytest.param(lambda site: site.encoded(VECTORS, plan_id="dead"), id="encoded"),
        pytest.param(half_encoded, id="half encoded"),
        pytest.param(lambda site: site.prepared(VECTORS, plan_id="dead"), id="indexed"),
    ],
)
def test_every_file_of_a_dead_run_is_deleted_after_the_grace_period(
    site: VacuumedSite, reached: Callable[[VacuumedSite], Encoded]
) -> None:
    live = site.publish(VECTORS, plan_id="live")
    before = site.files()
    dead = reached(site)
    left = site.files().keys() - before.keys()
    assert left == site.written_by(dead)
    assert site.vacuum(GRACE - 0.1) == Removal((), (), (), 0)
    assert site.files().keys() == before.keys() | left
    done = site.vacuum(GRACE + 0.1)
    assert (done.retired, done.forgotten, set(done.files)) == ((), (), left)
    assert site.files() == before
    site.assert_readable(live)


def test_partial_files_of_killed_writers_are_deleted_after_the_grace_period(site: VacuumedSite) -> None:
    live = site.publish(VECTORS)
    left = {
        Path(site.table_uri) / f"ds={DS}" / "bucket=1" / f"{STAGED_PREFIX}0a",
        Path(site.table_uri) / f"ds={TOMORROW}" / "bucket=0" / f"{STAGED_PREFIX}0b",
        Path(site.index_uri) / live.plan_id / f"{STAGED_PREFIX}0c",
        Path(site.index_uri) / ("f" * 32) / f"{STAGED_PREFIX}0d",
        site.root / "work" / "plans" / ("f" * 32) / "receipts" / f"{STAGED_PREFIX}0e",
    }
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    fresh = Path(site.table_uri) / f"ds={DS}" / "bucket=1" / f"{STAGED_PREFIX}0f"
    fresh.write_bytes(b"less")
    write_at({str(fresh)}, after(1))
    before = site.files().keys() - {str(path) for path in left}
    assert site.vacuum(GRACE - 0.1).files == ()
    done = site.vacuum(GRACE + 0.1)
    assert set(done.files) == {str(path) for path in left}
    assert done.bytes == 4 * len(left)
    assert site.files().keys() == before
    assert not (Path(site.table_uri) / f"ds={TOMORROW}").exists()
    site.assert_readable(live)


def test_files_of_dead_runs_are_deleted_before_the_first_release_too(site: VacuumedSite) -> None:
    site.encoded(VECTORS, plan_id="only encoded")
    site.dead_run(OTHERS, plan_id="nearly there")
    bundle = {path for path in site.files() if path.startswith(site.bundles_uri)}
    done = site.vacuum(GRACE + 0.1)
    assert site.files().keys() == bundle
    assert len(done.files) > 2 * BUCKETS
    assert site.committed() == set()


@pytest.mark.parametrize("fresh", ["/receipts/00002.json", "/indexes/", "/bucket=2/"])
def test_a_run_that_wrote_one_file_lately_keeps_all_its_files(site: VacuumedSite, fresh: str) -> None:
    site.publish(VECTORS, plan_id="live")
    working, dead = (site.prepared(v, plan_id=name) for name, v in (("working", OTHERS), ("dead", THIRD)))
    before, now = site.files(), after(0)
    site.claimed_at(LONG_AGO)
    write_at(site.written_by(working) | site.written_by(dead), now - timedelta(hours=GRACE + 6))
    write_at({path for path in site.written_by(working) if fresh in path}, now - timedelta(hours=GRACE - 1))
    done = vacuum(site.with_retention(), now=now)
    assert set(done.files) == {path for path in before if dead.plan.plan_id[:16] in path}
    assert site.files().keys() == before.keys() - set(done.files)
    site.assert_readable(working.release())


# --- files of others


def test_foreign_files_and_files_of_delta_are_never_deleted(site: VacuumedSite) -> None:
    site.publish(VECTORS, ds=YESTERDAY)
    site.publish(OTHERS)
    table, key = Path(site.table_uri), "0123456789abcdef"
    foreign = [
        table / "README",
        table / "_SUCCESS",
        table / f"ds={DS}" / "bucket=1" / "notes.txt",
        table / f"ds={DS}" / "bucket=1" / "part-00000-c000.snappy.parquet",
        table / f"ds={DS}" / "bucket=1" / f"part-{key}-{key}.parquet.bak",
        table / "_delta_log" / "README",
        site.root / "README",
        site.root / "work" / "README",
        Path(site.bundles_uri) / "dead-bundle" / "bundle.json",
        # Files beside the folders of the plans.
        *(
            site.root / folder / name
            for folder in ("indexes", "work/plans")
            for name in ("README", key, "backup/index.faiss")
        ),
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    logs = {str(path) for name in ("_delta_log", "_releases") for path in site.root.rglob(f"{name}/**/*.*")}
    assert len(logs) > 4
    done = site.vacuum(1000, AT_ONCE)
    assert done.forgotten
    assert not {path for path in done.files if "_delta_log" in path or "_releases" in path}
    assert [path.read_text() for path in foreign] == ["mine"] * len(foreign)
    assert all(Path(path).exists() for path in logs)


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param(lambda root: f"{root.parent}//{root.name}", id="two slashes"),
        pytest.param(lambda root: f"{root.parent}/./{root.name}", id="a dot"),
        pytest.param(lambda root: f"{root}/../{root.name}", id="up and down"),
        pytest.param(lambda root: str(root.parent / "link"), id="link"),
    ],
)
def test_a_vacuum_of_a_site_under_another_spelling_of_its_path_deletes_nothing(
    site: VacuumedSite, spelling: Callable[[Path], str]
) -> None:
    made = site.publish(VECTORS)
    (site.root.parent / "link").symlink_to(site.root)
    root, before = spelling(site.root), site.files()
    there = Deployment(site.settings.model_copy(update={"root": root, "retention": LEAST}), site.storage)
    opened = open_release(there.settings.table_uri)
    assert opened.search(VECTORS["item-3"], k=1)[0].tolist() == [["item-3"]]
    assert vacuum(there, now=after(1000)).files == ()
    assert site.files() == before
    site.assert_readable(made)


# --- the Delta table and the logs


@pytest.mark.parametrize("live_ds", [DS, YESTERDAY], ids=["same date", "another date"])
def test_files_that_a_dead_run_committed_leave_the_delta_table(site: VacuumedSite, live_ds: str) -> None:
    first = site.publish(VECTORS, ds=live_ds, plan_id="live")
    dead = site.dead_run(OTHERS, plan_id="dead")
    version = DeltaTable(site.table_uri).version()
    site.vacuum(GRACE - 0.1)
    assert DeltaTable(site.table_uri).version() == version
    done = site.vacuum(GRACE + 0.1)
    assert not site.written_by(dead)
    assert not site.committed() & set(done.files)
    assert held(site, ds=live_ds) == plain(VECTORS)
    assert site.assert_live(VECTORS) == first
    made = site.publish(OTHERS, plan_id="dead")
    site.assert_readable(made)
    assert site.committed(DS) == {f"{site.table_uri}/{file.path}" for file in made.table.files}


def test_files_that_a_dead_run_committed_stay_while_a_release_names_them(site: VacuumedSite) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    site.dead_run(VECTORS, plan_id="first")
    site.vacuum(GRACE + 0.1, RetentionSettings())
    site.assert_readable(first, second)
    # Now no release names the files of the first plan.
    site.vacuum(GRACE + 0.1, AT_ONCE)
    assert site.assert_live(OTHERS) == second


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_vacuum_of_an_empty_site_creates_and_deletes_nothing(site: VacuumedSite, dry_run: bool) -> None:
    assert site.vacuum(1000, AT_ONCE, dry_run=dry_run) == Removal((), (), (), 0)
    assert not site.root.exists()


def test_a_reader_that_has_the_log_open_can_read_on(site: VacuumedSite) -> None:
    site.publish(VECTORS, plan_id="first")
    site.publish(OTHERS, plan_id="second")
    table = read_log(site.storage, site.table_uri).table
    assert table is not None
    wanted = table.to_pyarrow_table().num_rows
    assert site.vacuum(1000, AT_ONCE).forgotten
    assert table.to_pyarrow_table().num_rows == wanted == 2


def test_a_vacuum_shortens_both_delta_logs(site: VacuumedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        site.publish(items(8, seed=number), plan_id=f"plan {number}")
    rows, before = site.log, site.committed()
    logs = [Path(site.table_uri) / "_delta_log", Path(site.table_uri) / "_releases" / "_delta_log"]
    write_at({str(path) for log in logs for path in log.iterdir()}, after(-24 * 60))
    monkeypatch.setattr(retention, "LOG_GRACE_HOURS", 0)
    commits = [path for log in logs for path in log.glob("*.json")]
    assert site.vacuum(0, RetentionSettings(releases_per_day=3, grace_hours=0)).forgotten == (rows[0].release_id,)
    assert sum(path.exists() for path in commits) <= len(logs)
    assert site.log == rows[1:]
    assert site.committed() == before
    newest = DeltaTable(f"{site.table_uri}/_releases").file_uris()
    assert {path.name for path in logs[1].parent.glob("*.parquet")} == {Path(uri).name for uri in newest}
    made = site.publish(VECTORS)
    assert made.supersedes == rows[-1].release_id
    assert made.turn > rows[-1].turn
