"""The errors that the package raises on purpose.

A message is one sentence: what is wrong, where, and what would be right.
"""

from __future__ import annotations


class EmbedGradError(Exception):
    """Base class of the package's errors. The command line prints the message and exits with code 2."""


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
