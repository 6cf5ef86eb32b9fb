"""Errors that callers distinguish: mistakes of the user, refusals of a gate, and failures that a retry may fix."""


class PipelineError(Exception):
    """Base of all deliberate errors; ``exit_code`` is the exit code of the command line."""

    exit_code = 1


class UserError(PipelineError):
    """A bad argument, configuration or input. A retry does not help."""

    exit_code = 2


class GateRefused(PipelineError):
    """A quality gate refused the release; the table is unchanged. A retry does not help."""

    exit_code = 3


class CorruptFile(PipelineError):
    """A file does not match its checksum. A retry does not help; restore or rebuild the file."""


class MissingFile(CorruptFile):
    """A file is missing: it was deleted with its release, or it is lost."""


class ReleaseGone(UserError):
    """The release was retired and its grace period is over; open the newest release."""


class Superseded(PipelineError):
    """Another run published, withdrew or deleted the release that this run builds on. Run again from the start."""

    exit_code = 4


class DiskFull(PipelineError, OSError):
    """A disk or a quota is full. Free space and retry; the retry continues where the run stopped."""


class Unencodable(PipelineError):
    """The tokenizer or the model fails on a text, even when it is the only one in its batch."""


class WorkerDied(PipelineError):
    """A worker process died without an error message on every try. Retry when memory or device is free."""
