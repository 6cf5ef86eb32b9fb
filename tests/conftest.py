"""What the tests share: one Spark session, one tiny bundle, and where the real data lies."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from published import Site

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


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
    """A real catalogue of 7,787 titles; tests that want it skip where it is not."""
    path = SHARED / "data" / "netflix_titles.csv"
    if not path.is_file():
        pytest.skip("the real catalogue shared/data/netflix_titles.csv is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def published_scores() -> Path:
    """A table of published benchmark scores by layer; tests that want it skip where it is not."""
    path = SHARED / "data" / "mteb_layer_scores.csv"
    if not path.is_file():
        pytest.skip("the published scores shared/data/mteb_layer_scores.csv are not beside this checkout")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread for the module's tests: tiny models lose time by handing work between threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a real S3 server's clients; a machine has one at a time, and modules may run side by side."""
    from s3_server import running_s3

    with running_s3(SHARED / "tools" / "ceph-s3", tmp_path_factory.mktemp("s3") / "server") as environment:
        yield environment


@pytest.fixture
def s3_environment(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The same, for clients in this process."""
    from marc_pipeline.storage import s3

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    # Clients look for credentials once, when they are made.
    for made in (s3.boto3_s3, s3.arrow_s3):
        made.cache_clear()
    yield s3_server
    for made in (s3.boto3_s3, s3.arrow_s3):
        made.cache_clear()


@pytest.fixture(scope="session")
def spark() -> "Iterator[SparkSession]":
    """One Spark session for the whole run: starting one takes seconds."""
    from marc_pipeline.config import SparkSettings
    from marc_pipeline.spark.session import spark_session

    with spark_session(SparkSettings(master="local[2]"), name="tests") as session:
        yield session
