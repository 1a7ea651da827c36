"""The dry run: record a few forward passes of a model, and leave the model as it was."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .._compat import force_eager
from ..errors import CMIMError
from .inputs import BatchSource, Inputs, as_inputs, batch_sources, kind_of_values, resampled, tensors_in, varied
from .state import preserve_state
from .trace import Trace, record

_MAX_PASSES = 10  # if layers may be skipped at random
_running = threading.local()


def is_dry_run() -> bool:
    """Whether this thread runs a dry run: its passes are not captured."""
    return getattr(_running, "here", False)


def dry_run(model: nn.Module, example: Any, batch_size: int | None) -> tuple[list[Trace], BatchSource | None]:
    """Traces of the model in training mode, and where the number of samples is read.

    The first pass runs the example as it is. Its trace is kept if the example has several samples, no constant tensor,
    and the number of samples that was guessed. All others are made of varied inputs, of which the last two samples are
    equal from the second pass on; or of the example, if the model refuses these. There are two traces, ten if layers
    may be skipped at random.
    """
    inputs = as_inputs(example)
    _check(model, inputs)
    gradient_asked = False

    def not_kept(nothing: None) -> Tensor:
        nonlocal gradient_asked
        gradient_asked = True
        raise CMIMError(
            "A gradient was asked for an activation that the model computed while CMIM was attached to it. Hooks of "
            "yours have collected it: clear what they collected then, or register them after CMIM."
        )

    # Nothing runs backward, so the graph need not keep the activations, which are most of the memory.
    outer, _running.here = is_dry_run(), True
    try:
        with contextlib.suppress(CMIMError), saved_tensors_hooks(lambda tensor: None, not_kept):
            found = _dry_run(model, inputs, batch_size)
            if not gradient_asked:
                return found
        # To raise the error, or because the forward itself takes a gradient.
        return _dry_run(model, inputs, batch_size)
    finally:
        _running.here = outer
        torch.clear_autocast_cache()  # it has weights that were noise for the dry run


def _check(model: nn.Module, inputs: Inputs) -> None:
    parameters, tensors = list(model.parameters()), [t for _, t in tensors_in(inputs)]
    if torch.is_inference_mode_enabled():
        raise CMIMError("Attach outside of torch.inference_mode(), within which nothing has a gradient.")
    if not tensors:
        raise CMIMError(
            "example_input holds no tensor: pass an input of the model, as torch.zeros(2, 3, 32, 32), not its shape. "
            "Tensors are looked for in tuples, lists and dicts, and in objects with keys(): let the model take one "
            "of these, or attach to the inner network."
        )
    if any(tensor.is_meta for tensor in parameters + tensors):
        raise CMIMError(
            "The model or its example is on the meta device, without values: attach after to_empty() and loading."
        )
    # A dry run would disturb the state of FSDP, which is in objects of its own.
    if any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__):
        raise CMIMError("The model is sharded already: attach CMIM first, then call fully_shard().")
    if any(nn.parameter.is_lazy(p) for p in parameters):
        raise CMIMError("The model has lazy parameters without a shape yet. Run it once: model(example_input).")
    if parameters and not any(p.requires_grad for p in parameters):
        raise CMIMError(
            "The model is frozen: none of its parameters requires a gradient. Attach to a model in training, after "
            "model.requires_grad_(True) for the parts that are trained."
        )


def _dry_run(model: nn.Module, inputs: Inputs, batch_size: int | None) -> tuple[list[Trace], BatchSource | None]:
    with preserve_state(model, inputs), torch.enable_grad(), force_eager():
        torch.default_generator.manual_seed(0)  # the same model gives the same taps
        random.seed(0)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(0)
        model.train()
        _fill_zero_weights(model)
        sources = batch_sources(model, inputs, batch_size)
        sizes = list(sources) if batch_size is None else [batch_size]
        stand_in = any(kind_of_values(t) == "constant" for _, t in tensors_in(inputs))
        first: Trace | None = None
        try:
            # A network that sets up scales by its first batch must not do so by zeros.
            with preserve_state(model, inputs) if stand_in else contextlib.nullcontext():
                first = record(model, inputs, sizes[0] if sizes else 0)
        except Exception as error:
            if set(sources) != {1}:  # batch normalization may need two samples: the attempts below have them
                several = " A tuple is several inputs: pass a single one as a tensor." if len(inputs[0]) > 1 else ""
                raise CMIMError(
                    f"The dry run failed: the model's forward raised {type(error).__name__}: {error}. Pass an "
                    f"example_input that the model accepts in training mode, on its device (zeros will do).{several}"
                ) from error
        batch = _number_of_samples(sizes, first)
        kept = [first] if first is not None and not stand_in and first.batch == batch > 1 else []
        failure: Exception | None = None
        for inputs_of in _attempts(inputs, batch, sources.get(batch)):
            try:
                return _traces(model, inputs_of, kept, inputs), sources.get(batch)
            except Exception as error:
                failure = error
        raise CMIMError(
            f"The dry run failed: the model's forward raised {type(failure).__name__}: {failure} in its second pass on "
            "the example_input. Pass an example_input that the model accepts again and again in training mode."
        ) from failure


@torch.no_grad()
def _fill_zero_weights(model: nn.Module) -> None:
    """Fill all-zero weights of products and norms with noise: a branch that starts as zero hides its signs. Vectors are
    filled in modules with ``eps`` alone, which are norms: learned thresholds and shifts stay zero."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            matrix = sum(n > 1 for n in p.shape) > 1
            weight = (matrix or hasattr(module, "eps")) and name.endswith("weight") and p.is_floating_point()
            if weight and type(p.data) is Tensor and not p.any():
                p.data.copy_(torch.randn(p.shape, generator=generator, device="cpu"))


def _number_of_samples(sizes: list[int], first: Trace | None) -> int:
    """The number of samples: the only one possible, or the first dimension of most calls with a gradient."""
    received = [e.arguments[0] for e in first.events if e.has_gradient and e.arguments] if first is not None else []
    rows = Counter(s.snapshot.shape[0] for s in received if len(s.snapshot.shape) > 1 and s.from_input)
    for size in sizes:
        if len(sizes) == 1 or 2 * rows[size] > sum(rows[other] for other in sizes):
            return size
    found = f"{sorted(sizes)} are lengths of its inputs" if sizes else "no input has a length"
    raise CMIMError(
        f"The number of samples in example_input is not clear: {found}. Say how many samples it has: batch_size=..."
    )


# Takes the number of a pass. Returns its inputs, how many samples these have, and whether the last two are equal.
_InputsOf = Callable[[int], tuple[Inputs, int, bool]]


def _attempts(inputs: Inputs, batch: int, source: BatchSource | None) -> list[_InputsOf]:
    """The inputs to try, the best first."""
    as_given: list[_InputsOf] = [lambda n: (varied(inputs, n, source), batch, False), lambda n: (inputs, batch, False)]
    if source is None:
        return as_given

    def with_twins(samples: int, different: int, n: int) -> tuple[Inputs, int, bool]:
        """So many samples in pass 0. Then so many different ones of them, and the last of these again."""
        some = varied(resampled(inputs, source, [i % batch for i in range(samples)]), n, source)
        if n == 0:
            return some, samples, False
        return resampled(some, source, [*range(different), different - 1]), different + 1, True

    # Four, for over two or three samples batch normalization gives two values. One sample more tells the batch from
    # what is as long by accident. A model may take no other number than that of the example.
    four, three = max(batch, 4), max(batch, 3)
    sizes = [(four, four), (four, four - 1), (three, three - 1)]
    return [*(partial(with_twins, *size) for size in dict.fromkeys(sizes)), *as_given]


def _traces(model: nn.Module, inputs_of: _InputsOf, kept: list[Trace], example: Inputs) -> list[Trace]:
    """``kept``: the trace of the example, if it is used."""
    traces = list(kept) or [record(model, *inputs_of(0))]
    traces.append(record(model, *inputs_of(1)))
    if traces[0].functions != traces[1].functions:  # the first pass may have set something up, as a scale
        traces[0] = record(model, example, traces[0].batch) if kept else record(model, *inputs_of(0))
    while len(traces) < _MAX_PASSES and _are_random(traces):
        traces.append(record(model, *inputs_of(len(traces))))
    return traces


def _are_random(traces: list[Trace]) -> bool:
    """Whether the passes may differ in the modules that they call, as if layers are skipped at random."""
    same_batch = traces[1:] if len(traces) > 2 else traces  # the first trace has another number of samples
    return any(t.draws_scalars or t.calls != same_batch[0].calls for t in same_batch)
