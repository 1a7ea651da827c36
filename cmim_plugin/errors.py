"""The one exception that the library raises, and the one warning category that it uses."""

from __future__ import annotations

import warnings
import weakref

import torch

# Object -> the messages that it gave already.
_given: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


class CMIMError(RuntimeError):
    """Something is wrong with what was passed in. The message says what was found and what to do."""


class CMIMWarning(UserWarning):
    """Training can go on, but probably not as intended."""


def warn_once(of: object, message: str) -> None:
    """Warn of this once for each object."""
    if torch.compiler.is_compiling():
        return
    given = _given.setdefault(of, set())
    if message not in given:
        given.add(message)
        warnings.warn(message, CMIMWarning, stacklevel=4)
