"""What every test starts from: one seed, one thread, no window."""

import os

import hypothesis
import pytest
import torch

# Before anything imports pyplot, here or in an example that a test starts.
os.environ.setdefault("MPLBACKEND", "Agg")

# The tensors of the tests are tiny: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)

# First calls of torch are slow, so no deadline; on a build server, the same examples in every run.
hypothesis.settings.register_profile("cmim", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("cmim")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
