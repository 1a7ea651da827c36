"""What has to hold on a GPU, as functions of a device that need no pytest: tests/test_gpu.py and benchmarks/gpu.py run
them. `EVERYWHERE` can be tried on the CPU; `GPU_ONLY` cannot."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cmim_plugin import CMIM
from nets import BODIES, METHODS, full_precision

BACKENDS = {
    "cuda": [{"mode": "default"}, {"mode": "reduce-overhead"}],
    "cpu": [{"backend": "aot_eager"}],  # inductor takes a minute there
}


def network(binary: bool = True) -> nn.Module:
    torch.manual_seed(0)
    recipe = METHODS["bireal"].recipe
    return BODIES["resnet8"](recipe if binary else full_precision(recipe), 5, width=8)


def batch(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x.to(device, dtype), torch.randint(5, (8,), generator=generator).to(device)


def attached(device: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, CMIM]:
    """The same network and heads on every device."""
    model = network().to(dtype)
    cmim = CMIM(model, batch("cpu", dtype)[0], **settings)
    return model.to(device), cmim.to(device, dtype)


def a_step(model: nn.Module, cmim: CMIM, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), y) + cmim(model, **settings)
    loss.backward()
    return loss.detach()


def close(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_device=False)


def gradients(model: nn.Module, cmim: CMIM) -> list[Tensor]:
    assert cmim.heads.weights.grad is not None
    return [p.grad.clone() for p in model.parameters() if p.grad is not None] + [cmim.heads.weights.grad.clone()]


# --- on every device -------------------------------------------------------------------------------------------------


def logits_are_those_of_the_network_alone(device: str) -> None:
    plain, (model, _), (x, _) = network().to(device), attached(device), batch(device)
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        for mode in (True, False):
            assert torch.equal(plain.train(mode)(x), model.train(mode)(x))
    finally:
        torch.backends.cudnn.deterministic = before


def gradients_are_those_of_the_cpu(device: str) -> None:
    for settings in ({}, {"instances": "image"}, {"taps_per_step": None, "layer_decay": 0.8}):
        found = {}
        for where in (device, "cpu"):
            model, cmim = attached(where, torch.float64, **settings)
            x, y = batch(where, torch.float64)
            losses = [a_step(model, cmim, x + step, y) for step in range(3)]  # the second trains the heads
            found[where] = [*losses, *gradients(model, cmim)]
        close(found[device], found["cpu"], 1e-8)


def fp16_trains_through_an_overflow(device: str) -> None:
    model, cmim = attached(device)
    x, y = batch(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)
    for _ in range(20):
        with torch.autocast(device, torch.float16):
            loss = F.cross_entropy(model(x), y) + cmim(model)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**24, "nothing overflowed"
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    state = {name: value.clone() for name, value in cmim.heads.state_dict().items()}
    assert state["steps"] > 0 and state["weights"].isfinite().all()
    assert cmim.heads.weights.grad is not None
    cmim.heads.weights.grad.fill_(torch.inf)
    close(dict(cmim.heads.state_dict()), state, 0)  # takes the step that is due: none


def bfloat16_comes_near_float32(device: str) -> None:
    found = []
    for enabled in (False, True):
        model, cmim = attached(device)
        x, y = batch(device)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            found.append(a_step(model, cmim, x, y))
        assert all(gradient.isfinite().all() for gradient in gradients(model, cmim))
    assert found[1].dtype == torch.float32
    close(found[1], found[0], 0.1)


def channels_last_changes_nothing(device: str) -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, cmim = attached(device, torch.float64)
        x, y = batch(device, torch.float64)
        model.to(memory_format=memory_format)
        losses = [a_step(model, cmim, x.to(memory_format=memory_format), y) for _ in range(2)]
        found.append([*losses, *(g.contiguous() for g in gradients(model, cmim))])
    close(found[1], found[0], 1e-8)


def compiled_steps_train_as_eager_ones_do(device: str) -> None:
    for settings in BACKENDS[device]:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        eager, own = attached(device, taps_per_step=None)
        model, cmim = attached(device, taps_per_step=None)
        x, y = batch(device)

        def loss_of(x: Tensor, y: Tensor, model: nn.Module = model, cmim: CMIM = cmim) -> Tensor:
            return F.cross_entropy(model(x), y) + cmim(model)

        compiled = torch.compile(loss_of, fullgraph=True, **settings)
        draws, before = [], 0
        for step in range(6):
            draws.append(cmim.draws.clone())
            model.zero_grad()
            loss = compiled(x, y)
            loss.backward()
            close(loss.detach(), a_step(eager, own, x, y), 1e-3)
            close(gradients(model, cmim), gradients(eager, own), 1e-2)
            if step == 2:
                before = unique_graphs()
        assert unique_graphs() == before, "compiled again in a steady step"
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"], "a graph was left out"
        assert all((a != b).all() for a, b in itertools.pairwise(draws))
        cmim.state_dict(), own.state_dict()  # take the steps that are due
        assert cmim.heads.steps == own.heads.steps == 6
        close(cmim.heads.weights.detach(), own.heads.weights.detach(), 1e-3)


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def one_rank_is_one_process(device: str) -> None:
    model, cmim = attached(device)
    x, y = batch(device)
    expected = [a_step(model, cmim, x, y) for _ in range(2)]
    with tempfile.NamedTemporaryFile() as store:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store.name}x", rank=0, world_size=1)
        try:
            model, cmim = attached(device)
            wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[0] if device == "cuda" else None)
            close([a_step(wrapped, cmim, x, y) for _ in range(2)], expected, 1e-4)
        finally:
            dist.destroy_process_group()


def teacher_queue_and_labels_agree_with_the_cpu(device: str) -> None:
    for settings in ({"teacher": True}, {"queue_size": 100}, {"queue_size": 100, "instances": "image"}):
        found = {}
        for where in (device, "cpu"):
            options: dict[str, Any] = dict(settings)
            if "teacher" in options:
                options["teacher"] = network(binary=False).double()
            model = network().double()
            cmim = CMIM(model, batch("cpu", torch.float64)[0], **options)
            if "teacher" in options:
                options["teacher"].to(where)
            model.to(where), cmim.to(where, torch.float64)
            x, y = batch(where, torch.float64)
            losses = [a_step(model, cmim, x, y, labels=y) for _ in range(3)]
            found[where] = [*losses, *gradients(model, cmim)]
        close(found[device], found["cpu"], 1e-8)


def report_agrees_with_the_cpu(device: str) -> None:
    found = {}
    for where in (device, "cpu"):
        model, cmim = attached(where, torch.float64)
        x, _ = batch(where, torch.float64)
        found[where] = str(cmim.report(model, [x, x + 1]))
    assert found[device] == found["cpu"]


# --- on a GPU only ---------------------------------------------------------------------------------------------------


def a_steady_step_waits_for_nothing(device: str) -> None:
    for settings in ({}, {"instances": "image"}, {"queue_size": 100}, {"taps_per_step": None}):
        model, cmim = attached(device, **settings)
        x, y = batch(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(8):
            torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
            try:
                a_step(model, cmim, x, y)
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def a_step_in_a_cuda_graph_trains_as_an_eager_one_does(device: str) -> None:
    model, cmim = attached(device, taps_per_step=None)
    eager, own = attached(device, taps_per_step=None)
    x, y = batch(device)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, foreach=True) for m in (model, eager)]

    def step(model: nn.Module, cmim: CMIM, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + cmim(model)
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, cmim, optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        step(eager, own, optimizers[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, cmim, optimizers[0])
    draws = [cmim.draws.clone()]
    for _ in range(5):
        graph.replay()
        draws.append(cmim.draws.clone())
        close(captured, step(eager, own, optimizers[1]), 1e-3)
    assert all((a != b).all() for a, b in itertools.pairwise(draws))
    assert torch.equal(cmim.draws, own.draws)
    assert cmim.heads.steps == own.heads.steps
    close(cmim.heads.weights.detach(), own.heads.weights.detach(), 1e-3)
    close(list(model.state_dict().values()), list(eager.state_dict().values()), 1e-3)


Check = Callable[[str], None]

EVERYWHERE: list[Check] = [
    logits_are_those_of_the_network_alone,
    gradients_are_those_of_the_cpu,
    fp16_trains_through_an_overflow,
    bfloat16_comes_near_float32,
    channels_last_changes_nothing,
    compiled_steps_train_as_eager_ones_do,
    one_rank_is_one_process,
    teacher_queue_and_labels_agree_with_the_cpu,
    report_agrees_with_the_cpu,
]
GPU_ONLY: list[Check] = [a_steady_step_waits_for_nothing, a_step_in_a_cuda_graph_trains_as_an_eager_one_does]
