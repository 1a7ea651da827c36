"""The scripts of examples/: each says what it does and trains; which integration keeps its promises is in
test_integrations.py."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bireal
import irnet
from cmim_plugin import find_binary_activations

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = [path for path in sorted(EXAMPLES.rglob("*.py")) if "__main__" in path.read_text()]
METHODS = {"irnet": irnet, "bireal": bireal}


def call(script: Path | str, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_each_script_answers_help(monkeypatch, capsys) -> None:
    needed = {"lightning_module": "lightning", "accelerate_loop": "accelerate", "transformers_trainer": "transformers"}
    for script in SCRIPTS:
        if importlib.util.find_spec(needed.get(script.stem, "torch")) is None:
            continue
        with pytest.raises(SystemExit) as end:
            call(script, monkeypatch, "--help")
        assert end.value.code == 0 and "usage:" in capsys.readouterr().out, script.name


def test_ddp_says_how_to_start_it(monkeypatch, capsys) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit):
        call("ddp.py", monkeypatch)
    assert "torchrun --nproc_per_node=2 examples/ddp.py" in capsys.readouterr().err


def test_examples_stand_alone() -> None:
    """An example imports no benchmark and no tool; a tool imports no example."""
    for path in EXAMPLES.rglob("*.py"):
        found = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        inside = {other.stem for other in EXAMPLES.rglob("*.py") if other.parent != path.parent}
        benchmarks = {other.stem for other in (EXAMPLES.parent / "benchmarks").glob("*.py")}
        assert not found & (inside | benchmarks), path


@pytest.mark.parametrize("name, units, shape", [("irnet", 2, (1, 8, 8)), ("bireal", 6, (3, 32, 32))])
def test_each_binary_convolution_is_tapped_once(name: str, units: int, shape: tuple[int, ...]) -> None:
    model = METHODS[name].ResNet(units, in_channels=shape[0])
    part = {"irnet": "conv", "bireal": "binary"}[name]
    found = find_binary_activations(model, torch.zeros(2, *shape))
    assert [f.name for f in found if f.tapped] == [f"units.{i}.{part}" for i in range(3 * units)]
    assert len(found) == 3 * units


@pytest.mark.parametrize("name", METHODS)
def test_each_method_learns_the_digits(name: str, monkeypatch, capsys) -> None:
    call(f"{name}.py", monkeypatch, "--data=digits", "--units=1", "--epochs=2")
    accuracies = [float(accuracy) for accuracy in re.findall(r"accuracy (\S+) %", capsys.readouterr().out)]
    assert len(accuracies) == 2 and accuracies[-1] > 20  # chance is 10 %


def test_cifar10_is_read_from_a_file(tmp_path, monkeypatch, capsys) -> None:
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8), np.arange(20) % 10
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:10], "y_test": labels[:10]}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    train, test = irnet.load("cifar10", tmp_path)
    image, label = test[3]
    assert label == 3 and len(train) == 20 and image.shape == (3, 32, 32)
    pixels = images.reshape(-1, 3) / 255
    expected = (images[3] / 255 - pixels.mean(0)) / pixels.std(0)
    torch.testing.assert_close(image.permute(1, 2, 0).double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
    call("irnet.py", monkeypatch, f"--root={tmp_path}", "--units=1", "--epochs=1", "--batch-size=10")
    assert "epoch 1: test accuracy" in capsys.readouterr().out


def test_transformers_trainer_trains_the_heads_and_resumes_exactly(tmp_path) -> None:
    pytest.importorskip("transformers")
    import transformers_trainer

    def run(folder: str, *options: str):
        common = ["--steps=8", "--every=4", "--accumulation=2"]
        return transformers_trainer.main([f"--output={tmp_path / folder}", *common, *options])

    unbroken = run("unbroken")
    assert unbroken.cmim.heads.steps == 16  # two losses a step
    # Query, key and value of a layer binarize the same tensor, which counts once.
    assert len([tap for tap in unbroken.cmim.taps if "attention.self" in tap.name]) == 2
    logged = [line for line in unbroken.state.log_history if "loss" in line]
    assert len(logged) == 2 and all("cmim/bound" in line for line in logged)

    shutil.copytree(tmp_path / "unbroken" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = run("resumed", "--resume")
    for one, other in ((unbroken.model, resumed.model), (unbroken.cmim, resumed.cmim)):
        expected, found = one.state_dict(), other.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_the_demo_draws_its_picture(tmp_path) -> None:
    from PIL import Image

    # A process of its own: it starts others, which import its main module.
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", f"--output={tmp_path / 'demo.png'}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert Image.open(tmp_path / "demo.png").size[0] > 1000
    assert "IR-Net" in done.stdout
