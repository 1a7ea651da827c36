"""A step in the middle of training asks the device for nothing, and sends it nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmim_plugin import CMIM, NCE, CMIMWarning
from hazards.nets import batch, network

X, Y = batch()
SETTINGS = {
    "default": {},
    "two of the taps": {"taps_per_step": 1},
    "image": {"instances": "image"},
    "queue": {"queue_size": 50},
    "labels": {"labels": Y},
    "nce": {"objective": NCE(50)},
}
# What waits for a device: a number or a shape is read off a tensor.
WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero"}


class Transfers(TorchDispatchMode):
    """Notes what waits for a device, and what moves from one to another, or from Python to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in (*inputs, *tree_leaves(out)) if isinstance(t, Tensor)}
        # Numbers that torch wraps into 0-d tensors go to a kernel as arguments, and are no copies.
        scalars = all(t.device.type != "cpu" or t.ndim == 0 for t in inputs)
        if name in WAITS or name == "lift_fresh" or (len(devices) > 1 and not (scalars and "copy" not in name)):
            self.found.append(f"{name} {sorted(devices)}")
        return out


def step(model: nn.Module, cmim: CMIM, x: Tensor, labels: Tensor | None) -> Tensor:
    loss = model(x).sum() + cmim(model, labels)
    loss.backward()
    return loss


def attached(labels: Tensor | None = None, **settings: Any) -> tuple[nn.Module, CMIM]:
    torch.manual_seed(0)
    model = network(True)
    return model, CMIM(model, X, num_positions=20, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_steady_step_reads_no_number_off_a_tensor_and_makes_none_out_of_numbers(settings):
    model, cmim = attached(**settings)
    for _ in range(6):
        step(model, cmim, X, settings.get("labels"))
    with Transfers() as seen:
        for _ in range(3):
            step(model, cmim, X, settings.get("labels"))
    assert not seen.found


def test_what_would_wait_or_copy_is_seen():
    with Transfers() as seen:
        torch.ones(3).sum().item()
        torch.tensor([1.0])
    assert [name.split()[0] for name in seen.found] == ["_local_scalar_dense", "lift_fresh"]


@contextmanager
def on_cuda(model: nn.Module, cmim: CMIM) -> Iterator[tuple[Tensor, Tensor]]:
    """All of it as fake tensors of a CUDA device, which need none; and a batch there."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            mode.from_tensor(X).to("cuda")
        except RuntimeError:
            pytest.skip("this release of torch asks the driver, also for fake tensors")

        def moved(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor).to("cuda")

        for module in (*model.modules(), *cmim.modules()):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(moved(p.detach())))
        cmim._apply(lambda t: moved(t.detach()))
        yield moved(X), moved(Y)


@pytest.mark.parametrize(
    "settings, dtype, device",
    [(settings, torch.float64, "meta") for settings in SETTINGS.values()]
    + [(SETTINGS[name], torch.float32, None) for name in ("default", "labels", "queue")],
    ids=[*SETTINGS, *(f"{name}, no defaults" for name in ("default", "labels", "queue"))],
)
def test_a_steady_step_on_cuda_copies_nothing_from_or_to_the_host(settings, dtype, device):
    """Whatever the default dtype and device are."""
    model, cmim = attached(**settings)
    for _ in range(4):
        step(model, cmim, X, settings.get("labels"))
    with on_cuda(model, cmim) as (x, y), Transfers() as seen, warnings.catch_warnings():
        warnings.simplefilter("error", CMIMWarning)
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            for _ in range(2):
                loss = model(x).sum() + cmim(model, y if "labels" in settings else None)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    assert not seen.found
