"""Private torch API: all of it in one file, and each taken away in turn."""

import ast
import contextlib
import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import cmim_plugin
from cmim_plugin import CMIM, CMIMError, _compat
from cmim_plugin.sampling import BackwardRule, take_elements
from hazards.nets import batch, equal, gradients, network

X, _ = batch()
FILES = sorted(Path(cmim_plugin.__file__).parent.rglob("*.py"))
# Methods that a module may override, as torch's own do.
OVERRIDDEN = {"_apply", "_load_from_state_dict", "_save_to_state_dict"}
LOOKED_UP = [name for name in vars(_compat) if hasattr(torch._C, name) and not name.startswith("__")]


def trained(steps: int = 2) -> list[torch.Tensor]:
    """What some steps leave in the gradients of a network whose taps are in modules and in functions."""
    torch.manual_seed(0)
    model = nn.Sequential(*network(False)[:5], *network(True, in_channels=6)[:])
    cmim = CMIM(model, X, num_positions=20)
    for _ in range(steps):
        model.zero_grad()
        (model(X).sum() + cmim(model)).backward()
    assert _get_current_function_mode_stack() == []
    return gradients(model, cmim)


def private_names() -> set[str]:
    wholes = [
        *(torch, torch._C, torch.Tensor, torch.autograd.Function, torch.autograd.forward_ad, torch.compiler),
        *(torch.cuda, torch.overrides, torch.distributed, torch.random, nn.parallel.DistributedDataParallel),
    ]
    names = {*itertools.chain(*map(dir, wholes)), *vars(nn.Module())}
    return {name for name in names if name.startswith("_") and not name.startswith("__")} - OVERRIDDEN


def private_uses(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assigned = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    theirs = private_names() - functions - assigned
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in theirs:
            # Of the plug-in's own classes, where torch happens to have the name too.
            if not (isinstance(node.value, ast.Name) and node.value.id == "self" and hasattr(CMIM, node.attr)):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and node.value in theirs:
            found.append(repr(node.value))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            parts = [*(getattr(node, "module", None) or "").split("."), *(name.name for name in node.names)]
            if any("torch" in part for part in parts) and any(part.startswith("_") for part in parts):
                found.append(ast.unparse(node))
    return found


def test_private_torch_api_is_used_in_one_file_alone():
    found = {file.name: uses for file in FILES if (uses := private_uses(file))}
    assert list(found) == ["_compat.py"], found


@pytest.mark.parametrize("name", LOOKED_UP)
def test_a_release_without_one_of_them_trains_the_same(name, monkeypatch):
    expected = trained()
    with monkeypatch.context() as without:
        without.delattr(torch._C, name)
        importlib.reload(_compat)
    try:
        assert equal(trained(), expected)
    finally:
        importlib.reload(_compat)


ABSENT = {
    "Tensor._backward_hooks": lambda patch: patch.setattr(
        _compat, "gradient_hooks", lambda tensor, of=_compat.gradient_hooks: of(SimpleNamespace())
    ),
    "forward_ad._current_level": lambda patch: patch.setattr(_compat, "forward_ad", SimpleNamespace()),
    "Module._call_impl": lambda patch: patch.setattr(_compat, "nn", SimpleNamespace(Module=object)),
    "Tensor._base": lambda patch: patch.setattr(
        _compat, "base_of", lambda tensor, of=_compat.base_of: of(SimpleNamespace())
    ),
    "set_stance": lambda patch: patch.delattr(torch.compiler, "set_stance"),
    "DisableTorchFunction": lambda patch: patch.setattr(
        _compat, "torch", SimpleNamespace(_C=SimpleNamespace(), compiler=torch.compiler)
    ),
}


@pytest.mark.parametrize("take_away", ABSENT.values(), ids=ABSENT)
def test_a_release_without_one_of_those_trains_the_same(take_away, monkeypatch):
    expected = trained()
    take_away(monkeypatch)
    torch.testing.assert_close(trained(), expected)


def test_without_word_of_the_backward_pass_a_recomputation_is_a_pass_that_nobody_asks_for(monkeypatch):
    monkeypatch.setattr(_compat, "_current_graph_task_id", lambda: -1)
    torch.manual_seed(0)
    model = network(True)
    cmim = CMIM(model, X)
    for _ in range(2):
        out = checkpoint(model, X, use_reentrant=False)
        (out.sum() + cmim(model)).backward()
    assert _get_current_function_mode_stack() == []


def test_without_the_stack_of_modes_those_of_others_stay_where_they_are(monkeypatch):
    class Passes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(_compat, "_pop_torch_function_stack", None)
    torch.manual_seed(0)
    model = network(True)
    cmim = CMIM(model, X)
    with Passes() as mode:
        model(X)
        assert _get_current_function_mode_stack() == [mode]
    assert cmim(model) > 0


def test_without_functorch_a_transform_raises_nothing_of_ours(monkeypatch):
    monkeypatch.setattr(_compat, "_are_functorch_transforms_active", lambda: False)
    torch.manual_seed(0)
    model = network(True)
    cmim = CMIM(model, X)
    expected = torch.stack([model(x) for x in torch.stack([X, 2 * X])])
    cmim(model)
    torch.testing.assert_close(torch.func.vmap(model)(torch.stack([X, 2 * X])), expected)
    with contextlib.suppress(CMIMError, RuntimeError):
        cmim(model)
    model(X)
    assert cmim(model) > 0


def test_both_names_of_gathering_are_tried(monkeypatch):
    called = []
    monkeypatch.setattr(dist, "all_gather_single", lambda output, input: called.append("new"), raising=False)
    _compat.all_gather(torch.zeros(1), torch.zeros(1))
    monkeypatch.delattr(dist, "all_gather_single")
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda output, input: called.append("old"))
    _compat.all_gather(torch.zeros(1), torch.zeros(1))
    assert called == ["new", "old"]


def test_without_word_of_the_leaf_autograd_grad_counts_as_a_backward_pass(monkeypatch):
    monkeypatch.setattr(_compat, "_will_engine_execute_node", lambda node: True)
    rule = BackwardRule()
    a = torch.randn(4, 6, requires_grad=True)
    x = a * 2
    rows = take_elements(x, torch.tensor([[1, 2]]), x.new_zeros(()))
    rule.watch(x, rows)
    rule.require_one_backward(rows)
    torch.autograd.grad(x.sum(), a, retain_graph=True)
    with pytest.raises(CMIMError, match="Two backward passes"):
        rows.sum().backward()
