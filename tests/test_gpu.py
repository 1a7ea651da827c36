"""On a GPU: `pytest -m gpu`. The same checks run on the CPU, but for those that only a GPU can answer."""

import pytest
import torch

import gpu_checks

EVERYWHERE, GPU_ONLY = gpu_checks.EVERYWHERE, gpu_checks.GPU_ONLY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("check", EVERYWHERE + GPU_ONLY, ids=lambda check: check.__name__)
def test_on_a_gpu(check):
    check("cuda")


# Inductor compiles for half a minute; test_compile.py shows the same with a faster backend.
LONG = {gpu_checks.compiled_steps_train_as_eager_ones_do}


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=[pytest.mark.slow] if check in LONG else []) for check in EVERYWHERE],
    ids=lambda check: check.__name__,
)
def test_on_the_cpu(check):
    check("cpu")
