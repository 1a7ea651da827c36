"""The second form of the contrast: a full-precision network's activation in place of a_F."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._compat import force_eager
from .discovery.find import Tap
from .discovery.history import operands
from .discovery.inputs import as_inputs, is_strided, varied
from .discovery.trace import Sighting, Site, Trace, record
from .errors import CMIMError, warn_once
from .passes import BINARY, LATENT, Pass, Pickup
from .wrappers import unwrapped


class Teacher:
    """A full-precision network that runs beside the binary one, without gradients, on the same input.

    It has modules of the same names. Its activation for a tap is what a convolution or matrix product receives there in
    place of a_B: in the module of that name, the operand with the same index. If no product runs in that module,
    as in a ReLU in place of a sign, it is the module's output.

    The arguments are those of :class:`cmim_plugin.CMIM`; ``modules`` are its ``teacher_modules``.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, taps: tuple[Tap, ...], modules: Mapping[str, str] | None
    ) -> None:
        self.model = model = unwrapped(model).eval()  # only here: deliver() refuses training mode
        names = {tap.name: (modules or {}).get(tap.name, tap.module) for tap in taps}
        unknown = sorted(set(modules or ()) - names.keys())
        if unknown:
            raise CMIMError(f"teacher_modules names taps that do not exist: {unknown}. Taps: {list(names)}.")
        known = dict(model.named_modules(remove_duplicate=False))
        missing = {tap: module for tap, module in names.items() if module not in known}
        if missing:
            raise CMIMError(
                f"The teacher has no module for these taps: {missing}. Say which it is with "
                f"teacher_modules={{tap name: teacher module name}}. The teacher's modules: {list(known)[1:]}."
            )
        inputs = as_inputs(example_input)
        try:
            with torch.no_grad(), force_eager():
                try:
                    # An example of zeros may look binary. (The batch size serves twins only, of which there are none.)
                    trace = record(model, varied(inputs, 0), batch=0)
                except Exception:  # it may take no other values
                    trace = record(model, inputs, batch=0)
        except Exception as error:
            raise CMIMError(f"The teacher's forward raised {type(error).__name__} on example_input: {error}") from error
        # The trace knows a shared module by the first of its names.
        first_names = {module: name for name, module in model.named_modules()}
        found = [_counterpart(tap, first_names[known[names[tap.name]]], trace) for tap in taps]
        binary = [tap.name for tap, activation in zip(taps, found, strict=True) if activation.snapshot.two_valued]
        if binary:
            warn_once(self, f"The teacher's activations for these taps are binary themselves: {binary}.")
        self._pickups = [Pickup(k, LATENT, activation.site) for k, activation in enumerate(found)]
        #: The taps, with the teacher's activation in place of the latent.
        self.taps = tuple(_with_teacher(tap, s.snapshot.shape) for tap, s in zip(taps, found, strict=True))

    def described(self, k: int) -> str:
        """The teacher's activation for a tap, in words."""
        site, tap = self._pickups[k].site, self.taps[k]
        return f"the teacher's {site.kind}" + ("" if site.module == tap.module else f" of {site.module}")

    def deliver(self, to: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the teacher on a batch and hand its activations over as the latent side."""
        if self.model.training:
            raise CMIMError("The teacher is in training mode: leave it out of model.train(), or call teacher.eval().")
        calls = [0] * len(self.taps)  # so far, of the module of each tap

        def pick(k: int, site: Site, *hooked: Any) -> None:  # (args, kwargs) or (args, kwargs, output)
            if calls[k] == site.call:
                to.pick_up(self._pickups[k : k + 1], site.kind, hooked if site.kind == "input" else hooked[-1])
            calls[k] += 1

        handles = []
        for k in to.scheduled:
            site = self._pickups[k].site
            module = self.model.get_submodule(site.module)
            register: Any = module.register_forward_pre_hook if site.kind == "input" else module.register_forward_hook
            handles.append(register(lambda _, *hooked, k=k, site=site: pick(k, site, *hooked), with_kwargs=True))
        try:
            with torch.no_grad():
                self.model(*_copied(args), **_copied(kwargs))
        finally:
            for handle in handles:
                handle.remove()


def _copied(inputs: Any) -> Any:
    """A copy of inputs that the model gets next: a forward may write into them, or take things out of a dictionary."""
    if isinstance(inputs, Tensor):
        return inputs.detach().clone() if is_strided(inputs) else inputs
    if type(inputs) is dict:
        return {key: _copied(value) for key, value in inputs.items()}
    return type(inputs)(map(_copied, inputs)) if type(inputs) in (list, tuple) else inputs


def _counterpart(tap: Tap, module: str, trace: Trace) -> Sighting:
    """The teacher's activation for a tap, at the input or output of a module, where a hook captures it."""
    products = [s for _, s in operands(trace, module) if s.from_input]
    if products:
        index = 0 if len(products) == 1 else tap.product
        received = products[index].snapshot.sightings if index < len(products) else []
        # The last one before the product: an earlier one may be overwritten, which an example of zeros does not show.
        found = [s for s in received if s.site.kind in ("input", "output") and s.seq <= products[index].seq][-1:]
        trouble = (
            f"has nothing in the place of tap {tap.name}, which no module is given or returns. Name another module "
            "with teacher_modules={tap name: teacher module name}, or leave the tap out of taps="
        )
    else:
        outputs = [s for s in trace.sightings if (s.site.module, s.site.kind) == (module, "output")]
        found = [s for s in outputs if s.site.call == tap.call] or outputs
        trouble = "did not run in its forward"
    if not found:
        raise CMIMError(f"The teacher's module {module or '(model)'!r} {trouble}.")
    return found[0]


def _with_teacher(tap: Tap, shape: torch.Size) -> Tap:
    layout = tap.layouts[BINARY]
    if layout.spatial is not None and len(shape) <= layout.spatial:
        raise CMIMError(
            f"The teacher's activation for tap {tap.name} has shape {tuple(shape)}; "
            f"one with {layout.spatial} spatial dimensions is needed."
        )
    return replace(tap, latent=None, layouts=(layout, layout), latent_channels=layout.channels(shape))
