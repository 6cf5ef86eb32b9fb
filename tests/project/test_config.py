"""Settings and entry points: one-line errors, overriding variables, paths relative to the configuration file."""

import datetime
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError
from hypothesis import given
from hypothesis import strategies as st

from marc_pipeline import entry
from marc_pipeline.cli import main
from marc_pipeline.config import (
    CatalogueSettings,
    Settings,
    TrainSettings,
    absolute_uri,
    load_settings,
    parse_ds,
    placeholders,
)
from marc_pipeline.errors import CorruptFile, GateRefused, PipelineError, Superseded, UserError
from marc_pipeline.jobs.arguments import job
from marc_pipeline.scheduler.tasks import identify_night

GOOD = 'catalogue: {uri: "in/{ds}.csv", template: "{title}. {genres}"}\n'


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a configuration file; variables of the environment are unset."""
    for name in [name for name in os.environ if name.startswith("MARC_")]:
        monkeypatch.delenv(name)
    return tmp_path / "marc.yaml"


def load(path: Path, text: str) -> Settings:
    path.write_text(text, encoding="utf-8")
    return load_settings(path)


def templated(template: str) -> str:
    """A configuration with this text template."""
    return f'catalogue: {{uri: x, template: "{template}"}}\n'


def test_every_key_but_the_catalogue_has_a_default_and_settings_are_frozen(config: Path) -> None:
    settings = load(config, GOOD)
    assert (settings.buckets, settings.index.k, settings.audit.max_drift) == (16, 10, 0.25)
    assert settings.catalogue.text_columns == ["title", "genres"]
    with pytest.raises(ValueError, match="frozen"):
        settings.buckets = 3  # type: ignore[misc]


def test_relative_paths_are_relative_to_the_file_wherever_the_process_runs(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(GOOD + "work_uri: ../scratch\nindex_uri: /absolute/index\n")
    elsewhere = config.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for settings in (load_settings(config), load_settings("../marc.yaml")):
        assert settings.catalogue.uri == f"{config.parent}/in/{{ds}}.csv"
        assert settings.catalogue_uri("2026-11-20") == f"{config.parent}/in/2026-11-20.csv"
        assert settings.table_uri == f"{config.parent}/data/item_vectors"
        assert Path(settings.work_uri).resolve() == (config.parent.parent / "scratch").resolve()
        assert settings.index_uri == "/absolute/index"


def test_uris_follow_the_root_unless_they_are_given(config: Path) -> None:
    settings = load(config, GOOD + "root: s3://bucket/prefix/\nbundle_uri: s3://models/marc/\n")
    assert settings.table_uri == "s3://bucket/prefix/item_vectors"
    assert settings.index_uri == "s3://bucket/prefix/indexes"
    assert settings.work_uri == "s3://bucket/prefix/work"
    assert settings.bundle_uri == "s3://models/marc"


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [("file:///a/b/", "/a/b"), ("~/x", f"{Path.home()}/x"), ("a/b", "/folder/a/b"), ("s3://a/b/", "s3://a/b")],
)
def test_file_uris_and_home_folders_are_local_paths(uri: str, absolute: str) -> None:
    assert absolute_uri(uri, Path("/folder")) == absolute


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "bukets: 3\n", "unknown key bukets"),
        (GOOD + "audit: {max_drfit: 1}\n", "unknown key audit.max_drfit"),
        (GOOD + "index: {k: 0}\n", "index.k: Input should be greater than or equal to 1 (got 0)"),
        (GOOD + "buckets: many\n", "buckets: Input should be a valid integer"),
        (GOOD + "encode: {device: tpu}\n", "encode.device: Input should be 'auto', 'cpu' or 'cuda' (got 'tpu')"),
        ("buckets: 3\n", "catalogue is missing"),
        ("", "catalogue is missing"),
        ("catalogue: {uri: x}\n", "catalogue.template is missing"),
        ('catalogue: {uri: "x/{day}", template: "{t}"}\n', "only {ds} can stand in catalogue.uri, not ['day']"),
        ("- a\n- b\n", "is no valid YAML mapping"),
        ("catalogue: [\n", "is no valid YAML mapping"),
        ("catalogue:\n\turi: x\n", "is no valid YAML mapping"),
        (b"\xff\xfe", "is no valid YAML mapping"),
        (None, "no configuration at {file}; write one, pass --config or set MARC_CONFIG"),
        (GOOD + "one: 1\ntwo: 2\n", "unknown key one; unknown key two"),
        (templated("plain text"), "names no column"),
        (templated("{{title}}"), "names no column"),
        (templated("{title"), "expected '}' before end of string"),
        (templated("title}"), "Single '}' encountered"),
        (templated("{}"), "plain column names"),
        (templated("{title!r}"), "plain column names"),
        (templated("{title:>10}"), "plain column names"),
        (templated("{0}"), "plain column names"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line_that_names_file_and_key(
    config: Path, text: str | bytes | None, message: str
) -> None:
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        load_settings(config)
    assert str(refused.value).startswith((str(config), "no configuration at"))
    assert message.replace("{file}", str(config)) in str(refused.value)
    assert "\n" not in str(refused.value)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_ ]{0,10}", fullmatch=True)
literals = st.text(max_size=8).map(lambda text: text.replace("{", "{{").replace("}", "}}"))


@given(st.lists(st.tuples(literals, names), min_size=1, max_size=6))
def test_the_columns_of_a_template_are_its_placeholders_in_order(parts: list[tuple[str, str]]) -> None:
    template = "".join(f"{literal}{{{name}}}" for literal, name in parts)
    wanted = [name for _, name in parts]
    assert placeholders(template) == wanted
    columns = CatalogueSettings(uri="x", template=template).text_columns
    assert columns == sorted(set(wanted), key=wanted.index)


def test_variables_win_over_the_file_and_leave_their_neighbours_alone(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARC_BUCKETS", "8")
    monkeypatch.setenv("MARC_AUDIT__MAX_DRIFT", "0.5")
    monkeypatch.setenv("MARC_CATALOGUE__URI", "/other/{ds}.csv")
    monkeypatch.setenv("MARC_ROOT", "/elsewhere")
    settings = load(config, GOOD + "buckets: 4\naudit: {max_drift: 0.1, max_deleted_fraction: 0.2}\nroot: here\n")
    assert settings.buckets == 8
    assert (settings.audit.max_drift, settings.audit.max_deleted_fraction) == (0.5, 0.2)
    assert (settings.catalogue.uri, settings.catalogue.template) == ("/other/{ds}.csv", "{title}. {genres}")
    assert settings.work_uri == "/elsewhere/work"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MARC_BUCKETS", "none", "buckets: Input should be a valid integer"),
        ("MARC_AUDIT__MAX_DRFIT", "1", "unknown key audit.max_drfit"),
        ("MARC_BUKETS", "4", "MARC_BUKETS overrides no key"),
    ],
)
def test_a_bad_variable_is_refused_like_a_bad_key(
    config: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        load(config, GOOD)


@given(st.dates())
def test_every_date_reads_as_itself(day: datetime.date) -> None:
    assert parse_ds(str(day)) == str(day)


@pytest.mark.parametrize(
    "value",
    ["20261120", "2026-W47-5", "2026-2-3", "2026-02-30", "", "2026-11-20T00:00:00", " 2026-11-20", "٢٠٢٦-١١-٢٠", "now"],
)
def test_anything_but_a_date_is_refused_with_an_example(value: str) -> None:
    with pytest.raises(UserError, match="write YYYY-MM-DD, for example 2026-11-20"):
        parse_ds(value)


@given(st.text(max_size=12))
def test_no_other_text_is_a_date(value: str) -> None:
    try:
        expected = datetime.datetime.strptime(value, "%Y-%m-%d").date().isoformat() == value
    except ValueError:
        expected = False
    if expected:
        assert parse_ds(value) == value
    else:
        with pytest.raises(UserError):
            parse_ds(value)


@pytest.fixture
def _logging() -> Iterator[None]:
    """Restore the logging that an entry point configures."""
    root, ours = logging.getLogger(), logging.getLogger("marc_pipeline")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    # basicConfig(force=True) closes all handlers: hide those of pytest.
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("the limit is 3"), 2, "the limit is 3"),
        (GateRefused("the limit is 3"), 3, "the limit is 3"),
        (CorruptFile("the limit is 3"), 1, "the limit is 3"),
        (Superseded("the limit is 3"), 4, "the limit is 3"),
        (PipelineError("the limit is 3"), 1, "the limit is 3"),
        (NoCredentialsError(), 1, "NoCredentialsError: Unable to locate credentials"),
    ],
)
def test_an_expected_error_becomes_one_line_and_an_exit_code(
    caplog: pytest.LogCaptureFixture, error: Exception, code: int, line: str
) -> None:
    with pytest.raises(SystemExit) as left, entry.reported_errors():
        raise error
    assert left.value.code == code
    assert [(one.levelname, one.message, bool(one.exc_info)) for one in caplog.records] == [("ERROR", line, False)]


@pytest.mark.parametrize(
    "text", ["spark: {conf: ['spark.hadoop.fs.s3a.secret.key=hunter2']}", "storage: {endpoint_url: [hunter2]}"]
)
def test_errors_do_not_repeat_possible_secrets(config: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"(spark.conf|storage.endpoint_url): ") as error:
        load(config, GOOD + text)
    assert "hunter2" not in str(error.value)


def test_any_other_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), entry.reported_errors():
        raise ZeroDivisionError


def command_line(given: str) -> None:
    sys.argv = ["marc", *(["--config", given] if given else []), "releases"]
    main()


def spark_job(given: str) -> None:
    sys.argv = ["job", *(["--config", given] if given else []), "--ds", "2026-11-20", "--plan-id", "p"]
    with job("Does something."):
        pass


def scheduler(given: str) -> None:
    entry.configure_logging()
    with entry.reported_errors():
        identify_night(ds="2026-11-20", config=given)


@pytest.mark.usefixtures("_logging")
@pytest.mark.parametrize("entry_point", [command_line, spark_job, scheduler])
@pytest.mark.parametrize(
    ("given", "variable", "wanted"),
    [
        ("given.yaml", None, "given.yaml"),
        ("given.yaml", "variable.yaml", "given.yaml"),
        ("/elsewhere/given.yaml", "variable.yaml", "/elsewhere/given.yaml"),
        ("", "variable.yaml", "variable.yaml"),
        ("", "/elsewhere/variable.yaml", "/elsewhere/variable.yaml"),
        ("", "", "marc.yaml"),
        ("", None, "marc.yaml"),
    ],
)
def test_every_entry_point_finds_the_configuration_by_the_same_rule(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    entry_point: Callable[[str], None],
    given: str,
    variable: str | None,
    wanted: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(config.parent)
    if variable is not None:
        monkeypatch.setenv("MARC_CONFIG", variable)
    with pytest.raises(SystemExit) as left:
        entry_point(given)
    assert left.value.code == 2
    assert f"no configuration at {config.parent / wanted}; write one" in capsys.readouterr().err


@pytest.mark.usefixtures("_logging")
def test_a_job_reads_its_arguments_and_its_configuration(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(GOOD)
    monkeypatch.setattr(sys, "argv", ["job", "--config", str(config), "--ds", "2026-11-20", "--plan-id", "p1"])
    with job("Does something.") as called:
        assert (called.ds, called.plan_id) == ("2026-11-20", "p1")
        assert called.deployment.settings.model_dump() == load_settings(config).model_dump()


@pytest.mark.usefixtures("_logging")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--plan-id", "p"], "--ds"),
        (["--ds", "2026-11-20"], "--plan-id"),
        (["--ds", "20261120", "--plan-id", "p"], "ERROR '20261120' is no date; write YYYY-MM-DD"),
    ],
)
def test_a_job_with_bad_arguments_exits_with_2_and_reports_on_standard_error(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    message: str,
) -> None:
    config.write_text(GOOD)
    monkeypatch.setattr(sys, "argv", ["job", "--config", str(config), *given])
    with pytest.raises(SystemExit) as left, job("Does something."):
        pass
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (2, "")
    assert message in printed.err


def test_a_configuration_behind_a_symbolic_link_belongs_where_the_link_is(config: Path) -> None:
    target = config.parent / "mounted"
    target.mkdir()
    (target / "v1.yaml").write_text(GOOD)
    config.symlink_to(target / "v1.yaml")
    assert load_settings(config).table_uri == f"{config.parent}/data/item_vectors"


def test_a_key_with_its_default_does_not_count_as_set(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adopted training may fill it."""
    monkeypatch.setenv("MARC_TRAIN__POOLING", "mean")
    settings = load(config, GOOD + "train: {dim: 8}\n")
    assert settings.train.model_fields_set == {"dim", "pooling"}
    assert settings.layers.model_fields_set == set()
    assert (settings.train.dim, settings.train.epochs) == (8, TrainSettings().epochs)
