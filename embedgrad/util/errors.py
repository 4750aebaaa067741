"""The errors that the package raises on purpose.

A message is one sentence: what is wrong, where, and what would be right.
"""

from __future__ import annotations

from embedgrad.util.shown import cut, one_line

_LONGEST = 2000  # characters of a message


class EmbedGradError(Exception):
    """Base class of the package's errors. The command line prints the message and exits with code 2.

    A message may quote a file. So it is cut to a bounded length, and what a terminal would obey is escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(cut(str(message), _LONGEST)))


class ConfigError(EmbedGradError):
    """A run's configuration or an argument is invalid."""


class DataError(EmbedGradError):
    """A data file or an example is invalid."""


class TemplateError(EmbedGradError):
    """A template cannot be rendered."""


class ModelError(EmbedGradError):
    """A model's checkpoint cannot be read, or its architecture is not supported."""


class PromptError(EmbedGradError):
    """A prompt or a prompt file is invalid, or does not belong to the model."""


class ContextError(EmbedGradError):
    """A sequence does not fit into the model's context."""


class BackendError(EmbedGradError):
    """The requested backend or device is not available."""


class TrainingError(EmbedGradError):
    """An optimisation cannot continue, or a loss, gradient or likelihood is not finite."""


class SaveError(EmbedGradError):
    """A file could not be written. The file that was there before is unchanged."""


class ExportError(EmbedGradError):
    """A target of an export cannot express what it should hold, or its check failed."""


class RankLost(EmbedGradError):
    """Another process has ended or cannot be reached."""


class ToldElsewhere(EmbedGradError):
    """Another process has failed and has said why; there is nothing to add."""
