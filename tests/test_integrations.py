"""The examples for Lightning, Accelerate, timm and DDP: CMIM's loss trains the heads, and checkpoints hold them.

Started by torchrun this file is also the script of each process: see `_run_in_process`.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

import ddp
import timm_train
from cmim_plugin import CMIM, CMIMError
from digits import digits
from hazards.nets import batch, network

ROOT = Path(__file__).parent.parent
SMALL = {"width": 4, "train_size": 64, "batch_size": 16}
TIMM = ["--model=test_resnet", "--img-size=32", "--batch-size=4", "--workers=0", "--warmup-epochs=0"]

pytestmark = [
    pytest.mark.filterwarnings("error::cmim_plugin.errors.CMIMWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # of torch, about Lightning
]


class Watched(CMIM):
    """Remembers its heads as they were built and at the first step, its losses, and the gradients that reach these."""

    last: "Watched"

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        Watched.last = self
        self.network = (model,)  # in a tuple it is no submodule
        self.built, self.first = self.vector(), None
        self.losses, self.gradients = [], []

    def vector(self) -> Tensor:
        return self.heads.weights.detach().clone()

    def forward(self, model, labels=None, mask=None):
        if self.first is None:
            self.first = self.vector()
        loss = super().forward(model, labels, mask)
        self.losses.append(float(loss.detach()))
        loss.register_hook(lambda gradient: self.gradients.append(float(gradient)))
        return loss


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Every example builds a Watched."""
    for module in (ddp, timm_train):
        monkeypatch.setattr(module, "CMIM", Watched)


def check_trained(cmim: Watched, steps: int, gradient: float = 1.0) -> None:
    """So many backward passes began at CMIM's loss, and each moved heads; together those of every tap reached."""
    assert cmim.gradients == pytest.approx([gradient] * steps)
    assert all(np.isfinite(cmim.losses))
    assert cmim.state_dict()["contrast.heads.steps"] == steps
    reached = [k for k, tap in enumerate(cmim.taps) if tap.name in cmim.metrics]
    assert len(reached) == min(len(cmim.taps), steps * (cmim.schedule.taps_per_step or len(cmim.taps)))
    for k in reached:
        for now, before in zip(cmim.heads.weights_of(k), cmim.heads.weights_of(k, cmim.built), strict=True):
            assert not torch.equal(now, before)


def check_equal(one: dict, other: dict) -> None:
    """Two state dicts."""
    torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=0)


# -- Lightning -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning_module(monkeypatch):
    pytest.importorskip("lightning")
    import lightning_module

    monkeypatch.setattr(lightning_module, "CMIM", Watched)
    return lightning_module


def fit(lightning_module, folder, epochs, ckpt_path=None, **options):
    """In the order of the images: a resumed run then sees the batches that the unbroken one does."""
    train_set, test_set = digits(SMALL["train_size"])
    trainer = lightning_module.L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": False, "devices": 1, **options},
    )
    module = lightning_module.BinaryClassifier(width=SMALL["width"])
    loaders = (DataLoader(part, SMALL["batch_size"]) for part in (train_set, test_set))
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return module, trainer


def test_lightning_trains_the_heads_and_logs_the_bounds(lightning_module, tmp_path):
    module, trainer = fit(lightning_module, tmp_path, epochs=2)
    check_trained(module.cmim, steps=8)
    scalars = module.cmim.scalars(all_taps=True)
    assert len(scalars) == 3 + len(module.cmim.taps)
    assert {name: float(trainer.logged_metrics[name]) for name in scalars} == pytest.approx(scalars)


def test_lightning_scales_the_loss_of_cmim_in_accumulation(lightning_module, tmp_path):
    module, _ = fit(lightning_module, tmp_path, epochs=1, accumulate_grad_batches=2)
    check_trained(module.cmim, steps=4, gradient=0.5)


def test_a_lightning_module_holds_network_and_heads_once(lightning_module):
    module = lightning_module.BinaryClassifier(width=4)
    network, heads = module.model.state_dict(), module.cmim.state_dict()
    assert set(module.state_dict()) == {f"model.{key}" for key in network} | {f"cmim.{key}" for key in heads}
    (group,) = module.configure_optimizers().param_groups
    assert sorted(map(id, group["params"])) == sorted(map(id, module.model.parameters()))


def test_a_resumed_lightning_run_is_the_unbroken_one(lightning_module, tmp_path):
    unbroken, _ = fit(lightning_module, tmp_path, epochs=2)
    torch.manual_seed(0)
    _, trainer = fit(lightning_module, tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(5)  # other heads than those of the checkpoint
    resumed, _ = fit(lightning_module, tmp_path, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert len(resumed.cmim.losses) == 4
    check_equal(resumed.state_dict(), unbroken.state_dict())


# -- Accelerate ----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate_loop(monkeypatch):
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    import accelerate_loop

    def reset() -> None:
        """Accelerate keeps its settings for the process, and refuses others. Other tests make some too."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    monkeypatch.setattr(accelerate_loop, "CMIM", Watched)
    reset()
    yield accelerate_loop
    reset()


def test_accelerate_trains_the_heads(accelerate_loop, capsys):
    _, cmim = accelerate_loop.train(epochs=2, **SMALL)
    check_trained(cmim, steps=8)
    assert "epoch 1: test accuracy" in capsys.readouterr().out


def test_accelerate_accumulates_the_gradient_of_cmim(accelerate_loop):
    _, cmim = accelerate_loop.train(epochs=1, accumulation=2, **SMALL)
    check_trained(cmim, steps=4, gradient=0.5)


def test_accelerate_in_bfloat16_keeps_the_heads_in_float32(accelerate_loop):
    _, cmim = accelerate_loop.train(epochs=1, mixed_precision="bf16", **SMALL)
    check_trained(cmim, steps=4)
    assert cmim.heads.weights.dtype == torch.float32


def test_accelerate_saves_and_restores_the_heads(accelerate_loop, tmp_path):
    model, cmim = accelerate_loop.train(epochs=1, output=str(tmp_path), **SMALL)
    torch.manual_seed(5)
    restored_model, restored = accelerate_loop.train(epochs=0, resume=str(tmp_path), **SMALL)
    assert not torch.equal(restored.built, restored.vector())
    check_equal(restored.state_dict(), cmim.state_dict())
    check_equal(restored_model.state_dict(), model.state_dict())


# -- timm ----------------------------------------------------------------------------------------------------------


def test_timm_trains_the_heads_on_a_folder_of_images(images, tmp_path, capsys):
    timm_train.main([images, *TIMM, "--epochs", "2", "--output", str(tmp_path / "last.pt")])
    check_trained(Watched.last, steps=6)
    printed = capsys.readouterr().out
    assert "14 of 14 binary activations tapped" in printed
    assert "epoch 1: loss" in printed


@pytest.fixture(scope="module")
def timm_run(images, tmp_path_factory):
    """The checkpoint after one epoch, and the plug-in that trained."""
    path = tmp_path_factory.mktemp("timm") / "last.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_train, "CMIM", Watched)
        timm_train.main([images, *TIMM, "--epochs", "1", "--output", str(path)])
    return path, Watched.last


def test_a_timm_checkpoint_holds_network_ema_and_heads(timm_run):
    path, cmim = timm_run
    checkpoint = torch.load(path, weights_only=True)
    check_equal(checkpoint["cmim"], cmim.state_dict())
    check_equal(checkpoint["model"], cmim.network[0].state_dict())
    assert set(checkpoint["ema"]) == {f"module.{key}" for key in checkpoint["model"]}
    in_groups = sum(len(group["params"]) for group in checkpoint["optimizer"]["param_groups"])
    assert in_groups == len(list(cmim.network[0].parameters()))


def test_a_timm_run_resumes_with_its_heads(images, timm_run, tmp_path, capsys):
    path, trained = timm_run
    resume = ["--seed", "5", "--resume", str(path), "--output", str(tmp_path / "next.pt")]
    timm_train.main([images, *TIMM, "--epochs", "2", *resume])
    assert len(Watched.last.losses) == 3
    assert torch.equal(Watched.last.first, trained.vector())
    assert not torch.equal(Watched.last.built, trained.built)
    assert "epoch 0" not in capsys.readouterr().out


def test_timm_trains_a_transformer_in_bfloat16(images, tmp_path):
    vit = ["--model", "test_vit", "--model-kwargs", "img_size=32", "--amp", "--epochs", "1"]
    timm_train.main([images, *TIMM, *vit, "--output", str(tmp_path / "last.pt")])
    check_trained(Watched.last, steps=3)
    assert [tap.name for tap in Watched.last.taps][:2] == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]


@pytest.mark.parametrize("name, size", [("test_vit", 160), ("test_efficientnet", 32)])
def test_timm_binarizes_all_but_the_ends_and_each_is_tapped(name, size):
    model = timm_train.create_model(name, num_classes=3)
    layers = [n for n, m in model.named_modules() if type(m) in (torch.nn.Conv2d, torch.nn.Linear)]
    timm_train.binarize(model)
    ends = {model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]}
    cmim = CMIM(model, torch.randn(4, 3, size, size))
    assert {tap.name for tap in cmim.taps} == set(layers) - ends


def test_timm_says_when_there_are_fewer_images_than_one_batch(images):
    with pytest.raises(SystemExit, match="12 training images for 1 x 128: lower --batch-size"):
        timm_train.main([images, "--model", "test_resnet"])


# -- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.slow  # transformers takes long to import
def test_a_trainer_of_transformers_trains_the_heads_and_resumes(tmp_path, monkeypatch, capsys):
    # transformers takes any module of the name "kernels" for a package of Hugging Face's.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not folder.endswith("benchmarks")])
    pytest.importorskip("transformers")
    import transformers_trainer

    monkeypatch.setattr(transformers_trainer, "CMIM", Watched)
    sequences = transformers_trainer.sequences
    monkeypatch.setattr(transformers_trainer, "sequences", lambda count, *rest, **seed: sequences(32, *rest, **seed))
    output = ["--output", str(tmp_path)]
    transformers_trainer.main(["--steps", "100", *output])
    trained = Watched.last
    check_trained(trained, steps=100)
    transformers_trainer.main(["--steps", "102", "--resume", *output])
    assert torch.equal(Watched.last.first, trained.vector())
    assert len(Watched.last.losses) == 2


# -- a module that holds model and plug-in -------------------------------------------------------------------------

X, Y = batch()


class Task(nn.Module):
    """What people write who do not want to pass two things around."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.net = network(True, norm="batch")
        self.cmim = CMIM(self.net, X, num_positions=20, queue_size=30, **settings)

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y) + self.cmim(self.net)


def trained(task, module=None, steps=3, **settings):
    """The losses of some steps as they are usually written."""
    module = task if module is None else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(**settings)
        loss = module(X, Y)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("set_to_none", [True, False])
def test_optimizer_clipping_and_decay_of_a_module_that_holds_both_leave_the_heads_alone(set_to_none):
    task = Task()
    trained(task, steps=1, set_to_none=set_to_none)
    assert len(list(task.parameters())) == len(list(task.net.parameters()))
    before, gradient = task.cmim.heads.weights.detach().clone(), task.cmim.heads.weights.grad
    assert gradient.norm() > 1e-3  # not clipped
    task.zero_grad(set_to_none=set_to_none)
    task.requires_grad_(False)
    assert gradient.any() and torch.equal(task.cmim.heads.weights, before)
    assert task.cmim.heads.weights.requires_grad


def averages():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    ema = get_ema_multi_avg_fn(0.9)
    yield AveragedModel, lambda task: task
    yield partial(AveragedModel, use_buffers=True, multi_avg_fn=ema), lambda task: task.net
    utils = pytest.importorskip("timm.utils")
    yield utils.ModelEma, lambda task: task
    yield utils.ModelEmaV2, lambda task: task.net
    yield utils.ModelEmaV3, lambda task: task


@pytest.mark.parametrize(
    "average, of", averages(), ids=["average of both", "EMA of the model", *("timm's", "its second", "its third")]
)
def test_an_average_is_a_plain_model_and_the_original_trains_on(average, of):
    task, reference = Task(), Task()
    averaged = average(of(task))
    update = getattr(averaged, "update_parameters", None) or averaged.update
    losses, expected = [], []
    for _ in range(3):
        losses += trained(task, steps=1)
        expected += trained(reference, steps=1)
        update(of(task))
    assert losses == expected
    inner = getattr(averaged, "ema", None) or averaged.module
    net = getattr(inner, "net", inner)
    task.net(X)
    assert net(X).isfinite().all()
    # The pass of the average has not taken the place of the original's.
    assert task.cmim(task.net) > 0
    with pytest.raises(CMIMError, match="attached to another model"):
        task.cmim(net)


def test_safetensors_hold_model_and_heads(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    task, other = Task(), Task()
    expected = trained(task)
    assert expected != trained(other, steps=1)
    trained(task)
    safetensors.save_model(task, tmp_path / "task.safetensors")
    assert safetensors.load_model(other, tmp_path / "task.safetensors") == (set(), [])
    check_equal(other.state_dict(), task.state_dict())
    assert trained(other) == trained(task)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_makes_a_round_trip_and_one_of_a_baseline_loads_without_the_heads(assign):
    task, other = Task(), Task()
    trained(task)
    trained(other, steps=1)
    state = {name: value.clone() for name, value in task.state_dict().items()}
    other.load_state_dict(state, assign=assign)
    baseline = {name: value for name, value in state.items() if name.startswith("net.")}
    missing, unexpected = Task().load_state_dict(baseline, strict=False)
    assert not unexpected and all(name.startswith("cmim.") for name in missing)
    assert trained(other) == trained(task)


def test_a_state_of_the_model_alone_leaves_the_plugin_as_it_is():
    task = Task()
    trained(task)
    step, metrics = task.cmim.schedule.steps_taken, task.cmim.scalars()
    task.load_state_dict({name: v for name, v in task.state_dict().items() if name.startswith("net.")}, strict=False)
    assert step and (task.cmim.schedule.steps_taken, task.cmim.scalars()) == (step, metrics)
    assert task.cmim.contrast.loads == 0 and task.cmim.contrast.last


@pytest.fixture
def one_process(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"broadcast_buffers": False, "find_unused_parameters": True}], ids=str)
def test_ddp_around_a_module_that_holds_both_trains_as_without(one_process, options):
    task = Task()
    expected = trained(Task())
    assert trained(task, nn.parallel.DistributedDataParallel(task, **options)) == pytest.approx(expected)


class FabricModule(nn.Module):
    """As in Lightning Fabric: ``module`` is the user's model, not the wrapper that the forward runs through."""

    def __init__(self, wrapped):
        super().__init__()
        self._forward_module = wrapped

    @property
    def module(self):
        return self._forward_module.module

    def forward(self, *args):
        return self._forward_module(*args)


@pytest.mark.parametrize("within", [lambda ddp: ddp, FabricModule], ids=["DDP", "Fabric"])
@pytest.mark.parametrize("instances", ["position", "image"])
def test_two_backward_passes_under_ddp_are_refused_in_the_second(one_process, within, instances):
    task = Task(instances=instances)
    ddp = nn.parallel.DistributedDataParallel(task.net)
    model = within(ddp)
    loss = F.cross_entropy(model(X), Y)
    contrast = task.cmim(model)
    loss.backward(retain_graph=True)
    with pytest.raises(CMIMError, match=r"Add the losses: \(loss \+ cmim\(model\)\).backward\(\)"):
        contrast.backward()
    with ddp.no_sync():
        loss = F.cross_entropy(model(X), Y)
        contrast = task.cmim(model)
        loss.backward(retain_graph=True)
        contrast.backward()
    (F.cross_entropy(model(X), Y) + task.cmim(model)).backward()


class GradSampleModule(nn.Module):
    """Holds its module as that of opacus does."""

    def __init__(self, module):
        super().__init__()
        self._module = module

    def forward(self, *args):
        return self._module(*args)


def fabric(model):
    fabric = pytest.importorskip("lightning.fabric")
    return fabric.Fabric(accelerator="cpu", devices=1).setup(model)


def accelerated(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model)


WRAPPERS = {
    "compiled": partial(torch.compile, backend="eager"),
    "DataParallel": lambda model: nn.DataParallel(model, device_ids=[]),
    "DDP": nn.parallel.DistributedDataParallel,
    "DDP, compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
    "opacus": GradSampleModule,
    "Fabric": fabric,
    "Accelerate": accelerated,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_loss_of_a_wrapped_model_is_that_of_the_model(one_process, wrap):
    task, reference = Task(), Task()
    wrapped = wrap(task.net)
    for _ in range(2):
        loss = F.cross_entropy(wrapped(X), Y) + task.cmim(wrapped)
        expected = reference(X, Y)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
    torch.testing.assert_close(task.net[0].weight.grad, reference.net[0].weight.grad)


# -- processes -----------------------------------------------------------------------------------------------------


def _timm(images: str, folder: str) -> None:
    timm_train.main([images, *TIMM, "--batch-size", "3", "--epochs", "2", "--output", f"{folder}/last.pt"])


def _lightning(folder: str) -> None:
    import lightning_module

    lightning_module.CMIM = Watched
    fit(lightning_module, folder, epochs=2, devices=2, strategy="ddp")


def _accelerate() -> None:
    import accelerate_loop

    accelerate_loop.CMIM = Watched
    accelerate_loop.train(epochs=2, **SMALL)


def _run_in_process(example: str, folder: str, images: str) -> None:
    """What each process does: runs the example from a seed of its own, and leaves its parameters in `folder`."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    ddp.CMIM = timm_train.CMIM = Watched
    runs = {
        "ddp": partial(ddp.train, epochs=2, **SMALL),
        "timm": partial(_timm, images, folder),
        "lightning": partial(_lightning, folder),
        "accelerate": _accelerate,
    }
    runs[example]()
    cmim = Watched.last
    cmim.heads.step()  # rank 0, which saves the state, has taken the step that is due; others wait for the next loss
    result = {
        "network": parameters_to_vector(cmim.network[0].parameters()).detach(),
        "heads": cmim.vector(),
        "built": cmim.built,
        "losses": cmim.losses,
        "gradients": cmim.gradients,
    }
    torch.save(result, f"{folder}/{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(processes: int, example: str, folder: Path, images: str) -> list[dict]:
    """What every process left, by rank."""
    # Accelerate starts no group of processes without a GPU unless told to: `accelerate launch --cpu` says it so.
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",  # two processes on one GPU are not what NCCL is for
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*torchrun, __file__, example, str(folder), images],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def test_ddp_trains_the_heads_in_one_process(monkeypatch):
    torchrun = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    try:
        _, cmim = ddp.train(epochs=2, **SMALL)
    finally:
        torch.distributed.destroy_process_group()
    check_trained(cmim, steps=8)


SLOW = [pytest.param(example, marks=pytest.mark.slow) for example in ("ddp", "timm", "lightning", "accelerate")]


@pytest.mark.parametrize("example", SLOW)
def test_two_processes_train_the_same_network_and_the_same_heads(example, tmp_path, images):
    if example in ("lightning", "accelerate"):
        pytest.importorskip(example)
    first, second = launch(2, example, tmp_path, images)
    assert first["gradients"] == second["gradients"] == [1.0] * 4  # half as many steps as one process takes
    assert torch.equal(first["network"], second["network"])
    assert torch.equal(first["heads"], second["heads"])
    assert first["losses"] == pytest.approx(second["losses"])  # that of both batches together
    for result in (first, second):
        assert np.isfinite(result["losses"]).all()
        assert not torch.equal(result["heads"], result["built"])


if __name__ == "__main__":
    _run_in_process(*sys.argv[1:])
