"""Puts the jars that let Spark read s3a:// beside the jars of pyspark, each checked against its SHA-1."""

import argparse
import hashlib
import re
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# hadoop-aws must be of the Hadoop that pyspark bundles; the other two are the versions that it was built with
# (aws-java-sdk-v2.version and amazon-s3-analyticsaccelerator-s3.version of hadoop-project). The sums are those
# that Maven Central publishes beside the files.
HADOOP = "3.5.0"


class Jar(NamedTuple):
    """One file of a Maven repository."""

    folder: str
    name: str
    sha1: str


JARS = (
    Jar(
        f"org/apache/hadoop/hadoop-aws/{HADOOP}",
        f"hadoop-aws-{HADOOP}.jar",
        "9e594525d264c0db653c7f68da98b245f7d61ea5",
    ),
    Jar(
        "software/amazon/awssdk/bundle/2.35.4",
        "bundle-2.35.4.jar",
        "7252265e3970b214708e68a8b74a8fa8c875af1e",
    ),
    Jar(
        "software/amazon/s3/analyticsaccelerator/analyticsaccelerator-s3/1.3.1",
        "analyticsaccelerator-s3-1.3.1.jar",
        "6c9bd0f6c440c9a78e82d272f5f0252d942419f6",
    ),
)


def jars_folder() -> Path:
    """Where the installed pyspark keeps its jars."""
    spec = find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise SystemExit("pyspark is not installed here: install the extra 'spark' first")
    return Path(spec.origin).parent / "jars"


def bundled_hadoop(folder: Path) -> str:
    """The Hadoop version among the jars of pyspark."""
    for jar in folder.glob("hadoop-client-api-*.jar"):
        if found := re.fullmatch(r"hadoop-client-api-(.+)\.jar", jar.name):
            return found[1]
    raise SystemExit(f"no hadoop-client-api among the jars in {folder}")


def fetch(jar: Jar, folder: Path, *, repository: str) -> Path:
    """Download one jar; nothing stays behind under its name unless the checksum agrees."""
    url = f"{repository.rstrip('/')}/{jar.folder}/{jar.name}"
    part, digest = folder / f"{jar.name}.part", hashlib.sha1(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=60) as source, part.open("wb") as target:  # noqa: S310 – a build argument
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
        if digest.hexdigest() != jar.sha1:
            raise SystemExit(f"{url} has SHA-1 {digest.hexdigest()}, expected {jar.sha1}")
        return part.replace(folder / jar.name)
    finally:
        part.unlink(missing_ok=True)


def main() -> None:
    """Fetch what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", default="https://repo1.maven.org/maven2")
    repository = parser.parse_args().repository
    folder = jars_folder()
    if bundled_hadoop(folder) != HADOOP:
        raise SystemExit(
            f"pyspark bundles Hadoop {bundled_hadoop(folder)}, the jars here are for {HADOOP}: "
            f"take hadoop-aws and its dependencies of that version in {Path(__file__).name}"
        )
    for jar in JARS:
        sys.stdout.write(f"{fetch(jar, folder, repository=repository)}\n")


if __name__ == "__main__":
    main()
