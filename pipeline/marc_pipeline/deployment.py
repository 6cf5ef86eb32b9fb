"""A deployment: the settings of one ``marc.yaml`` and access to its storage."""

from dataclasses import dataclass, replace

from marc_pipeline.config import Settings
from marc_pipeline.storage import Storage


@dataclass(frozen=True)
class Deployment:
    """Settings and storage. The command line, the jobs and the scheduler open it once and pass it down.

    It is picklable, so that Spark tasks can carry it.
    """

    settings: Settings
    storage: Storage

    def with_settings(self, settings: Settings) -> "Deployment":
        """Return the same storage with other settings, for example with the number of layers that was chosen."""
        return replace(self, settings=settings)


def open_deployment(settings: Settings) -> Deployment:
    """Open the storage of a configuration. Only the command line, the jobs and the scheduler call this."""
    return Deployment(settings, Storage(**settings.storage.model_dump()))
