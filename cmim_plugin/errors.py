"""The one exception that the library raises, and the one warning category that it uses."""

from __future__ import annotations

import sys
import warnings
import weakref

import torch

_issued: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()  # owner -> warnings so far


class CMIMError(RuntimeError):
    """Something is wrong with what was passed in. The message says what was found and what to do."""


class CMIMWarning(UserWarning):
    """Training can go on, but probably not as intended."""


def check_saved(argument: str, saved: object, wanted: object) -> None:
    """Raise CMIMError where a state was saved with another value of an argument of CMIM."""
    if saved != wanted:
        raise CMIMError(
            f"The state was saved with {argument}={saved}, this CMIM has {wanted}: build it with the same arguments."
        )


def warn_once(owner: object, *messages: str) -> None:
    """Issue each message once for each owner; several new ones in one warning."""
    if torch.compiler.is_compiling():
        return
    issued = _issued.setdefault(owner, set())
    message = "\n".join(message for message in messages if message not in issued)
    if message:
        issued.update(messages)
        # Point at the user's line: skip the frames of torch and of this package.
        level, frame = 2, sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "cmim_plugin"):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, CMIMWarning, stacklevel=level)
