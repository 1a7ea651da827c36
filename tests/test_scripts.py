"""Training scripts as published ones are written, each plain and with CMIM added: few lines differ, both run, and with
weight 0 they log and save the same to the last bit."""

import difflib
import re
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

import cmim_plugin
from cmim_plugin import CMIM

SCRIPTS = Path(__file__).parent / "scripts"
# What one after the other is asked of each script.
COMMANDS = {
    "parallel": [["--epochs=2"], ["--epochs=3", "--resume"]],
    "twostep": [["--step=1", "--save=first.pt"], ["--step=2", "--pretrained=first.pt"]],
    "transformer": [[]],
}


def test_three_lines_differ_at_most() -> None:
    for name in COMMANDS:
        plain, cmim = ((SCRIPTS / f"{kind}_{name}.py").read_text().splitlines() for kind in ("plain", "cmim"))
        changes = difflib.SequenceMatcher(None, plain, cmim, autojunk=False).get_opcodes()
        assert 0 < sum(max(b - a, d - c) for kind, a, b, c, d in changes if kind != "equal") <= 3, name


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run all commands of a script in a folder of its own: what it printed, and what it saved last."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def run(kind: str, name: str, **settings: float) -> tuple[str, dict[str, torch.Tensor]]:
        folder = tmp_path / f"{kind}{settings}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(cmim_plugin, "CMIM", partial(CMIM, **settings))
        for command in COMMANDS[name]:
            monkeypatch.setattr("sys.argv", [name, *command])
            runpy.run_path(str(SCRIPTS / f"{kind}_{name}.py"), run_name="__main__")
        saved = torch.load("checkpoint.pt")
        return capsys.readouterr().out, saved["model" if "model" in saved else "state_dict"]

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_with_weight_zero_both_log_the_same_to_the_last_bit(name: str, run) -> None:
    (plain, state), (weightless, same) = run("plain", name), run("cmim", name, weight=0)
    assert weightless == plain and len(plain.splitlines()) >= 3
    assert state.keys() == same.keys() and all(torch.equal(state[key], same[key]) for key in state)
    logged, changed = run("cmim", name)
    assert logged != plain and len(logged.splitlines()) == len(plain.splitlines())
    assert not re.search("nan|inf", logged)
    assert state.keys() == changed.keys() and any(not torch.equal(state[key], changed[key]) for key in state)
