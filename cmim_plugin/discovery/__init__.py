"""Find the binary activations of a model by a dry run: read ``find.py`` first."""

from .codes import is_two_valued
from .find import BinaryActivation, discover, find_binary_activations
from .history import is_one_call
from .inputs import BatchSource
from .layout import Layout
from .trace import Site

__all__ = [
    "BatchSource",
    "BinaryActivation",
    "Layout",
    "Site",
    "discover",
    "find_binary_activations",
    "is_one_call",
    "is_two_valued",
]
