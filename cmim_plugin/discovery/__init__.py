"""Find the binary activations of a model by a dry run.

``trace.py`` runs the model and writes down every tensor, ``codes.py`` tells which tensors are two-valued, ``find.py``
tells what was binarized where, and ``layout.py`` how the found activations are read.
"""

from .codes import is_two_valued, sign_pattern
from .find import BinaryActivation, Discovery, discover, find_binary_activations
from .inputs import BatchSource
from .layout import Layout
from .trace import Site

__all__ = [
    "BatchSource",
    "BinaryActivation",
    "Discovery",
    "Layout",
    "Site",
    "discover",
    "find_binary_activations",
    "is_two_valued",
    "sign_pattern",
]
