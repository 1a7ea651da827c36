"""Contrastive mutual information maximisation (CMIM) as a plug-in for binary neural networks.

from cmim_plugin import CMIM

cmim = CMIM(model, example_input)                         # finds the binary activations, hooks them, builds heads
optimizer.add_param_group({"params": cmim.parameters()})

for x, y in loader:
    loss = criterion(model(x), y)
    loss += cmim(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""

from .cmim import CMIM
from .discovery import BinaryActivation, find_binary_activations
from .errors import CMIMError, CMIMWarning
from .objectives import count_negatives, info_nce, info_nce_bound, nce, nce_bound
from .report import Report, TapReport
from .taps import Tap

__version__ = "0.1.0"
from .published import PublishedCMIM

__all__ = [
    "CMIM",
    "BinaryActivation",
    "CMIMError",
    "CMIMWarning",
    "PublishedCMIM",
    "Report",
    "Tap",
    "TapReport",
    "count_negatives",
    "find_binary_activations",
    "info_nce",
    "info_nce_bound",
    "nce",
    "nce_bound",
]
