"""The errors that multint raises: one family, so that one `except` catches every mistake in a call."""


class MultintError(ValueError, RuntimeError):
    """A mistake in what multint was given. The message says what, got, expected, and the remedy where there is one.

    PyTorch raises now a ValueError and now a RuntimeError for such a mistake, so this is both.
    """


class ShapeError(MultintError):
    """A tensor, or a number of features, does not fit."""


class OptionError(MultintError):
    """A setting is unknown or out of its range."""


class OptionTypeError(OptionError, TypeError):
    """A setting is of another type than expected, for which PyTorch raises a TypeError."""


class SquareError(OptionError):
    """An integrator that needs as many outputs as x has features was asked for other sizes."""


class EngineError(MultintError):
    """An engine asked for by name, or an exported program, cannot take a cell; the message says what is in the way."""


class FormError(MultintError):
    """A form was asked of something that does not have it, such as the dense terms of a map that is not bi-affine."""


def in_a_line(error: BaseException) -> str:
    """An error's type and the first line of what it says, to stand within a message."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
