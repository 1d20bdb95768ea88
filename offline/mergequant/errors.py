"""The one exception that means: the user's input is at fault, and the message says what to do."""


class InputError(ValueError):
    """One sentence that names the thing and the remedy; the command line prints it and exits 1."""


class DiskError(InputError):
    """A file that cannot be written: what was made before it is kept, for a run that continues."""
