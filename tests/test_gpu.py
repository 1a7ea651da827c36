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


@pytest.mark.parametrize("check", EVERYWHERE, ids=lambda check: check.__name__)
def test_on_the_cpu(check):
    check("cpu")
