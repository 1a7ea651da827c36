"""The one exception that the library raises, and the one warning category that it uses."""

from __future__ import annotations


class CMIMError(RuntimeError):
    """Something is wrong with what was passed in. The message says what was found and what to do."""


class CMIMWarning(UserWarning):
    """Training can go on, but probably not as intended."""
