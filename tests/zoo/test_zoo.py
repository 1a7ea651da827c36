"""Every network of the zoo: the right taps, an untouched model, gradients, nothing left behind."""

import numbers

import pytest
import torch

from cmim_plugin import CMIM, CMIMError
from cmim_plugin.passes import BINARY, LATENT, Pass

from .registry import ZOO, Entry

WITH_TAPS = [entry for entry in ZOO if entry.taps]
WITHOUT_TAPS = [entry for entry in ZOO if not entry.taps]
WITH_ORACLE = [entry for entry in ZOO if entry.oracle]
# One for each way in which a pair is picked up, and those whose structure or state changes from pass to pass.
TRAINED = {
    *("bireal_masks", "dorefa", "boolnet", "brevitas", "shared_instance", "bernoulli", "counting_calls", "float64"),
    *("binarynet_inplace_mlp", "folded_before_sign", "unfold_matmul", "xnornet_dropout", "sign_in_root", "recurrent"),
    *("bibert", "bit", "binaryvit", "fused_attention", "windows", "bipointnet", "skipped_layers", "sign_plus_noise"),
    *("residual_binarization", "token_scale", "dead_sign", "own_generator", "frozen_stem", "packed_sequences", "graph"),
    "mixture_of_experts",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def each(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def call(model, inputs, seed=3):
    torch.manual_seed(seed)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def task_loss(output):
    if isinstance(output, torch.Tensor):
        return output.square().mean()
    return sum(task_loss(part) for part in (output.values() if isinstance(output, dict) else output))


def assert_identical(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def reaches(parameter):
    return parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())


def snapshot(model):
    """All that a forward pass may leave in a model: parameters and buffers, gradients, modes, and the plain
    tensors, numbers and flags that modules and parameters carry as attributes."""
    state = {f"state {name}": value.detach().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"gradient {name}"] = parameter.grad is None
        state[f"attributes {name}"] = {key: str(value) for key, value in vars(parameter).items()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                state[f"attribute {name}.{key}"] = value.detach().clone()
            elif isinstance(value, numbers.Number):
                state[f"attribute {name}.{key}"] = value
    return state


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[key], value), key
        else:
            assert after[key] == value, key


def codes(binary):
    """Which of its two values each element has: the same before and after a scaling."""
    return (binary > (binary.max() + binary.min()) / 2).flatten()


@pytest.fixture
def captured(monkeypatch):
    """Filled by a forward pass: {(tap index, side): the whole activation that the tap was handed}."""
    activations = {}
    take = Pass._take

    def recording(self, k, side, activation):
        activations[k, side] = activation.detach().clone()
        take(self, k, side, activation)

    monkeypatch.setattr(Pass, "_take", recording)
    return activations


@each(WITH_TAPS)
def test_finds_the_stated_taps_and_leaves_the_model_as_it_was(entry: Entry):
    plain, model, example = entry.make(), entry.make(), entry.example()
    before, random_state = snapshot(model), torch.get_rng_state()
    attributes = {name: sorted(vars(module)) for name, module in plain.named_modules()}
    cmim = CMIM(model, example)
    assert [tap.name for tap in cmim.taps] == entry.taps
    untapped = {activation.name: activation.reason for activation in cmim.found if not activation.tapped}
    assert set(entry.untapped) <= untapped.keys()
    assert all(untapped.values()), f"a reason for each: {untapped}"
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)

    expected, found = call(plain, entry.example(8, seed=4)), call(model, entry.example(8, seed=4))
    assert_identical(found, expected)
    # a step by the task loss alone, which some networks answer with another path through forward
    for output in (expected, found):
        task_loss(output).backward()
    assert_identical(call(model, entry.example(2, seed=7)), call(plain, entry.example(2, seed=7)))

    cmim.remove()
    for name, module in model.named_modules():
        assert not any(getattr(module, hooks, None) for hooks in HOOKS), name
        assert sorted(vars(module)) == attributes[name]
    assert list(model.state_dict()) == list(plain.state_dict())


@each([entry for entry in ZOO if entry.name in TRAINED])
def test_trains_for_two_steps(entry: Entry):
    model = entry.make()
    cmim = CMIM(model, entry.example(), taps_per_step=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for seed in (4, 5):
        output = call(model, entry.example(8, seed))
        contrast = cmim(model)
        assert contrast.shape == () and contrast.dtype == torch.float32 and contrast.isfinite()
        assert set(cmim.metrics) == set(entry.taps)
        optimizer.zero_grad()
        contrast.backward(retain_graph=True)
        assert reaches(model.get_parameter(entry.first))
        assert reaches(cmim.heads.weights)
        task_loss(output).backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@each(WITHOUT_TAPS)
def test_nothing_to_tap_is_said(entry: Entry):
    model, example = entry.make(), entry.example()
    before, random_state = snapshot(model), torch.get_rng_state()
    with pytest.raises(CMIMError, match="No binary activation"):
        CMIM(model, example)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


@each(WITH_ORACLE)
def test_captures_the_pair_of_a_recomputation_without_hooks(entry: Entry, captured):
    model = entry.make()
    cmim = CMIM(model, entry.example(), taps_per_step=None)
    batch = entry.example(8, seed=4)
    with torch.no_grad():
        oracle = entry.oracle(entry.make(), batch)
    call(model, batch)
    assert cmim(model).isfinite()
    for name, (a_f, a_b) in oracle.items():
        found_f, found_b = (captured[entry.taps.index(name), side] for side in (LATENT, BINARY))
        candidates = a_f if isinstance(a_f, list) else [a_f]
        assert torch.equal(codes(found_b), codes(a_b)), name
        same_size = [want for want in candidates if want.numel() == found_f.numel()]
        assert any(torch.allclose(found_f.flatten(), want.flatten(), atol=1e-6) for want in same_size), name
