"""Errors that a user can mend.

Every command catches `PinclipError`, prints its one line and exits with code 2; anything else is a
bug of ours and keeps its traceback.  Ops raise `ValueError` for wrong arguments instead: they are a
library, and know no command line.
"""


class PinclipError(Exception):
    """A mistake in what the user gave us. The message is one line and names the file, key or value."""


class DataError(PinclipError):
    """A table, archive, image or edge that cannot be used as given."""


class ConfigError(PinclipError):
    """A configuration key or value that cannot be used as given."""


class CheckpointError(PinclipError):
    """A checkpoint that is missing, damaged, or belongs to another configuration."""
