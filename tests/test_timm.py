"""One step of training with every timm family, binarized by two methods. The whole sweep: `make test-timm`."""

import copy
import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from accuracy import commit
from cmim_plugin import CMIM
from timm_families import FAMILIES, METHODS, UNFIT, binarize, create

# In the default run: convolutions plain, depthwise and dense; attention global and windowed.
QUICK = {
    ("densenet", "bireal"),
    ("vision_transformer", "irnet"),
}
EVERY = sorted({*timm.list_modules(), *FAMILIES, *UNFIT})


@pytest.fixture(scope="module")
def passed(request):
    """The families that passed, by method; how many is printed at the end, and recorded if asked for."""
    families = {method: set() for method in METHODS}
    yield families
    if path := request.config.getoption("--timm-record"):
        record = {
            "passed": {method: sorted(names) for method, names in families.items()},
            "families": timm.list_modules(),
            "versions": {"timm": timm.__version__, "torch": torch.__version__},
            "commit": commit(),
        }
        Path(path).write_text(json.dumps(record) + "\n")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        for method, names in families.items():
            print(f"\n{method}: {len(names)} of {len(timm.list_modules())} timm families passed", end="")


def forward(model, images):
    """(batch, classes): the mean over its heads where a distilled network has two."""
    torch.manual_seed(1)
    output = model(images)
    return torch.stack(output).mean(0) if isinstance(output, tuple) else output


def count_inputs(model, names, images):
    """How many distinct inputs each layer binarizes in one forward pass, and which layer with a weight runs first.

    Layers that are given equal tensors share one binary activation: it counts for the first of them. Tensors that are
    equal only as the model is initialised are told apart.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    counts, seen, order = Counter(dict.fromkeys(names, 0)), [], []

    def note(name, x):
        if not any(x.shape == other.shape and torch.equal(x, other) for other in seen):
            seen.append(x)
            counts[name] += 1

    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0].detach().clone()))
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    forward(model, images)
    assert set(names) <= set(order)
    return +counts, order[0]


def reaches(gradient):
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


@pytest.mark.parametrize(
    "family, method",
    [pytest.param(*run, marks=[] if run in QUICK else pytest.mark.slow) for run in product(EVERY, METHODS)],
)
def test_one_step(family, method, passed):
    if family in UNFIT:
        pytest.skip(f"{family}: {UNFIT[family]}")
    if family not in timm.list_modules():
        pytest.skip(f"{family}: not in timm {timm.__version__}")
    if family not in FAMILIES:
        pytest.skip(f"{family}: no small model of it was chosen yet, add one to timm_families.py")
    model, images = create(family)
    model.train()
    layers = binarize(model, method, images)
    plain = copy.deepcopy(model)
    counts, first = count_inputs(copy.deepcopy(model), layers, images)

    cmim = CMIM(model, images)
    assert Counter(tap.module.removesuffix(".binary") for tap in cmim.taps) == counts
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    logits = forward(model, images)
    assert torch.equal(logits, forward(plain, images))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    contrast = cmim(model)
    assert contrast.isfinite()
    assert reaches(torch.autograd.grad(contrast, model.get_submodule(first).weight, retain_graph=True)[0])
    (F.cross_entropy(logits, torch.arange(len(logits))) + contrast).backward()
    assert reaches(cmim.heads.weights.grad)
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    passed[method].add(family)
