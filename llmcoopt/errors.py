"""Every error of this package. Each is an `Error` and also the built-in exception that callers would expect.

A message says what was found, what was expected, and where (file, tensor or argument). The C core raises these classes by name.
"""


class Error(Exception):
    """The base of all errors raised by llmcoopt."""


class ArgumentError(Error, ValueError):
    """An argument is wrong."""


class FormatError(Error, ValueError):
    """A file, a configuration or a tensor does not hold what it should."""


class MissingFileError(Error, FileNotFoundError):
    """A file or model is not there."""


class OutOfMemoryError(Error, MemoryError):
    """Memory could not be had."""


class OutOfPagesError(Error, MemoryError):
    """The key/value cache has no free page."""


class NumericError(Error, ArithmeticError):
    """NaN or infinity where a number must be."""


class StorageError(Error, OSError):
    """A file could not be read or written."""


class ForkError(Error, RuntimeError):
    """An object made before fork() was used after it."""


class UnsupportedError(Error, NotImplementedError):
    """Known, but not implemented or not available on this machine."""
