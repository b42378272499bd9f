"""Exceptions. Bad arguments raise Python's own ValueError and TypeError; these are for everything else."""

from typing import Any


class KantorError(RuntimeError):
    """Base class of Kantor's own exceptions."""


class BackendUnavailable(KantorError):
    """The tensor lives on a device for which this build has no kernels."""


class NumericalBreakdown(KantorError):
    """A factorisation or iteration met numbers it cannot go on with."""


class ConvergenceError(KantorError):
    """Raised by ``result.check()`` when a method did not reach its goal.

    Attributes
    ----------
    result
        The result that was checked, with the best iterate, the status and the history.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.result)  # by itself pickle would pass the message alone


class RankError(KantorError):
    """A collective operation failed: another process died, stalled beyond the timeout, or left the common path."""


class StabilityError(ValueError):
    """An explicit step so long that the result would grow without bound; the message gives the largest safe one."""


class ConvergenceWarning(RuntimeWarning):
    """An iterative method stopped short of its tolerance; its result says so too."""
