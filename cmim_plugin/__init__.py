"""Contrastive mutual information maximisation (CMIM) as a plug-in for binary neural networks.

from cmim_plugin import CMIM

cmim = CMIM(model, example_input)  # finds the binary activations, hooks them, builds heads that train themselves

for x, y in loader:
    loss = criterion(model(x), y)
    loss += cmim(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""

from .discovery.find import BinaryActivation, Tap, find_binary_activations
from .errors import CMIMError, CMIMWarning
from .objectives import NCE, InfoNCE, count_negatives
from .plugin import CMIM
from .published import PublishedCMIM
from .report import Report, TapReport
from .sampling import stratified_indices

__version__ = "0.2.0"

__all__ = [
    "CMIM",
    "NCE",
    "BinaryActivation",
    "CMIMError",
    "CMIMWarning",
    "InfoNCE",
    "PublishedCMIM",
    "Report",
    "Tap",
    "TapReport",
    "count_negatives",
    "find_binary_activations",
    "stratified_indices",
]
