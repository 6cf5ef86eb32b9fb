"""A published file with its checksums, and the base class of all contracts."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

BLOCK_BYTES = 256 * 1024
BLOCK_DIGEST_CHARS = 16


class Contract(BaseModel):
    """Base of every stored model: immutable, unknown keys refused."""

    # NaN is written as a string, because null could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def _stays_inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leads out of its folder")
    return path


RelativePath = Annotated[str, AfterValidator(_stays_inside)]


class PublishedFile(Contract):
    """One immutable file of a release.

    Attributes:
        path: path relative to the table, index or bundle folder.
        bytes: size of the file.
        rows: number of rows or vectors; 0 for other files.
        sha256: SHA-256 of the whole file, hexadecimal.
        blocks: xxh3-64 of every 256 KiB block, 16 hexadecimal digits each, so that readers can verify single blocks.
    """

    path: RelativePath
    bytes: int
    rows: int = 0
    sha256: str
    blocks: str = ""
