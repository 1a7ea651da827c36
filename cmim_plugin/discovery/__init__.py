"""Find the binary activations of a model by a dry run: read ``find.py`` first."""

from .codes import is_two_valued
from .find import BinaryActivation, Tap, discover, find_binary_activations
from .inputs import BatchSource
from .layout import Layout
from .trace import Site

__all__ = [
    "BatchSource",
    "BinaryActivation",
    "Layout",
    "Site",
    "Tap",
    "discover",
    "find_binary_activations",
    "is_two_valued",
]
