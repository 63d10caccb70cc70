"""Vision transformers and local attention at scale, in JAX."""

__version__ = "0.1.0"


class UserError(ValueError):
    """What a user can mend: a flag, a field, a file or a number. Its text is one sentence; commands exit with code 2.

    Every other exception is a fault of the program or of the machine: commands exit with code 1 and launchers start
    the command again.
    """


class TransientError(RuntimeError):
    """A fault of the machine that a restart may cure: a dead worker, a stuck read, a missing process, a full disk.

    Its text is one sentence, which commands print without a traceback; they exit with code 1.
    """
