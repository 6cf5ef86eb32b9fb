"""The errors that callers tell apart: what the user must mend, what a gate refused, what a retry may cure."""


class PipelineError(Exception):
    """Base of every error that is raised on purpose; ``exit_code`` is that of the command line."""

    exit_code = 1


class UserError(PipelineError):
    """A bad argument, configuration or input. Never worth a retry."""

    exit_code = 2


class GateRefused(PipelineError):
    """A quality gate said no; nothing was published. Never worth a retry."""

    exit_code = 3


class CorruptFile(PipelineError):
    """A file does not match its checksum. A retry reads the same bytes: it must be restored or rebuilt."""


class MissingFile(CorruptFile):
    """A file is not there. It was removed with its release, or it is lost."""


class ReleaseGone(UserError):
    """Retention gave the release up and its grace period is over; open the newest one."""


class Superseded(PipelineError):
    """Another run published, withdrew or removed what this one builds on; a run from the start begins with that."""

    exit_code = 4


class DiskFull(PipelineError, OSError):
    """A disk, or a quota, has no room left; a retry goes on from there once it has."""


class Unencodable(PipelineError):
    """A text that the tokenizer or the model fails on, also alone."""


class WorkerDied(PipelineError):
    """A worker process ended without a word on every try; a retry may find its device or its memory free."""
