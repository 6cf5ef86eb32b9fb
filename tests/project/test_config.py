"""Settings and entry points: one line per mistake, variables override the file, paths are relative to the file."""

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
from marc_pipeline.cli.app import main
from marc_pipeline.config import CatalogueSettings, Settings, TrainSettings, load_settings, parse_ds
from marc_pipeline.config.sections import placeholders
from marc_pipeline.errors import CorruptFile, GateRefused, PipelineError, Superseded, UserError
from marc_pipeline.jobs.arguments import job
from marc_pipeline.scheduler.tasks import identify_nightly
from marc_pipeline.uris import absolute_uri

GOOD = 'catalogue: {uri: "in/{ds}.csv", template: "{title}. {genres}"}\n'


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the configuration file, without ``MARC_…`` variables in the environment."""
    for name in [name for name in os.environ if name.startswith("MARC_")]:
        monkeypatch.delenv(name)
    return tmp_path / "marc.yaml"


def load(path: Path, text: str) -> Settings:
    path.write_text(text, encoding="utf-8")
    return load_settings(path)


def test_every_key_but_the_catalogue_has_a_default_and_cannot_be_changed(config: Path) -> None:
    settings = load(config, GOOD)
    assert (settings.buckets, settings.index.k, settings.audit.max_drift) == (16, 10, 0.25)
    assert settings.catalogue.text_columns == ["title", "genres"]
    with pytest.raises(ValueError, match="frozen"):
        settings.buckets = 3  # type: ignore[misc]


def test_relative_paths_are_relative_to_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("slash", ["", "/"])
def test_uris_default_below_the_root(config: Path, slash: str) -> None:
    settings = load(config, GOOD + f"root: s3://bucket/prefix{slash}\nbundle_uri: s3://models/marc/\n")
    assert (settings.table_uri, settings.index_uri, settings.work_uri, settings.bundle_uri) == (
        "s3://bucket/prefix/item_vectors", "s3://bucket/prefix/indexes", "s3://bucket/prefix/work", "s3://models/marc"
    )  # fmt: skip


def test_file_uris_and_home_folders_are_local_paths(tmp_path: Path) -> None:
    given = ("file:///a/b/", "~/x", "a/b", "s3://a/b/")
    expected = ["/a/b", f"{Path.home()}/x", f"{tmp_path}/a/b", "s3://a/b"]
    assert [absolute_uri(uri, tmp_path) for uri in given] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "bukets: 3\n", "unknown key bukets"),
        (GOOD + "audit: {max_drfit: 1}\n", "unknown key audit.max_drfit"),
        (GOOD + "index: {k: 0}\n", "index.k: Input should be greater than or equal to 1 (got 0)"),
        (GOOD + "buckets: many\n", "buckets: Input should be a valid integer"),
        (GOOD + "encode: {device: tpu}\n", "encode.device: Input should be 'auto', 'cpu' or 'cuda' (got 'tpu')"),
        (GOOD + "encode: {long_texts: pool}\ntrain: {regime: tuned}\n", "set encode.long_texts to cut"),
        ("buckets: 3\n", "catalogue is missing"),
        ("", "catalogue is missing"),
        ("catalogue: {uri: x}\n", "catalogue.template is missing"),
        (
            'catalogue: {uri: "x/{day}", template: "{t}"}\n',
            "only the placeholder {ds} is allowed in catalogue.uri, not ['day']",
        ),
        ("- a\n- b\n", "is not a valid YAML mapping"),
        ("catalogue: [\n", "is not a valid YAML mapping"),
        ("catalogue:\n\turi: x\n", "is not a valid YAML mapping"),
        (b"\xff\xfe", "is not a valid YAML mapping"),
        *(
            (f'catalogue: {{uri: x, template: "{template}"}}\n', f"catalogue.template: {message}")
            for template, message in [
                ("plain text", "the template names no column"),
                ("{{title}}", "the template names no column"),
                ("{title", "expected '}' before end of string"),
                ("title}", "Single '}' encountered"),
                *(
                    (field, f"{field!r}: write plain column names")
                    for field in ("{}", "{title!r}", "{title:>10}", "{0}")
                ),
            ]
        ),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line_with_file_and_key(
    config: Path, text: str | bytes, message: str
) -> None:
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        load_settings(config)
    assert str(refused.value).startswith(str(config))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_bad_key_is_named_at_once(config: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key one; unknown key two|unknown key two; unknown key one"):
        load(config, GOOD + "one: 1\ntwo: 2\n")


def test_a_missing_file_is_the_users_error(config: Path) -> None:
    message = r"no configuration at .*marc.yaml; write one, pass --config or set MARC_CONFIG"
    with pytest.raises(UserError, match=message):
        load_settings(config)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_ ]{0,10}", fullmatch=True)
literals = st.text(max_size=8).map(lambda text: text.replace("{", "{{").replace("}", "}}"))


@given(st.lists(st.tuples(literals, names), min_size=1, max_size=6))
def test_the_columns_of_a_template_are_its_placeholders_in_order(parts: list[tuple[str, str]]) -> None:
    template = "".join(f"{literal}{{{name}}}" for literal, name in parts)
    wanted = [name for _, name in parts]
    assert placeholders(template) == wanted
    columns = CatalogueSettings(uri="x", template=template).text_columns
    assert columns == sorted(set(wanted), key=wanted.index)


def test_variables_override_single_keys_of_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {"BUCKETS": "8", "AUDIT__MAX_DRIFT": "0.5", "CATALOGUE__URI": "/other/{ds}.csv", "ROOT": "/elsewhere"}
    for name, value in overrides.items():
        monkeypatch.setenv(f"MARC_{name}", value)
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


@pytest.mark.parametrize(
    "value",
    ["20261120", "2026-W47-5", "2026-2-3", "2026-02-30", "", "2026-11-20T00:00:00", " 2026-11-20", "٢٠٢٦-١١-٢٠", "now"],
)
def test_other_notations_of_a_date_are_refused_with_an_example(value: str) -> None:
    with pytest.raises(UserError, match="write YYYY-MM-DD, for example 2026-11-20"):
        parse_ds(value)


@given(st.dates().map(str) | st.text(max_size=12))
def test_only_dates_are_accepted(value: str) -> None:
    try:
        is_date = datetime.datetime.strptime(value, "%Y-%m-%d").date().isoformat() == value
    except ValueError:
        is_date = False
    if is_date:
        assert parse_ds(value) == value
    else:
        with pytest.raises(UserError):
            parse_ds(value)


@pytest.fixture
def _logging() -> Iterator[None]:
    """Restores the logging that an entry point changes."""
    root, ours = logging.getLogger(), logging.getLogger("marc_pipeline")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    # basicConfig(force=True) closes the handlers that it finds, also those of pytest.
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("wrong"), 2, "wrong"),
        (GateRefused("wrong"), 3, "wrong"),
        (CorruptFile("wrong"), 1, "wrong"),
        (Superseded("wrong"), 4, "wrong"),
        (PipelineError("wrong"), 1, "wrong"),
        (NoCredentialsError(), 1, "NoCredentialsError: Unable to locate credentials"),
    ],
)
def test_an_error_becomes_one_line_and_its_exit_code(
    caplog: pytest.LogCaptureFixture, error: Exception, code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as left, entry.reported_errors():
        raise error
    assert left.value.code == code
    assert [(record.levelname, record.message, bool(record.exc_info)) for record in caplog.records] == [
        ("ERROR", message, False)
    ]


@pytest.mark.parametrize(
    "text", ["spark: {conf: ['spark.hadoop.fs.s3a.secret.key=hunter2']}", "storage: {endpoint_url: [hunter2]}"]
)
def test_values_of_sections_with_secrets_are_not_repeated(config: Path, text: str) -> None:
    config.write_text(GOOD + text)
    with pytest.raises(UserError, match=r"(spark.conf|storage.endpoint_url): ") as error:
        load_settings(config)
    assert "hunter2" not in str(error.value)


def test_an_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), entry.reported_errors():
        raise ZeroDivisionError


def command_line(given: str) -> None:
    sys.argv = ["marc", *(["--config", given] if given else []), "releases"]
    main()


def run_job(*arguments: str) -> None:
    sys.argv = ["job", *arguments]
    with job("Does something."):
        pass


def spark_job(given: str) -> None:
    run_job(*(["--config", given] if given else []), "--ds", "2026-11-20", "--plan-id", "p")


def scheduler(given: str) -> None:
    entry.configure_logging()
    with entry.reported_errors():
        identify_nightly(ds="2026-11-20", config=given)


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
    ("arguments", "message"),
    [
        (["--plan-id", "p"], "--ds"),
        (["--ds", "2026-11-20"], "--plan-id"),
        (["--ds", "20261120", "--plan-id", "p"], "ERROR '20261120' is not a date; write YYYY-MM-DD"),
    ],
)
def test_a_job_with_bad_arguments_exits_with_2(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    config.write_text(GOOD)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as left:
        run_job("--config", str(config), *arguments)
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (2, "")
    assert message in printed.err


def test_paths_of_a_linked_configuration_are_relative_to_the_link(config: Path) -> None:
    target = config.parent / "mounted"
    target.mkdir()
    (target / "v1.yaml").write_text(GOOD)
    config.symlink_to(target / "v1.yaml")
    assert load_settings(config).table_uri == f"{config.parent}/data/item_vectors"


def test_defaults_of_a_section_do_not_count_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An adopted recommendation may fill keys that are not configured.
    path = tmp_path / "marc.yaml"
    path.write_text("catalogue: {uri: x, template: '{title}'}\ntrain: {dim: 8}\n")
    monkeypatch.setenv("MARC_TRAIN__POOLING", "mean")
    settings = load_settings(path)
    assert settings.train.model_fields_set == {"dim", "pooling"}
    assert settings.layers.model_fields_set == set()
    assert (settings.train.dim, settings.train.epochs) == (8, TrainSettings().epochs)
