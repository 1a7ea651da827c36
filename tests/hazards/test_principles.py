"""The principles of the core: no pass of the user's fails because of the plug-in, whatever surrounds it.

Each test runs the same code without and with a plug-in, or shows what is left behind.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from cmim_plugin import CMIM, CMIMError, CMIMWarning
from hazards.nets import Activations, Binary, BinaryConv, batch, equal, gradients, network

X, _ = batch()
NO_PASS = "No forward pass"

each_way = pytest.mark.parametrize("inside", [False, True], ids=["by a module", "in the convolution"])


def attached(inside: bool = False, **settings: Any) -> tuple[Any, CMIM]:
    """The same weights, heads and positions every time."""
    torch.manual_seed(0)
    model = network(inside)
    return model, CMIM(model, X, **{"num_positions": 20, "heads_lr": 0, **settings})


def trained(model: nn.Module, cmim: CMIM) -> list[Tensor]:
    """The gradients of one step."""
    model.zero_grad()
    (model(X).sum() + cmim(model)).backward()
    return gradients(model)


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def modes() -> list[TorchFunctionMode]:
    return _get_current_function_mode_stack()


@pytest.fixture(autouse=True)
def no_mode_is_left():
    yield
    assert modes() == []


# -- inputs that were never seen -----------------------------------------------------------------------------------


class Windows(nn.Module):
    """(B * windows, tokens, C), as in window attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.sign, self.out = nn.Conv2d(2, 8, 1), nn.LayerNorm(8), Binary(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n * (h // 2) * (w // 2), 4, c)
        return self.out(self.sign(self.norm(x))).view(n, h * w, c).mean(1)


@pytest.mark.parametrize(
    "make, instances",
    [
        (lambda: network(False), "image"),
        (lambda: network(True), "position"),
        (Windows, "image"),
        (Windows, "position"),
    ],
    ids=["module", "conv", "windows", "positions in windows"],
)
def test_an_empty_batch_gives_a_loss_of_zero_with_its_graph(make, instances):
    model = make()
    cmim = CMIM(model, X, instances=instances)
    out = model(X[:0])
    loss = cmim(model)
    assert loss == 0
    (out.sum() + loss).backward()
    model(X)
    assert cmim(model) > 0


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.sign, self.out = nn.Linear(7, 16), nn.LayerNorm(16), Binary(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        # Torch cannot compare those.
        return self.out(x if x.is_nested and x.layout == torch.strided else self.sign(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_a_nested_batch_passes_through_the_model(layout):
    model = Tokens()
    plain = copy.deepcopy(model)
    cmim = CMIM(model, torch.randn(4, 5, 7))
    x = torch.nested.nested_tensor([torch.randn(3, 7), torch.randn(5, 7)], layout=layout)
    for found, expected in zip(model(x).unbind(), plain(x).unbind(), strict=True):
        assert torch.equal(found, expected)
    with contextlib.suppress(CMIMError):  # what could not be captured is told
        assert cmim(model).isfinite()
    model(torch.randn(4, 5, 7))
    assert cmim(model) > 0


def test_a_compiled_network_whose_channels_were_pruned_runs_and_they_are_told():
    model, cmim = attached()
    model[2][1], model[3] = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
    model[4][1] = nn.Conv2d(8, 6, 3, padding=1)
    compiled(model)(X)
    with pytest.raises(CMIMError, match=r"Tap 4.0: it has 8 channels, and had 6"):
        cmim(model)


def test_a_compiled_network_that_was_frozen_since_runs_and_its_loss_is_refused():
    model, cmim = attached()
    run = compiled(model)
    run(X)
    cmim(run).backward()
    model.requires_grad_(False)
    run(X)
    with pytest.raises(CMIMError, match="frozen"):
        cmim(run)


def test_a_layer_that_runs_under_no_grad_is_told_like_a_frozen_one():
    model, cmim = attached()
    model[2].forward = torch.no_grad()(model[2].forward)
    model(X)
    with pytest.warns(CMIMWarning, match=r"Tap 2.0: .* without a gradient.* adds nothing"):
        cmim(model)


# -- hooks of others on gradients ----------------------------------------------------------------------------------


def on_output(act: Callable[[Tensor], object]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        act(output)

    return hook


def added_by(way: str, model: Any, act: Callable[[Tensor], Tensor | None]) -> None:
    """Put `act` on the gradient of the tapped activation and of its latent, in one of the ways that torch has."""
    for module in (model[1], model[2][0]):
        if way == "tensor":
            module.register_forward_hook(on_output(lambda x: x.register_hook(act)))
        elif way == "node":
            module.register_forward_hook(on_output(lambda x: x.grad_fn.register_prehook(lambda g: (act(g[0]), *g[1:]))))
        elif way == "pre":
            module.register_full_backward_pre_hook(lambda m, g: (act(g[0]),))
        else:
            module.register_full_backward_hook(lambda m, inputs, g: (act(inputs[0]),))


# The library looks for hooks on tensors, and not for others.
each_hook = pytest.mark.parametrize(
    "order, way",
    [("before", "tensor"), ("after", "tensor"), ("before", "node"), ("after", "pre"), ("before", "module")],
)


@each_hook
def test_a_gradient_that_a_hook_replaces_is_replaced(order, way):
    """It also lets through all of the contrast that another place in the same graph would."""

    def of(factor: float, weight: float) -> Tensor:
        torch.manual_seed(0)
        model: Any = network(False, channels=(4,))
        for when in ("before", "attach", "after"):
            if when == "attach":
                cmim = CMIM(model, X, num_positions=20, weight=weight)
            elif when == order:
                added_by(way, model, lambda g: g * factor)
        model(X).sum().backward() if not weight else (model(X).sum() + cmim(model)).backward()
        return model[0].weight.grad

    assert not of(0.0, 1.0).any()
    assert not torch.equal(of(2.0, 1.0), of(2.0, 0.0)) or way == "pre"


@each_hook
def test_a_gradient_that_a_hook_keeps_or_returns_is_never_written_into(order, way):
    torch.manual_seed(0)
    model: Any = network(False, channels=(4,))
    kept: list[tuple[Tensor, Tensor]] = []
    mine: dict[torch.Size, Tensor] = {}

    def act(grad: Tensor) -> Tensor:
        own = mine.setdefault(grad.shape, torch.ones_like(grad))
        kept.extend((g, g.clone()) for g in (grad, own))
        return own

    if order == "before":
        added_by(way, model, act)
    cmim = CMIM(model, X, num_positions=20, weight=5.0)
    if order == "after":
        added_by(way, model, act)
    kept.clear()
    for _ in range(2):
        (model(X).sum() + cmim(model)).backward()
    assert kept and all(torch.equal(found, copied) for found, copied in kept)
    assert all(torch.equal(own, torch.ones_like(own)) for own in mine.values())


@pytest.mark.parametrize("module", [1, 2], ids=["latent", "binary"])
def test_hooks_on_an_activation_see_all_of_its_gradient(module):
    """Whatever they are, and whenever they were registered: that of the network and that of the contrast."""
    found: dict[str, Tensor] = {}

    def see(name: str) -> Callable[[Tensor], None]:
        return lambda grad: found.__setitem__(name, grad.clone())

    for order in ("before", "after"):
        model, cmim = attached()
        cmim.remove()
        tapped = model[1] if module == 1 else model[2][0]
        seen: list[Tensor] = []

        def look(x: Tensor, order: str = order, seen: list[Tensor] = seen) -> None:
            x.retain_grad()
            x.register_hook(see(f"hook {order}"))
            seen.append(x)

        if order == "before":
            tapped.register_forward_hook(on_output(look))
        cmim = CMIM(model, X, num_positions=20)
        if order == "after":
            tapped.register_forward_hook(on_output(look))
        seen.clear()
        (model(X).sum() + cmim(model)).backward()
        found[f"retained {order}"] = seen[0].grad
    model, cmim = attached(heads_lr=3e-3)
    seen = []
    (model[1] if module == 1 else model[2][0]).register_forward_hook(on_output(seen.append))
    (found["autograd.grad"],) = torch.autograd.grad(model(X).sum() + cmim(model), seen[0])
    first, *others = found.values()
    for other in others:
        torch.testing.assert_close(other, first)
    (bare,) = torch.autograd.grad(model(X).sum(), seen[1])
    assert not torch.allclose(first, bare)


class Overwrites(nn.Module):
    """Its latent is overwritten after it was binarized, which autograd allows: nothing of it is needed any more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
        self.sign = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        out = self.out(self.sign(x + (x.sign() - x).detach()))
        return out + x.mul_(2)


@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "hooked"])
def test_an_activation_may_be_overwritten_later_also_under_a_hook_of_the_users(hooked):
    torch.manual_seed(0)
    model = Overwrites()
    if hooked:
        model.norm.register_forward_hook(on_output(lambda x: x.register_hook(lambda grad: None)))
    cmim = CMIM(model, X)
    (model(X).sum() + cmim(model)).backward()
    assert model.a.weight.grad.isfinite().all()


# -- hooks of others on modules ------------------------------------------------------------------------------------


@each_way
def test_global_hooks_and_those_around_ours_run_as_without(inside):
    def run(with_cmim: bool) -> tuple[list[str], Tensor]:
        torch.manual_seed(0)
        model: Any = network(inside)
        known = list(model.modules())
        calls: list[str] = []

        def note(name: str) -> Callable[..., None]:
            return lambda module, *rest: calls.append(f"{name} {type(module).__name__}") if module in known else None

        handles = [
            global_hooks.register_module_forward_pre_hook(note("global pre")),
            global_hooks.register_module_forward_hook(note("global"), always_call=True),
            global_hooks.register_module_full_backward_hook(note("global backward")),
        ]
        model[2].register_forward_pre_hook(note("before"))
        model[2].register_forward_hook(lambda m, i, o: 2 * o)
        cmim = CMIM(model, X) if with_cmim else None
        model[2].register_forward_pre_hook(note("after"), prepend=True)
        model[2].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
        model[2].register_forward_hook(lambda m, i, o: o + 1, prepend=True)
        calls.clear()
        out = model(X)
        loss = out.sum()
        if cmim is not None:
            loss = loss + cmim(model)
        loss.backward()
        for handle in handles:
            handle.remove()
        return calls, out

    (calls, out), (expected_calls, expected) = run(True), run(False)
    assert torch.equal(out, expected) and calls == expected_calls


def clear(model: Any, which: str) -> None:
    """As code that wants a model without hooks does."""
    for module in model.modules() if "all" in which else ([model] if "root" in which else list(model.modules())[1:]):
        if "pre" in which or "both" in which:
            module._forward_pre_hooks.clear()
        if "post" in which or "both" in which:
            module._forward_hooks.clear()


@pytest.mark.parametrize(
    "inside, when, which",
    [
        (True, "between", "pre of all"),
        (True, "between", "post of root"),
        (True, "between", "post of all"),
        (True, "between", "both of parts"),
        (False, "between", "post of parts"),
        (False, "in the stem", "pre of root"),
        (True, "in the stem", "post of all"),
        (True, "in the stem", "post of parts"),
        (True, "in the stem", "both of all"),
        (False, "in a tapped module", "pre of parts"),
        (True, "in a tapped module", "post of all"),
        (True, "in a tapped module", "post of parts"),
        (True, "in a tapped module", "both of root"),
    ],
)
def test_hooks_that_others_clear_fail_no_pass_and_leave_nothing(inside, when, which):
    model, cmim = attached(inside)
    expected = model(X)
    if when == "between":
        clear(model, which)
    else:
        tapped = model[2] if inside else model[2][0]
        place = model[0] if when == "in the stem" else tapped
        forward = place.forward

        def clears(x: Tensor) -> Tensor:
            clear(model, which)
            return forward(x)

        place.forward = clears
    for _ in range(2):
        assert torch.equal(model(X), expected)
        assert when == "in a tapped module" or modes() == []
        with contextlib.suppress(CMIMError), warnings.catch_warnings():
            warnings.simplefilter("ignore", CMIMWarning)
            cmim(model)
        assert modes() == []
    cmim.remove()
    assert torch.equal(model(X), expected)


# -- what raises ---------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def raises(*_: Any) -> None:
    raise Boom


@pytest.mark.parametrize("inside, where", [(True, "root"), (True, "tapped"), (False, "stem")])
@pytest.mark.parametrize("how", ["pre", "pre first", "post", "post first", "forward"])
def test_what_raises_in_a_pass_is_raised_and_nothing_is_captured(how, inside, where):
    model, cmim = attached(inside)
    place = {"root": model, "tapped": model[2], "stem": model[0]}[where]
    forward, handle = place.forward, None
    if how == "forward":
        place.forward = raises
    elif "post" in how:
        handle = place.register_forward_hook(raises, prepend="first" in how)
    else:
        handle = place.register_forward_pre_hook(raises, prepend="first" in how)
    with pytest.raises(Boom):
        model(X)
    assert modes() == []
    place.forward = forward
    if handle is not None:
        handle.remove()
    with pytest.raises(CMIMError, match=NO_PASS):
        cmim(model)
    assert equal(trained(model, cmim), trained(*attached(inside)))


def test_a_pass_within_an_exception_handler_is_captured_also_if_it_returns_nothing():
    class Stores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(True)

        def forward(self, x: Tensor) -> None:
            self.out = self.net(x)

    model = Stores()
    cmim = CMIM(model, X)
    try:
        raise Boom
    except Boom:
        model(X)
        assert cmim(model) > 0


@each_way
def test_a_forward_that_catches_what_a_tapped_module_raises_goes_on(inside):
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.fails = network(inside), False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                with contextlib.suppress(RuntimeError):
                    self.net[2](x)  # of other channels
            return self.net(x)

    torch.manual_seed(0)
    model = Catches()
    cmim = CMIM(model, X)
    expected = model(X)
    model.fails = True
    assert torch.equal(model(X), expected)
    with contextlib.suppress(CMIMError):
        cmim(model)
    model.fails = False
    model(X)
    assert cmim(model) > 0


def again(model: Any, cmim: Any) -> None:
    model(X)


def ask(model: Any, cmim: Any) -> None:
    with pytest.raises(CMIMError, match=NO_PASS):
        cmim(model)


def remove(model: Any, cmim: Any) -> None:
    cmim.remove()


def pause(model: Any, cmim: Any) -> None:
    with cmim.paused():
        pass


@pytest.mark.parametrize("then", [again, ask, remove, pause])
def test_after_an_interrupt_whatever_comes_next_leaves_no_function_mode(then):
    model, cmim = attached(inside=True)
    forward = model[2].forward

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model[2].forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model[2].forward = forward
    then(model, cmim)
    assert modes() == []


def test_an_interrupt_and_a_plug_in_that_is_dropped_leave_no_function_mode():
    model, cmim = attached(inside=True)

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model[2].forward = interrupted
    with contextlib.suppress(KeyboardInterrupt):
        model(X)
    del cmim
    gc.collect()
    assert modes() == []


def test_an_interrupt_within_the_mode_of_somebody_else_leaves_that_mode_to_its_owner():
    model, cmim = attached(inside=True)

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model[2].forward = interrupted
    with contextlib.suppress(KeyboardInterrupt), torch.device("meta"):
        model(X)
    del model[2].forward
    assert torch.zeros(1).device.type == "cpu"
    assert trained(model, cmim)


def test_an_interrupt_does_not_disturb_what_is_compiled_after_it():
    model, cmim = attached()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model[5].register_forward_hook(interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        model(X)
    handle.remove()
    compiled(model)(X)
    assert cmim(model) > 0


def test_a_pass_without_a_loss_is_let_go_before_the_next_one_runs():
    """Validation without no_grad(), adversarial steps: the memory of two passes would be held at once."""
    model, _cmim = attached()
    seen = Activations(model)
    alive: list[int] = []
    model[0].register_forward_pre_hook(lambda *_: alive.append(seen.alive() if seen.references else 0))
    for training in (False, False, True, True):
        model.train(training)
        model(X)
    assert alive == [0, 0, 0, 0]


def test_an_older_pass_gives_no_loss_where_others_cleared_the_forward_hooks_since():
    model, cmim = attached()
    model(X)
    model._forward_hooks.clear()
    model(2 * X)
    with pytest.raises(CMIMError, match=NO_PASS):
        cmim(model)


def test_a_module_whose_hooks_are_registered_again_without_keywords_runs_and_is_told():
    """As torch.ao.quantization does when it swaps modules."""
    model, cmim = attached()
    place = model[2][0]
    swapped = Binary()
    for hook in place._forward_pre_hooks.values():
        swapped.register_forward_pre_hook(hook)
    for hook in place._forward_hooks.values():
        swapped.register_forward_hook(hook)
    model[2][0] = swapped
    for hooks, of in ((model._forward_pre_hooks, "_forward_pre_hooks_with_kwargs"), (model._forward_hooks, None)):
        assert hooks and (of is None or getattr(model, of))
    model._forward_pre_hooks_with_kwargs.clear()
    model._forward_hooks_with_kwargs.clear()
    model(X)
    with pytest.warns(CMIMWarning, match="the forward pass did not reach it"):
        cmim(model)


def test_warnings_that_are_errors_fail_no_pass():
    model, cmim = attached()
    model[2] = copy.deepcopy(model[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(101):  # passes without a loss are told, too
            model(X)
        with pytest.raises((CMIMError, CMIMWarning)):
            cmim(model)


class Passes(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("opened, closed", [("pre 2", "pre 3"), ("pre 1", "post 2"), ("pre 1", "pre 3")])
def test_function_modes_of_others_may_open_and_close_anywhere(opened, closed):
    model, cmim = attached(inside=True)
    mode = Passes()

    def at(place: str, act: Callable[[], object]) -> None:
        kind, index = place.split()
        module = model[int(index)]
        register = module.register_forward_pre_hook if kind == "pre" else module.register_forward_hook
        register(lambda *_: act() and None)

    at(opened, mode.__enter__)
    at(closed, lambda: mode.__exit__(None, None, None))
    model(X)
    assert modes() == []
    with mode:
        model(X)
        assert modes() == [mode]
    assert cmim(model) > 0


# -- forwards of unusual form --------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """Runs itself for a first guess."""

    def __init__(self, inside: bool, gradients: bool) -> None:
        super().__init__()
        self.net, self.condition, self.gradients = network(inside), nn.Linear(3, 2), gradients

    def forward(self, x: Tensor, guess: Tensor | None = None) -> Tensor:
        if guess is None:
            with torch.set_grad_enabled(self.gradients):
                guess = self(x, torch.zeros(len(x), 3))
        return self.net(x + self.condition(guess)[:, :, None, None])


@pytest.mark.parametrize("inside, with_gradients", [(False, True), (True, True), (True, False)])
def test_a_forward_that_calls_itself_is_one_pass(inside, with_gradients):
    torch.manual_seed(0)
    model = Conditioned(inside, with_gradients)
    plain = copy.deepcopy(model)
    cmim = CMIM(model, X)
    assert len(cmim.taps) == (4 if with_gradients else 2)
    for _ in range(2):
        assert torch.equal(model(X), plain(X))
        assert cmim(model) > 0
        assert set(cmim.metrics) == {tap.name for tap in cmim.taps}


def test_a_forward_that_returns_a_generator_runs_as_without():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.lazy = network(True), False

        def forward(self, x: Tensor) -> Any:
            return (self.net(x) for _ in range(2)) if self.lazy else self.net(x)

    model = Lazy()
    cmim = CMIM(model, X)
    expected = model(X)
    model.lazy = True
    for found in model(X):
        assert torch.equal(found, expected)
    with pytest.raises(CMIMError, match="reached none of the taps"):
        cmim(model)


# -- threads -------------------------------------------------------------------------------------------------------


def in_thread(act: Callable[[], Any]) -> Any:
    """What a function returns in a thread of its own."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(act())
        except BaseException as error:
            found.append(error)
        found.append(modes())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[1] == []
    return found[0]


def test_an_evaluation_with_gradients_in_a_thread_leaves_the_waiting_pass_alone():
    model, cmim = attached(inside=True)
    reference, other = attached(inside=True)
    model(X)
    in_thread(lambda: model(torch.randn(3, 2, 4, 4)))
    reference(X)
    assert torch.equal(cmim(model), other(reference))


@pytest.mark.parametrize("how", [lambda model: model, compiled], ids=["eager", "compiled in the first"])
def test_training_may_go_on_in_another_thread(how):
    model, cmim = attached(inside=True)
    reference, other = attached(inside=True)
    run = how(model)
    for m, c in ((run, cmim), (reference, other)):
        m(X)
        c(model if c is cmim else reference)

    def step() -> Tensor:
        run(X)
        return cmim(model)

    loss = in_thread(step)
    reference(X)
    assert isinstance(loss, Tensor), loss
    torch.testing.assert_close(loss, other(reference))


def test_a_pass_of_another_thread_is_named_where_its_loss_is_asked_for():
    model, cmim = attached()
    stop, ran = threading.Event(), threading.Event()

    def run() -> None:
        model(X)
        ran.set()
        stop.wait()

    thread = threading.Thread(target=run)
    thread.start()
    ran.wait()
    with pytest.raises(CMIMError, match="the model ran in another thread"):
        cmim(model)
    stop.set()
    thread.join()


def test_threads_train_at_the_same_time():
    model, cmim = attached(inside=True)
    errors: list[BaseException] = []

    def run(rows: int) -> None:
        try:
            for _ in range(10):
                model(torch.randn(rows, 2, 4, 4))
                assert cmim(model).isfinite() and modes() == []
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rows,)) for rows in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_thread_that_ended_leaves_no_activation():
    model, cmim = attached()
    activations = Activations(model)
    for _ in range(2):
        in_thread(lambda: model(X) and None)
    model(X)
    cmim(model).backward()
    activations.remove()
    assert activations.alive() == 0


# -- state ---------------------------------------------------------------------------------------------------------


def test_no_parameter_of_the_model_is_kept_alive():
    """As fully_shard and load_state_dict(assign=True) replace them."""
    model, cmim = attached()
    trained(model, cmim)
    before = [weakly for p in model.parameters() if (weakly := torch._C._WeakTensorRef(p)) is not None]
    model.zero_grad()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    gc.collect()
    assert all(weakly.expired() for weakly in before)
    model.requires_grad_(True)
    trained(model, cmim)


def test_a_pass_learns_nothing():
    """A pass that took another way, or failed, changes nothing for the one after it."""
    model, cmim = attached(queue_size=0)
    expected = trained(model, cmim)
    model, cmim = attached(queue_size=0)
    for other in (X[:0], X[:1], batch(3, size=9)[0]):
        model(other)
    with pytest.raises(RuntimeError):
        model(X[:, :1])
    with torch.no_grad():
        model(X)
    model.eval()(X)
    model.train()
    assert equal(trained(model, cmim), expected)
    assert all(isinstance(value, Tensor) for value in cmim.state_dict().values())
    assert not [m for m in model.modules() if isinstance(m, BinaryConv)]  # the network of modules, not of functions


def test_a_tapped_module_that_raises_and_is_passed_over_returned_nothing():
    class Falls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(False, channels=(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            for module in self.net:
                with contextlib.suppress(Boom):
                    x = module(x)
            return x

    torch.manual_seed(0)
    model = Falls()
    cmim = CMIM(model, X, taps_per_step=None)
    tapped = model.get_submodule(cmim.taps[0].binary.module)
    assert cmim.taps[0].binary.kind == "output" and len(cmim.taps) > 1

    def raises(x: Tensor) -> Tensor:
        raise Boom

    tapped.forward = raises
    model(X)
    with pytest.warns(CMIMWarning, match=f"Tap {cmim.taps[0].name}: the forward pass did not reach it"):
        assert cmim(model) > 0
