"""A published file, with the checksums that readers verify it against."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

BLOCK_BYTES = 256 * 1024
BLOCK_DIGEST_CHARS = 16


class Contract(BaseModel):
    """Base of every model that is written down: immutable, unknown keys refused."""

    # NaN as a string: null would not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def _stays_inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leaves its folder")
    return path


RelativePath = Annotated[str, AfterValidator(_stays_inside)]


class PublishedFile(Contract):
    """One immutable file of a release.

    Attributes:
        path: relative to the root of its kind (table, index or bundle folder).
        bytes: size of the file.
        rows: rows or vectors in it, 0 where that has no meaning.
        sha256: of the whole file, hex.
        blocks: xxh3-64 of every 256 KiB block, 16 hex digits each: a reader verifies just what it touches.
    """

    path: RelativePath
    bytes: int
    rows: int = 0
    sha256: str
    blocks: str = ""
