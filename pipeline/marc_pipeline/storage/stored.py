"""What a listing says about one file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredObject:
    """One file below a listed uri.

    Attributes:
        uri: its full uri.
        bytes: its size.
        etag: changes whenever the content does; None for local files.
        modified: when the content last changed, in seconds since 1970.
    """

    uri: str
    bytes: int
    etag: str | None = None
    modified: float = 0.0


def is_hidden(relative: str) -> bool:
    """Whether a name, or a folder that it lies in, begins with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in relative.split("/"))
