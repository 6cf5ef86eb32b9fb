"""Facts about one stored file, as a listing returns them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredObject:
    """One file below a listed uri.

    Attributes:
        uri: full uri.
        bytes: size in bytes.
        etag: digest of the content by the store; None for local files.
        modified: time of the last change, in seconds since 1970.
    """

    uri: str
    bytes: int
    etag: str | None = None
    modified: float = 0.0


def is_hidden(relative: str) -> bool:
    """Return whether a name, or one of its folders, begins with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in relative.split("/"))
