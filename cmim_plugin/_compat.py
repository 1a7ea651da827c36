"""Private or recent torch API, each with the release that has it and what we do without it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch


def eager_stance() -> contextlib.AbstractContextManager[Any]:
    """What was compiled with ``torch.compile`` runs as plain Python.

    ``torch.compiler.set_stance`` exists since torch 2.6. Without it, nothing is done: compiled code then hides its
    function calls. It imports ``torch._dynamo``, which takes seconds; where that was not imported yet, nothing can
    have been compiled.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = set_stance("force_eager")
    return stance


def unseen() -> contextlib.AbstractContextManager[Any]:
    """Torch functions called within are seen by no torch-function mode.

    ``torch._C.DisableTorchFunction`` is in all releases that are supported. Without it, they are seen, which costs
    time in the dry run.
    """
    disable = getattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)
    nothing: contextlib.AbstractContextManager[Any] = disable()
    return nothing
