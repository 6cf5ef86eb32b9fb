"""Fixtures of all tests: paths of the repository and the real data, an empty site, an S3 server, a Spark session."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from example_counts import SLOW_PROFILE
from repository_paths import REPOSITORY, SHARED

settings.register_profile(SLOW_PROFILE)
# Make exports MARC_CONFIG; a test finds only the configuration that it names.
for name in [name for name in os.environ if name.startswith("MARC_")]:
    del os.environ[name]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Parallel test processes share the cores. With more threads than cores, torch and faiss mostly wait for one another.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_THREAD_LIMIT", str(max(1, (os.cpu_count() or 1) // WORKERS)))
# Spark's JVMs live for seconds or minutes: the optimising compiler and the parallel collector cost more than they save.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from published import Site

# These files start the S3 server, of which a machine runs one at a time: they share a process and take turns.
S3_FILES = {"test_storage.py", "test_faulty_proxy.py", "test_s3.py", "test_campaign.py"}


class Files(LoadFileScheduling):
    """Gives the tests of a file to one process, and all files that start the S3 server to the same process."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", maxsplit=1)[0]
        return "s3" if Path(file).name in S3_FILES else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """Return the scheduler of ``--dist loadfile``."""
    return Files(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return REPOSITORY


@pytest.fixture
def site(tmp_path: Path) -> "Site":
    """An empty feature table with its indexes and work area."""
    from published import Site

    return Site(tmp_path)


@pytest.fixture(scope="session")
def netflix() -> Path:
    """A real catalogue of 7,787 titles; tests that need it are skipped where it is missing."""
    path = SHARED / "data" / "netflix_titles.csv"
    if not path.is_file():
        pytest.skip("the real catalogue shared/data/netflix_titles.csv is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def office() -> list[dict[str, str]]:
    """A real catalogue of 3,459 office products; tests that need it are skipped where it is missing."""
    path = SHARED / "data" / "office" / "items.jsonl"
    if not path.is_file():
        pytest.skip("the real catalogue shared/data/office is not beside this checkout")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def published_scores() -> Path:
    """Published benchmark scores by layer; tests that need them are skipped where they are missing."""
    path = SHARED / "data" / "mteb_layer_scores.csv"
    if not path.is_file():
        pytest.skip("the published scores shared/data/mteb_layer_scores.csv are not beside this checkout")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread for the module's tests: for tiny models, several threads are slower than one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between attempts at the release stage, and no wait until files are on the disk."""
    from marc_pipeline.nightly import stages
    from marc_pipeline.storage import local

    monkeypatch.setattr(stages, "PUBLISH_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(local, "_flush", lambda _: None)


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables for clients of a real S3 server. One server runs per machine at a time."""
    from s3_server import running_s3

    with running_s3(SHARED / "tools" / "ceph-s3", tmp_path_factory.mktemp("s3") / "server") as environment:
        yield environment


@pytest.fixture
def s3_environment(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The S3 server's environment variables, set for clients in this process."""
    from marc_pipeline.storage import s3

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    # A client reads its credentials once, when it is created.
    clients = (s3.boto3_s3, s3.arrow_s3)
    for client in clients:
        client.cache_clear()
    yield s3_server
    for client in clients:
        client.cache_clear()


@pytest.fixture(scope="session")
def spark() -> "Iterator[SparkSession]":
    """One Spark session for the whole run: starting one takes seconds."""
    from marc_pipeline.config import SparkSettings
    from marc_pipeline.spark.session import spark_session

    # Tests have a few hundred rows: 200 partitions per shuffle would only cost time.
    wanted = SparkSettings(master="local[2]", conf={"spark.sql.shuffle.partitions": "2"})
    with spark_session(wanted, name="tests") as session:
        yield session
