"""imagenet.py: a run that was killed ends as one that was not, bit by bit; its logs, its configs and its data.

Started by Python or torchrun this file is also the script of a process that is killed: see the end.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import dataset_factory
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader

import binarize
import imagenet
from bodies import BODIES
from cmim_plugin import CMIM, PublishedCMIM, find_binary_activations

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "tools" / "configs").glob("*.yaml"))
BODY = ["--model=bodies.resnet8", "--model-kwargs", "width=4", "--img-size=32"]
SHORT = ["--batch-size=2", "--workers=0", "--epochs=2", "--warmup-epochs=0", "--device=cpu"]  # of 6 steps an epoch
# What could differ after an interruption: dropout, momenta, a queue, an average, statistics.
CHANCE = ["--model=test_resnet", "--model-kwargs", "drop_rate=0.2", "drop_path_rate=0.2", "--img-size=32"]
# ... and which of the taps are contrasted: 5 of 14 in a step.
CMIM_KWARGS = ["--cmim-kwargs", "queue_size=300", "taps_per_step=5"]
RUN = [*CHANCE, *SHORT, *CMIM_KWARGS, "--checkpoint-every=4", "--ema-decay=0.6"]

pytestmark = pytest.mark.filterwarnings("error::cmim_plugin.errors.CMIMWarning")


class Stopped(Exception):
    """Where a kill would be."""


class Stopping(CMIM):
    """Calls `stop` in place of one step, counted from 0 over the whole process."""

    at: int
    stop: staticmethod

    def forward(self, *args, **kwargs):
        Stopping.at -= 1
        if Stopping.at < 0:
            Stopping.stop()
        return super().forward(*args, **kwargs)


def raise_stopped(*args, **kwargs):
    raise Stopped


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def train(images, output, *options) -> dict:
    """The checkpoint at the end, with the log as it was written."""
    imagenet.main([str(images), f"--output={output}", *options])
    return read(output)


def read(output) -> dict:
    return torch.load(output / "last.pt", weights_only=True) | {"log.csv": (output / "log.csv").read_text()}


def check_equal(found, expected, where="") -> None:
    """Bit by bit, whatever it is made of."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert list(found) == list(expected), where
        for key in found:
            check_equal(found[key], expected[key], f"{where} {key}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            check_equal(one, other, f"{where} {i}")
    elif isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """The folder that a run without interruption left."""
    output = tmp_path_factory.mktemp("unbroken")
    train(images, output, *RUN)
    return output


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", binarize.METHODS)
def test_each_method_trains_network_and_heads(method, images, tmp_path, capsys):
    options = [*BODY, *SHORT, f"--method={method}", "--epochs=1", "--batch-size=6", "--cmim-labels"]
    options += {"irnet": ["--amp=bf16"], "bireal": ["--amp=fp16"], "reactnet": ["--channels-last"]}[method]
    untrained = train(images, tmp_path / "untrained", *options, "--lr=0", "--opt=momentum", "--cmim-kwargs=heads_lr=0")
    trained = train(images, tmp_path / "trained", *options)
    assert trained["cmim"]["contrast.heads.steps"] > 0 == untrained["cmim"]["contrast.heads.steps"]
    for part, key in (("model", "conv1.weight"), ("ema", "module.conv1.weight"), ("cmim", "contrast.heads.weights")):
        assert trained[part][key].isfinite().all() and trained[part][key].dtype == torch.float32
        assert not torch.equal(trained[part][key], untrained[part][key])
    assert len([key for key in trained["log"][0] if key.startswith("bound/")]) == 6
    assert "binary activations tapped" in capsys.readouterr().out


def test_without_cmim_there_is_none(images, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "CMIM", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    state = train(images, tmp_path, *BODY, *SHORT, "--epochs=1", "--cmim-weight=0")
    assert "cmim" not in state
    assert not any(name.startswith("bound") for name in state["log"][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "log.csv"]


# -- against a teacher ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    """The option that names a full-precision network's checkpoint."""
    output = tmp_path_factory.mktemp("teacher")
    state = train(images, output, *BODY, *SHORT, "--full-precision")
    assert "cmim" not in state
    return f"--teacher={output / 'last.pt'}"


def test_the_published_variant_trains_against_the_teacher_by_one_flag(images, teacher, tmp_path, monkeypatch):
    made, seen = [], []

    class Published(PublishedCMIM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def forward(self, model, *, indices):
            seen.append(indices)
            return super().forward(model, indices=indices)

    monkeypatch.setattr(imagenet, "PublishedCMIM", Published)
    state = train(images, tmp_path, *BODY, *SHORT, teacher, "--published")
    (cmim,) = made
    assert cmim.weight == 3.2
    assert [key for key in state["log"][0] if key.startswith("bound/")] == [f"bound/{cmim.taps[0].name}"]
    # Of the 12 training images, and each once an epoch.
    assert torch.cat(seen[:6]).sort().values.tolist() == torch.cat(seen[6:]).sort().values.tolist() == [*range(12)]
    train_set, _, _ = imagenet.load(imagenet.parse([images]))
    assert cmim.bank.targets.tolist() == [label for _, label in train_set] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.slow
def test_a_published_run_stopped_at_any_step_ends_as_an_unbroken_one(images, teacher, tmp_path, monkeypatch):
    """The memory bank, its constants and where its negatives are drawn from are in the checkpoint."""
    options = [*BODY, *SHORT, teacher, "--published", "--cmim-kwargs=num_negatives=16", "--checkpoint-every=4"]
    expected = train(images, tmp_path / "unbroken", *options)
    with monkeypatch.context() as patch:
        stopping = type("StoppingPublished", (Stopping, PublishedCMIM), {})
        Stopping.at, Stopping.stop = 5, raise_stopped
        patch.setattr(imagenet, "PublishedCMIM", stopping)
        with pytest.raises(Stopped):
            train(images, tmp_path / "broken", *options)
    check_equal(train(images, tmp_path / "broken", *options), expected)


@pytest.mark.parametrize(
    "options, error",
    [
        (["--published"], "--published needs --teacher"),
        (["--published", f"--teacher={__file__}", "--cmim-labels"], "knows the labels"),
        (["--full-precision", "--cmim-weight=0.1"], "leave the options of CMIM out"),
        (["--full-precision", "--report-batches=3"], "leave the options of CMIM out"),
        (["--teacher=x.pt"], "--teacher x.pt: there is no such file"),
        (["--report-batches=-1"], "--report-batches is a number of batches"),
        ([f"--teacher={__file__}", "--cmim-weight=0"], "without CMIM (--cmim-weight 0) leave its other options out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, error, capsys):
    with pytest.raises(SystemExit):
        imagenet.parse(["ROOT", *options])
    assert error in capsys.readouterr().err


# -- interruptions -------------------------------------------------------------------------------------------------


def interrupt(monkeypatch, at, images, output, options) -> None:
    """Stop a run before its step `at`, counted from 0 over the run, as far as this process can."""
    with monkeypatch.context() as patch:
        Stopping.at, Stopping.stop = at, raise_stopped
        patch.setattr(imagenet, "CMIM", Stopping)
        with pytest.raises(Stopped):
            train(images, output, *options)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(images, unbroken, tmp_path):
    """Killed in the second epoch, one step after a checkpoint; gone on with other workers."""
    done = start([sys.executable], 11, images, tmp_path, RUN)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    left = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (left["epoch"], left["step"]) == (1, 4)
    check_equal(train(images, tmp_path, *RUN, "--workers=2"), read(unbroken))


@pytest.mark.parametrize("steps", [[10, 1], pytest.param([6, 0, 2], marks=pytest.mark.slow)], ids=str)
def test_a_run_stopped_at_any_step_ends_as_an_unbroken_one(steps, images, unbroken, tmp_path, monkeypatch):
    """Before the first checkpoint, at one, between epochs; again before the next one."""
    for at in steps:
        interrupt(monkeypatch, at, images, tmp_path, RUN)
        random_seed(at)  # a new process does not go on with this one's generators
    check_equal(train(images, tmp_path, *RUN), read(unbroken))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    imagenet.write({"step": 1}, tmp_path / "last.pt")

    def half(checkpoint, file):
        file.write(b"half of it")
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Stopped):
            imagenet.write({"step": 2}, tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 1}
    imagenet.write({"step": 3}, tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 3}


def test_a_finished_run_has_nothing_left_to_do(images, unbroken, monkeypatch):
    before = read(unbroken)
    monkeypatch.setattr(imagenet, "write", raise_stopped)
    check_equal(train(images, unbroken, *RUN), before)


def test_another_run_does_not_go_on_from_the_checkpoint(images, unbroken):
    before = read(unbroken)
    with pytest.raises(SystemExit, match=r"of another run, with lr 0\.001 and not 0\.1: give another --output"):
        train(images, unbroken, *RUN, "--lr=0.1")
    check_equal(read(unbroken), before)


def start(python, at, images, output, options) -> subprocess.CompletedProcess:
    """Run this file as a script: imagenet.py, the process of the last rank killed before its step `at`."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples" / "tools")]),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [*python, __file__, str(at), str(images), f"--output={output}", *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_of_which_one_is_killed_end_as_unbroken_ones(images, tmp_path):
    """The same command again goes on."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ends = []
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
        options = [*RUN, "--checkpoint-every=1"]
        if name == "killed":  # before its step 5; of 3 steps an epoch
            assert start(torchrun, 5, images, tmp_path / name, options).returncode != 0
        done = start(torchrun, 100, images, tmp_path / name, options)
        assert done.returncode == 0, done.stderr[-5000:]
        # The first rank may have been stopped before or after it wrote the checkpoint of the step before.
        went_on = any(f"epoch 1, step {step} of 3" in done.stdout for step in (1, 2))
        assert went_on is (name == "killed")
        ends.append(read(tmp_path / name))
    assert ends[0]["settings"]["processes"] == 2
    check_equal(ends[1], ends[0])


# -- logs ----------------------------------------------------------------------------------------------------------


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_log_has_a_line_an_epoch(unbroken):
    with (unbroken / "log.csv").open(newline="") as file:
        lines = [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]
    state = read(unbroken)
    assert lines == state["log"]
    assert [line["epoch"] for line in lines] == [0, 1]
    taps = {key.removeprefix("bound/") for key in lines[0] if key.startswith("bound/")}
    # All binary layers: also the one with a 1 x 1 map, whose norm makes two values of the example's two samples.
    assert len(taps) == 14 and "layer4.0.conv2" in taps
    assert {"lr", "loss", "top1", "top5", "ema_top1", "ema_top5"} <= set(lines[0])
    assert lines[0]["lr"] > lines[1]["lr"] >= 0
    for line in lines:
        assert 0 <= line["top1"] <= line["top5"] == 100  # of three classes
        assert 0 < line["loss"] < 10


def test_a_report_is_written_after_each_epoch(images, tmp_path):
    state = train(images, tmp_path, *BODY, *SHORT, "--report-batches=2")
    with (tmp_path / "report.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    taps = [key.removeprefix("bound/") for key in state["log"][0] if key.startswith("bound/")]
    assert [line["name"] for line in table] == taps and len(taps) == 6
    curves = {name: points for name, points in scalars(tmp_path).items() if name.startswith("report/")}
    for line in table:
        for figure in ("bound", "retrieval", "dead"):
            points = curves[f"report/{line['name']}/{figure}"]
            assert [epoch for epoch, _ in points] == [0, 1]
            assert points[-1][1] == pytest.approx(float(line[figure]), rel=1e-6)


# -- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_the_options_become(path):
    args = vars(imagenet.parse(["ROOT", "--config", str(path)]))
    assert args["root"] == "ROOT"
    for name, value in yaml.safe_load(path.read_text()).items():
        found = args[name.replace("-", "_")]
        assert found == value and type(found) in (type(value), float), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_makes_a_network_that_is_tapped(path):
    args = imagenet.parse(["ROOT", "--config", str(path), "--model-kwargs", "width=2"])
    model = imagenet.build(args, 10)
    size = args.img_size // 2
    found = find_binary_activations(model, torch.randn(2, 3, size, size))
    assert len(found) == 16 and all(one.tapped for one in found)
    optimizer = imagenet.create_optimizer_v2(model, args.opt, args.lr, args.weight_decay, **args.opt_kwargs)
    assert isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["nesterov"]


def test_the_command_line_overrides_a_config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 3\nchannels-last: true\ndownload: false\nlr: 1e-2\nopt-kwargs: {betas: [0.8, 0.9]}\n")
    args = imagenet.parse(["--config", str(path), "ROOT", "--epochs=4", "--no-channels-last"])
    assert (args.epochs, args.channels_last, args.download, args.lr) == (4, False, False, 0.01)
    assert args.opt_kwargs == {"betas": [0.8, 0.9]}
    assert args.root == "ROOT"


@pytest.mark.parametrize(
    "line, error",
    [("epoch: 3", "unrecognized arguments: --epoch=3"), ("amp: fp8", "invalid choice: 'fp8'")],
)
def test_a_config_is_checked_as_the_command_line_is(line, error, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(line)
    with pytest.raises(SystemExit):
        imagenet.parse(["ROOT", "--config", str(path)])
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--model=bodies.resnet9"], ["--model=bodies.resnet8", "--pretrained"]])
def test_a_body_that_is_not_there_is_named_with_those_that_are(options, capsys):
    with pytest.raises(SystemExit):
        imagenet.parse(["ROOT", *options])
    error = capsys.readouterr().err
    assert options[0].removeprefix("--model=") in error and "resnet18_224" in error


# -- networks ------------------------------------------------------------------------------------------------------


def test_a_body_for_large_images_has_resnets_stages_at_a_quarter_of_the_size():
    for name, units in (("resnet34_224", [6, 8, 12, 6]), ("resnet18_224", [4, 4, 4, 4])):
        model = BODIES[name](binarize.METHODS["bireal"].recipe, 7, width=4)
        assert [len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)] == units
    sizes = []
    for i in (1, 2, 3, 4):
        getattr(model, f"layer{i}").register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1:]))
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert sizes == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (32, 2, 2)]


@pytest.mark.parametrize("name, size, method", [("test_resnet", 32, "reactnet"), ("test_vit", 160, "irnet")])
def test_each_method_binarizes_all_layers_but_the_ends_of_a_timm_network(name, size, method):
    model = imagenet.create_model(name, num_classes=3)
    layers = [n for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]
    ends = {model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]}
    binarize.binarize(model, method)
    found = find_binary_activations(model, torch.randn(4, 3, size, size))
    assert {one.name for one in found if one.tapped} == set(layers) - ends


def test_irnets_estimator_is_annealed_in_timm_networks_too():
    model = imagenet.create_model("test_vit", num_classes=3)
    binarize.binarize(model, "irnet")
    binarize.METHODS["irnet"].on_epoch(model, 1, 2)
    layers = [module for module in model.modules() if isinstance(module, binarize.EDE)]
    assert layers and {(type(m), m.t, m.k) for m in layers} == {(binarize.IRLinear, 1.0, 1.0)}


def test_reactnets_thresholds_move_the_sign():
    layer = nn.Conv2d(2, 3, 3)
    plain = nn.Sequential(layer)
    plain.pretrained_cfg = {}
    binarize.binarize(plain, "reactnet")
    x = torch.rand(2, 2, 5, 5)
    ones = plain(x)
    layer.threshold.data[1] = -2.0
    x_signs = torch.ones_like(x)
    x_signs[:, 1] = -1
    weight = binarize.magnitude_aware(layer.weight)
    assert torch.equal(ones, torch.conv2d(torch.ones_like(x), weight, layer.bias))
    assert torch.equal(plain(x), torch.conv2d(x_signs, weight, layer.bias))


# -- data ----------------------------------------------------------------------------------------------------------


def batches(images, first=0, epoch=0, **changes) -> list[list[tuple[int, int]]]:
    options = {"seed": 0, "batch_size": 4, "world_size": 1, "rank": 0, **changes}
    sampler = imagenet.Batches(images, imagenet.argparse.Namespace(**options))
    sampler.epoch, sampler.first = epoch, first
    return list(sampler)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    places = [(epoch, seed) for epoch in (0, 1) for seed in (0, 1)]
    orders = [[i for batch in batches(20, epoch=epoch, seed=seed) for i, _ in batch] for epoch, seed in places]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert [len(batch) for batch in batches(19)] == [4] * 4


def test_a_resumed_epoch_goes_on_with_the_next_batch():
    assert all(batches(20, first) == batches(20)[first:] for first in range(6))


def test_processes_share_the_batches_of_one():
    shares = [batches(20, batch_size=2, world_size=2, rank=rank) for rank in (0, 1)]
    assert [one + other for one, other in zip(*shares, strict=True)] == batches(20)


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda root: shutil.rmtree(root / "val"), "has no folder val/"),
        (lambda root: (root / "val").rename(root / "validation"), None),
        (lambda root: (root / "val" / "red").rename(root / "val" / "zebra"), "in one of them only: red, zebra"),
    ],
    ids=["no val", "another name", "other classes"],
)
def test_folders_that_timm_would_misunderstand_are_refused(change, error, images, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    change(root)
    args = imagenet.parse([str(root)])
    if error is None:
        assert [len(dataset) for dataset in imagenet.load(args)[:2]] == [12, 6]
    else:
        with pytest.raises(SystemExit, match=error):
            imagenet.load(args)


def test_an_image_depends_on_its_seed_alone(images):
    args = imagenet.parse([images, "--workers=0"])
    train_set, test_set, classes = imagenet.load(args)
    args.device, args.rank, args.world_size = "cpu", 0, 1
    config = imagenet.resolve_data_config({"img_size": 32})
    imagenet.loaders(train_set, test_set, imagenet.Batches(12, args), config, args)
    assert classes == 3
    dataset = imagenet.Seeded(train_set)
    first, (label, index) = dataset[5, 7]
    dataset[4, 8]
    assert torch.equal(torch.as_tensor(dataset[5, 7][0]), torch.as_tensor(first))
    assert not torch.equal(torch.as_tensor(dataset[5, 8][0]), torch.as_tensor(first))
    assert (label, index) == (train_set[5][1], 5)


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_test_image_is_tested_once(ranks, images):
    seen = []
    for rank in range(ranks):
        args = imagenet.parse([images, "--workers=0", "--batch-size=4", "--device=cpu"])
        args.rank, args.world_size = rank, ranks
        train_set, test_set, _ = imagenet.load(args)
        config = imagenet.resolve_data_config({"img_size": 32})
        _, loader = imagenet.loaders(train_set, test_set, imagenet.Batches(12, args), config, args)
        seen += [x.mean(dim=(2, 3)) for x, _ in loader]
    same = {key: config[key] for key in ("crop_pct", "interpolation")}
    test_set.transform = imagenet.create_transform(32, **same)
    expected = torch.stack([x.mean((1, 2)) for x, _ in test_set])
    found = torch.cat(seen)
    assert len(found) == len(expected) == 6
    # The loader normalises after the cut to bytes, the transform before.
    torch.testing.assert_close(*(values.sort(0).values for values in (found, expected)), rtol=0, atol=1e-4)


def test_accuracies_are_shares_of_the_images_also_where_the_last_batch_is_smaller():
    x, y = torch.randn(23, 12), torch.randint(12, (23,))
    x[:5] += 100 * torch.eye(12)[y[:5]]  # the first batch has both accuracies alike
    loader = DataLoader(list(zip(x, y, strict=True)), batch_size=5)
    model, half = nn.Linear(12, 12), nn.Linear(12, 12)
    for network, factor in ((model, 1.0), (half, -1.0)):
        nn.init.zeros_(network.bias)
        network.weight.data = factor * torch.eye(12)
    found = imagenet.evaluate({"": model, "ema_": half}, loader, 12, partial(torch.autocast, "cpu", enabled=False))
    expected = {}
    for prefix, factor in (("", 1.0), ("ema_", -1.0)):
        rows = zip((factor * x).tolist(), y, strict=True)
        ranks = [sorted(row, reverse=True).index(row[label]) for row, label in rows]
        for k in (1, 5):
            expected[f"{prefix}top{k}"] = 100 * sum(rank < k for rank in ranks) / 23
    assert found == pytest.approx(expected, abs=1e-4)
    assert 0 < expected["top1"] < expected["top5"] < 100


class TinyCIFAR100:
    """In place of torchvision's, which would download."""

    def __init__(self, root, train, download):
        self.train, self.transform, self.classes = train, None, [str(i) for i in range(100)]

    def __len__(self):
        return 12 if self.train else 6

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        return self.transform(Image.fromarray(noise(i))), i


def noise(seed) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_cifar100_trains_by_its_config(tmp_path, monkeypatch):
    monkeypatch.setitem(dataset_factory._TORCH_BASIC_DS, "cifar100", TinyCIFAR100)
    config = ["--config", str(CONFIGS[0]), "--model-kwargs", "width=4"]
    state = train(tmp_path, tmp_path / "out", *config, *SHORT)
    assert state["model"]["fc.weight"].shape == (100, 32)
    (network,) = state["optimizer"]["param_groups"]
    assert (network["weight_decay"], network["momentum"], network["nesterov"]) == (1e-4, 0.9, False)
    assert len(network["params"]) == len([key for key in state["model"] if "running" not in key and "num_" not in key])
    assert state["log"][1]["lr"] < state["log"][0]["lr"] < 0.1


def test_fewer_images_than_a_batch_are_refused(images, tmp_path):
    with pytest.raises(SystemExit, match="12 training images for 1 x 13: lower --batch-size"):
        train(images, tmp_path, *BODY, *SHORT, "--batch-size=13")


if __name__ == "__main__":
    torch.set_num_threads(1)
    Stopping.at, Stopping.stop = int(sys.argv[1]), kill
    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    if last and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        imagenet.CMIM = Stopping
    imagenet.main(sys.argv[2:])
