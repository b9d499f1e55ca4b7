"""The one error that a user of the command line can cause."""


class ExperimentError(Exception):
    """A user's mistake: bad data or a bad setting.

    The message says what, got, expected and the remedy; the command line shows it without a traceback and exits with 2.
    """
