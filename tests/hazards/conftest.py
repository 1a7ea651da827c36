"""Tests here look for what is still alive, many times."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def few_objects() -> Iterator[None]:
    """The collector leaves out what was there before these tests: much faster."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
