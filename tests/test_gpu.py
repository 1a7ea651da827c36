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


# That these run; other tests show the same on the CPU, where compiling takes long.
LONG = {
    gpu_checks.compiled_steps_train_as_eager_ones_do,
    gpu_checks.fp16_trains_through_an_overflow,
    gpu_checks.gradients_are_those_of_the_cpu,
    gpu_checks.teacher_queue_and_labels_agree_with_the_cpu,
}


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=[pytest.mark.slow] if check in LONG else []) for check in EVERYWHERE],
    ids=lambda check: check.__name__,
)
def test_on_the_cpu(check):
    check("cpu")
