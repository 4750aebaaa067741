"""Every refusal of the package: one sentence that says what is wrong, where, and what would be right."""

from __future__ import annotations


class EmbedGradError(Exception):
    """Base class of all refusals; the command line prints the message and exits with 2."""


class ConfigError(EmbedGradError):
    """A run's configuration, or an argument, is not usable."""


class DataError(EmbedGradError):
    """A data file or an example is not usable."""


class TemplateError(EmbedGradError):
    """A template cannot be rendered."""


class ModelError(EmbedGradError):
    """A checkpoint cannot be read, or holds a model that is not supported."""


class PromptError(EmbedGradError):
    """A prompt, or a prompt file, cannot be used (with this model)."""


class ContextError(EmbedGradError):
    """A sequence does not fit into the model's context."""


class BackendError(EmbedGradError):
    """A backend or a device was asked for that is not there."""


class TrainingError(EmbedGradError):
    """An optimisation cannot go on."""


class SaveError(EmbedGradError):
    """A file could not be written; what was there before is untouched."""
