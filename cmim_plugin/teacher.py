"""The second form of the contrast: a full-precision network's activation in place of the latent one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .discovery.inputs import as_inputs, tensors_in
from .errors import CMIMError
from .passes import BINARY, LATENT, Pass, Tap


class Teacher:
    """A full-precision network that runs beside the binary one, without gradients, on the same input.

    What is taken at a module of the teacher is what a convolution or linear layer would consume there: the *input* of a
    module that has a weight of two or more dimensions, the *output* of any other (an activation).

    Args:
        model: the teacher. It is put into eval mode, here and nowhere else, and is not trained.
        example_input: as for the binary network.
        taps: the binary network's taps.
        modules: tap name to teacher module name; the module that binarizes has the same name where a tap is not listed.

    Raises:
        CMIMError: a module is not in the teacher or does not run, or its activation has too few dimensions.
    """

    def __init__(
        self, model: nn.Module, example_input: Any, taps: tuple[Tap, ...], modules: Mapping[str, str] | None
    ) -> None:
        self.model = model.eval()
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
        # Of each tap: the module's name, the module, and which call of it: the same as of the module that binarizes.
        self._sources = [(names[tap.name], known[names[tap.name]], tap.call) for tap in taps]
        try:
            activations = self._run(*as_inputs(example_input))
        except CMIMError:
            raise
        except Exception as error:
            raise CMIMError(
                f"The teacher's forward raised {type(error).__name__} on example_input: {error}. It runs on the inputs "
                "of the binary network."
            ) from error
        #: The taps, with the teacher's activation in the latent's place.
        self.taps = tuple(_taught(tap, x.shape) for tap, x in zip(taps, activations, strict=True))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The teacher's activation of each tap."""
        calls = [0] * len(self._sources)
        seen: dict[int, Tensor] = {}

        def pick(k: int, wanted: int, module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
            # The first call stands in for a wanted one that does not come.
            if calls[k] in (0, wanted):
                weight = getattr(module, "weight", None)
                source = (inputs, keywords) if isinstance(weight, Tensor) and weight.ndim >= 2 else output
                seen[k] = next(t for _, t in tensors_in(source))
            calls[k] += 1

        handles = [
            module.register_forward_hook(partial(pick, k, call), with_kwargs=True)
            for k, (_, module, call) in enumerate(self._sources)
        ]
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        silent = [name for k, (name, _, _) in enumerate(self._sources) if k not in seen]
        if silent:
            raise CMIMError(f"These modules of the teacher did not run in its forward: {silent}.")
        return [seen[k] for k in range(len(self._sources))]

    def deliver(self, to: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the teacher on a batch and hand its activations over as the latent side."""
        if self.model.training:
            raise CMIMError("The teacher is in training mode: leave it out of model.train(), or call teacher.eval().")
        activations = self._run(args, kwargs)
        for k in to.scheduled:
            to.attempt(k, partial(to.take, k, LATENT, activations[k]))


def _taught(tap: Tap, shape: torch.Size) -> Tap:
    layout = tap.layouts[BINARY]
    if layout.spatial is not None and len(shape) <= layout.spatial:
        raise CMIMError(
            f"The teacher's activation for tap {tap.name} has shape {tuple(shape)}; "
            f"one with {layout.spatial} spatial dimensions is needed."
        )
    return replace(tap, latent=None, layouts=(layout, layout), latent_channels=layout.channels(shape))
