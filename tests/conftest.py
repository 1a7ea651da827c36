"""What every test starts from: one seed, one thread, no window."""

import gc
import os

import hypothesis
import numpy as np
import pytest
import torch

# Before anything imports pyplot, here or in an example that a test starts.
os.environ.setdefault("MPLBACKEND", "Agg")

# The tensors of the tests are tiny: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)

# First calls of torch are slow, so no deadline; on a build server, the same examples in every run.
hypothesis.settings.register_profile("cmim", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("cmim")


def pytest_addoption(parser):
    parser.addoption("--timm-record", help="where a whole sweep over timm's families leaves its result, a JSON file")


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """The garbage collector leaves out what was there before these tests. Some of them collect many times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Images of many sizes in the layout of torchvision's ImageFolder: 12 to train on, 6 to validate, 3 classes."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in {"train": 4, "val": 2}.items():
        for channel, name in enumerate(["red", "green", "blue"]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = generator.integers(20, 60, 2)
                pixels = generator.integers(0, 100, (height, width, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(root)
