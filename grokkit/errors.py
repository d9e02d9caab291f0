"""The errors grokkit raises for bad input; all are `ValueError`s."""


class GrokkitError(ValueError):
    """Bad input. The message says what was expected, what was found and what to do."""


class ConfigError(GrokkitError):
    """A model configuration that is inconsistent or does not fit the mesh."""


class CheckpointError(GrokkitError):
    """A checkpoint file that is missing, damaged, unsafe or of the wrong shape."""


class TokenizerError(GrokkitError):
    """A tokenizer that does not fit the model, or ids it does not have."""


class PromptError(GrokkitError):
    """A prompt or sampling setting that cannot be honoured."""


class SiteError(GrokkitError):
    """A capture or edit that names a site, layer, head, expert or shape that does not exist."""


class CaptureError(GrokkitError):
    """Captures on disk that are incomplete, damaged, or of another request."""


class ProcessError(GrokkitError):
    """Processes that should work together and do not fit, or do not find each other."""
