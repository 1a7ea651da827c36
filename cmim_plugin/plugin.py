"""CMIM, the class that users see: it builds the parts, checks arguments, holds the state and prints itself."""

from __future__ import annotations

import contextlib
import copy
import math
import numbers
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .capture import Capture, attached_to, remove_all_hooks
from .contrast import Contrast
from .discovery.find import BinaryActivation, Tap, discover
from .errors import CMIMError, warn_once
from .heads import Heads
from .objectives import NCE, InfoNCE
from .passes import Pass
from .report import Report, measure
from .sampling import Schedule, seeded_generator
from .teacher import Teacher
from .text import folded, table
from .wrappers import path_to, unwrapped

# Budget of the heads: a fifth of the network's parameters, but at least 250,000. Above it, embed_dim is halved.
_BUDGET_SHARE, _BUDGET_MIN = 0.2, 250_000
_NEW_HEADS = (
    "The model loaded a state_dict, this CMIM did not: its heads start anew. To resume exactly, save cmim.state_dict() "
    "beside the model's, and load it. Starting from a baseline's checkpoint is fine."
)


class CMIM(nn.Module):
    """Contrastive mutual information maximisation between binary activations and their latents (arXiv 2207.02970).

    Finds the binary activations of ``model``, hooks them and builds a pair of heads for each::

        cmim = CMIM(model, example_input)
        ...
        loss = criterion(model(x), y)
        loss += cmim(model)

    The heads train themselves: each call first takes a step of Adam with the gradient of the previous backward pass.
    There is nothing to add to an optimizer, and :meth:`parameters` is empty. The loss, in nats, is
    ``weight * sum_k w_k L_k``: ``L_k`` is what the objective gives for tap ``k`` of ``K``, in forward order from 0, and
    ``w_k`` is ``layer_decay ** (K - 1 - k)``, divided by the sum of these.

    Args:
        model: the binary network, on the device that it trains on. Nothing of it is changed; it is not a submodule.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs of the model. Zeros will do.
        taps: None for all binary activations found; names of taps (as :func:`find_binary_activations` gives them); or
            ``(name, module) -> bool``, asked for each one found.
        weight: what the loss is multiplied by. May be changed at any time: ``cmim.weight = ...``.
        instances: what is contrasted. "position": the channels at single pixels or tokens, drawn at random from the
            batch. "image": the channel means of whole samples (the paper's reading).
        num_positions: positions per tap and step, for ``instances="position"``; of all ranks together.
        taps_per_step: taps contrasted in each step. They take turns, and the mean of the loss over the turns is the
            loss of all taps. None: all taps in every step, as compiled code and CUDA graphs always do.
        objective: ``InfoNCE()``, the default, or ``NCE(num_samples=len(dataset))``, or a function of your own. It is
            called as ``f(z_b, z_f, temperature=..., labels=...)`` with the embeddings of several taps, ``(taps, n, D)``
            each, and returns their losses, ``(taps,)``. It gets ``mask`` where there is one, and ``queue_b``,
            ``queue_f`` and ``queue_labels`` with a queue. A method ``bound(loss, num_negatives)`` gives the bounds.
        temperature: divides the inner products of the embeddings.
        embed_dim: width ``D`` of the embeddings. None for 128, or 64 or 32 where the heads would hold more than a fifth
            of the network's parameters and more than 250,000.
        heads_lr: learning rate of the heads' Adam. 0 leaves the training of ``cmim.heads.weights`` to you.
        queue_size: past embeddings kept for each tap as further negatives; 0 for none. A step adds those of its taps.
        layer_decay: in (0, 1]; below 1 the weights grow towards the output.
        teacher: a full-precision network with the same modules. What the convolution or matrix product receives in its
            module of the same name replaces a_F; in a module without a product, the module's output does. It runs on
            the same inputs without gradients, in eval mode, and is not kept in this module's state.
        teacher_modules: tap name to teacher module name, for the taps whose module has another name in the teacher.
        batch_size: samples in ``example_input``. Needed where its shapes leave that open, or where time comes first.

    Raises:
        CMIMError: no binary activation was found, an argument does not fit, or a CMIM is attached already. The model
            is then as it was.
    """

    _default_taps = slice(None)  # with taps=None: this part of the taps found

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        taps: Collection[str] | Callable[[str, nn.Module], bool] | None = None,
        weight: float = 0.1,
        instances: str = "position",
        num_positions: int = 64,
        taps_per_step: int | None = 6,
        objective: Callable[..., Tensor] | None = None,
        temperature: float = 0.1,
        embed_dim: int | None = None,
        heads_lr: float = 3e-3,
        queue_size: int = 0,
        layer_decay: float = 1.0,
        teacher: nn.Module | None = None,
        teacher_modules: Mapping[str, str] | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight  # its setter checks it
        _check_settings(locals())
        model = unwrapped(model)
        if attached_to(model):
            raise CMIMError("A CMIM is attached to this model already: call its remove(), or CMIM.remove_from(model).")

        discovered, batch_source = discover(model, example_input, batch_size)
        #: Every binary activation found; "reason" says why one cannot be tapped.
        self.found = tuple(replace(f, reason=_reason_not_tapped(f, instances, teacher)) for f in discovered)
        chosen = _chosen(self.found, taps, model)
        tapped = chosen if taps is not None else chosen[self._default_taps]
        # With a teacher, a_F is the teacher's activation. Capture.begin() runs the teacher, before the model.
        self._teacher = None if teacher is None else Teacher(teacher, example_input, tapped, teacher_modules)

        #: What is contrasted, in forward order.
        self.taps: tuple[Tap, ...] = tapped if self._teacher is None else self._teacher.taps
        self.instances = instances
        generator = seeded_generator()
        self.contrast = Contrast(
            self.taps,
            objective=objective or InfoNCE(),
            temperature=temperature,
            embed_dim=embed_dim or _default_embed_dim(model, self.taps),
            heads_lr=heads_lr,
            queue_size=queue_size,
            layer_decay=layer_decay,
            generator=generator,
        )
        positions = num_positions if instances == "position" else None  # None: the means of whole images
        self.schedule = Schedule(len(self.taps), taps_per_step, positions, generator)
        self.to(next((p.device for p in model.parameters()), torch.device("cpu")))
        self._capture = Capture(model, self.taps, self.schedule, batch_source, teacher=self._teacher)
        self._synced = False  # whether all ranks started from the same state
        self._sync()
        self._capture.attach()
        # The hooks go with a plug-in that is garbage-collected. At exit there is nothing to clean up.
        weakref.finalize(self, self._capture.detach).atexit = False

    @classmethod
    def paper(cls, model: nn.Module, example_input: Any, num_samples: int, **settings: Any) -> CMIM:
        """The paper's plain reading: whole images, every layer, :class:`NCE`, weights that grow towards the output.

        Weight and layer decay are our choice. ``num_samples``: size of the training set; ``settings`` override all.
        """
        reading = {"instances": "image", "objective": NCE(num_samples), "weight": 0.03, "layer_decay": 0.8}
        return cls(model, example_input, **{**reading, "taps_per_step": None, **settings})

    # -- the loss ------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The weighted loss of the model's last forward pass with gradients. Each forward pass gives one loss.

        In eager models, a forward pass in eval mode does not replace one in training mode that waits for this call.

        Args:
            model: the model that was attached to, as it is or wrapped (DDP, FSDP, torch.compile, Fabric, ...).
            labels: ``(B,)`` integer classes of the batch, or for positions ``(B, *spatial)`` of its pixels, at any
                resolution. Rows of the same class are then no negatives of each other. A negative number is no label.
            mask: ``(B, tokens)``, zero or False for padding. Positions there are left out, not drawn anew. None: the
                model's own input ``attention_mask``, if it has integers or booleans. With a queue or
                ``instances="image"`` the model's mask is ignored, and a mask passed here is an error.

        Returns:
            0-d float32, with gradients to heads and network. A weight of 0 trains neither. Zero where the batch has
            no negatives. On several ranks the loss over the batches of all of them.

        Raises:
            CMIMError: no forward pass was captured, or an activation could not be (the message says why); another
                model; labels or a mask that do not fit the batch; the hooks were removed or are paused.
        """
        forward_pass = self._begin_step(model)
        # Two statements: as one nested call, torch.compile of torch 2.6 would keep the bound method of the first call.
        value = self.contrast(forward_pass, labels, mask)
        return self._finish_step(value, forward_pass)

    def _begin_step(self, model: nn.Module) -> Pass:
        """Take the waiting forward pass and check it. The heads then take their step of Adam."""
        path = path_to(self._capture.model_ref(), model)
        forward_pass = self._capture.pop()
        # Layers dropped at random may skip all taps: the dry run saw it, or an earlier step went well.
        may_skip_all = self.schedule.steps_taken > 0 or all(self.taps[k].skipped for k in forward_pass.scheduled)
        forward_pass.check(self, may_skip_all, self._capture.is_hooked)
        # DDP averages gradients in the first backward pass after its forward only: both losses must be in that one.
        if any(isinstance(m, nn.parallel.DistributedDataParallel) and m.require_backward_grad_sync for m in path):
            forward_pass.require_one_backward()
        self._sync()
        self.heads.step()
        return forward_pass

    def _finish_step(self, value: Tensor, forward_pass: Pass) -> Tensor:
        """The weighted loss, scaled so that its mean over the turns is that of all taps. Advances the schedule."""
        if self.schedule.steps_taken == 0 and self._capture.model_was_loaded and not self.contrast.loads:
            warn_once(self, _NEW_HEADS)
        self.schedule.advance()
        if not isinstance(self.weight, Tensor) and self.weight == 0:
            return self.heads.weights[:0].sum()  # not 0 * value: inf would become NaN, and missing gradients zero
        return self.weight * len(self.taps) / len(forward_pass.scheduled) * value

    def _sync(self) -> None:
        """Copy rank 0's state to all ranks, once. Each step calls it: the process group may come after this object."""
        if not self._synced and distributed.ranks() > 1:
            device = self.heads.weights.device
            loads_of_all = distributed.counts_of_all([self.contrast.loads], device)
            distributed.start_alike(self, device)
            self._synced, self.contrast.loads = True, loads_of_all[0][0]  # start_alike() counted as one load more

    @property
    def weight(self) -> float | Tensor:
        """What the loss is multiplied by."""
        return self._weight

    @weight.setter
    def weight(self, weight: float | Tensor) -> None:
        if isinstance(weight, numbers.Real) and not isinstance(weight, bool) and 0 <= weight < math.inf:
            weight = float(weight)
        elif not isinstance(weight, Tensor) or weight.ndim > 0:
            raise CMIMError(f"weight must be a number, zero or more, or a 0-d tensor; found {weight!r}.")
        self._weight = weight

    # -- figures -------------------------------------------------------------------------------------------------

    @property
    def heads(self) -> Heads:
        """The heads and their optimizer."""
        return self.contrast.heads

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Names of the taps that the next pass captures."""
        return tuple(self.taps[k].name for k in self.schedule.taps)

    @property
    def draws(self) -> Tensor:
        """``(taps, num_positions)`` int64: the random numbers by which the next pass chooses its positions
        (:func:`stratified_indices`); the first rows are for :attr:`scheduled`. Copy earlier ones into it to repeat."""
        return self.schedule.draws

    @property
    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """``{tap name: {"loss": nats, "bound": nats}}``, 0-d tensors without a graph, of the tap's last step.

        "bound" is the lower bound on the mutual information that the objective gives. Computed when it is read.
        """
        return self.contrast.metrics()

    def scalars(self, all_taps: bool = False) -> dict[str, float]:
        """Numbers for a logger or a progress bar, each tap as of its last step. Reading them waits for the device.

        Returns:
            In nats, ``"cmim/loss"``, times the present weight; ``"cmim/bound"``, the mean over the taps;
            ``"cmim/worst_bound"``; with ``all_taps`` also ``"cmim/bound/<tap name>"``. Empty at first, and no bounds
            where the objective gives none.
        """
        return self.contrast.scalars(self.weight, all_taps)

    def report(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        inputs: Callable[[Any], Any] | None = None,
        max_batches: int | None = None,
    ) -> Report:
        """What each tap keeps of its latent, over held-out data: see :class:`Report`. The training state stays.

        The model runs in eval mode without gradients, padding by its ``attention_mask`` is left out, and each rank
        reports its own data. Bound and retrieval need trained heads.

        Args:
            model: the model that was attached to, as it is or wrapped.
            loader: batches. Of a tuple, list or dict the first element is the input of the model: a tensor, a tuple of
                positional inputs or a dict of keyword inputs. Tensors are moved to the device of the model.
            inputs: batch to input of the model, for batches of another form.
            max_batches: stop after this number of batches.

        Raises:
            CMIMError: another model, a batch without an input, no batch, or no tap reached.
        """
        attached = path_to(self._capture.model_ref(), model)[-1]
        return measure(attached, self.contrast, self._capture, loader, inputs, max_batches)

    # -- attach and remove ---------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take every hook off the model, which is then as it was. Calling it again does nothing."""
        self._capture.removed = True
        self._capture.detach()

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Take the hooks of every CMIM off a model and its parts, also the inert hooks of a copied model."""
        remove_all_hooks(unwrapped(model))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model has no hook of this plug-in: to export it, to trace it, to measure it."""
        attached, model = self._capture.attached, self._capture.model_ref()
        self._capture.detach()
        try:
            yield
        finally:
            if attached and not self._capture.removed and model is not None:
                if attached_to(model):
                    warn_once(self, "Another CMIM was attached within paused(): this one stays off the model.")
                    self.remove()
                else:
                    self._capture.attach()

    # -- state ---------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CMIM:
        with torch.inference_mode(False):  # .to() within inference_mode() would make the buffers inference tensors
            return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, made by copy or pickle: the same tensors, no model, no loss."""
        self.heads.step()  # use the gradient first, as state_dict() does: pickle drops it
        return {**self.__dict__, "_capture": None, "_teacher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A capture without a model: only its weak reference holds this one.
        self._capture = Capture(nn.Module(), self.taps, self.schedule, None)
        self.heads.become_copy()

    def __copy__(self) -> CMIM:
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        return _listing(self, self._capture.attached)


def _listing(cmim: CMIM, attached: bool) -> str:
    """A title, and a table of all binary activations: what they are contrasted with, and why others are not."""
    count, chosen = len(cmim.taps), len(cmim.schedule.taps)
    some = f", {chosen} of them a step" if chosen < count else ""
    title = (
        f"CMIM: {count} of {len(cmim.found)} binary activations tapped{some}, one instance = one {cmim.instances}, "
        f"weight {float(cmim.weight):g}{'' if attached else ', not attached'}"
    )
    rows = []
    for k, (tap, share) in enumerate(zip(cmim.taps, cmim.contrast.layer_weights, strict=True)):
        teachers = cmim._teacher.described(k) if cmim._teacher else "the teacher's"
        what = f"a_B against {'its latent' if tap.latent else teachers}" + (", samples mixed" if tap.mixed else "")
        rows.append((tap.name, f"{tap.channels}", f"{share:.3f}", what))
    tapped = {tap.name for tap in cmim.taps}
    rows += [(f.name, "-", "-", f.reason or "not chosen by taps=") for f in cmim.found if f.name not in tapped]
    return f"{title}\n{table([('tap', 'channels', 'share', 'what'), *folded(rows)])}"


def _reason_not_tapped(found: BinaryActivation, instances: str, teacher: nn.Module | None) -> str | None:
    """Why a binary activation cannot be contrasted with these settings, None where it can."""
    if instances == "image":
        return found.reason or found.mixed
    if teacher is None and not found.aligned:
        return found.reason or 'its latent has another number of positions: only instances="image" can contrast them'
    return found.reason


def _chosen(
    found: tuple[BinaryActivation, ...],
    taps: Collection[str] | Callable[[str, nn.Module], bool] | None,
    model: nn.Module,
) -> tuple[BinaryActivation, ...]:
    """The binary activations that the user wants tapped, all of them tappable."""
    tappable = [f for f in found if f.tapped]
    listing = "\n".join(f"  {f.name}: {f.reason or 'can be tapped'}" for f in found)
    if not tappable:
        raise CMIMError(
            f"No binary activation that can be tapped was found in this {type(model).__name__}. A binary activation is "
            "a tensor of two values, computed from the input with a gradient, that a convolution or a matrix product "
            "receives. Two-valued operands that came nearest:\n"
            f"{listing or '  (none: binary weights alone do not count)'}\nWhat is found, and what not: docs/taps.md."
        )
    names = {f.name for f in tappable}
    if callable(taps):
        taps = [f.name for f in tappable if taps(f.name, model.get_submodule(f.module))]
    elif taps is None:
        taps = names
    elif isinstance(taps, str) or not isinstance(taps, Collection) or not all(isinstance(name, str) for name in taps):
        raise CMIMError(f"taps must be a list of names, or a function of (name, module); found {taps!r}.")
    wrong = [name for name in taps if name not in names]
    if wrong or not taps:
        what = f"names {wrong}, none of which can be tapped" if wrong else "chose none of the binary activations"
        raise CMIMError(f"taps= {what}. Found:\n{listing}")
    return tuple(f for f in tappable if f.name in taps)


def _default_embed_dim(model: nn.Module, taps: tuple[Tap, ...]) -> int:
    """128, or 64 or 32 where the heads would exceed their budget."""
    parameters = sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))
    budget = max(_BUDGET_SHARE * parameters, _BUDGET_MIN)
    channels = sum(tap.channels + tap.latent_channels for tap in taps)
    return next((dim for dim in (128, 64) if dim * channels <= budget), 32)


# Names of settings, separated by spaces; their type; a test of the value; what the error says is wanted.
Rules = list[tuple[str, Any, Callable[[Any], bool], str]]


def check(settings: dict[str, Any], rules: Rules) -> None:
    """Raise CMIMError for the first setting that breaks its rule. A boolean is no number."""
    for names, kind, fits, wanted in rules:
        for name in names.split():
            value = settings[name]
            if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
                raise CMIMError(f"{name} must be {wanted}; found {value!r}.")


def _check_settings(settings: dict[str, Any]) -> None:
    real, integer = numbers.Real, numbers.Integral
    function = "a function such as InfoNCE() or NCE(num_samples=...)"
    rules: Rules = [
        ("heads_lr", real, lambda v: 0 <= v < math.inf, "a number, zero or more"),
        ("temperature", real, lambda v: 0 < v < math.inf, "positive"),
        ("layer_decay", real, lambda v: 0 < v <= 1, "in (0, 1]"),
        ("num_positions", integer, lambda v: v >= 1, "an integer, 1 or more"),
        ("queue_size", integer, lambda v: v >= 0, "an integer, 0 or more"),
        ("taps_per_step", integer | None, lambda v: v is None or v >= 1, "an integer, 1 or more, or None for all"),
        ("embed_dim batch_size", integer | None, lambda v: v is None or v >= 1, "an integer, 1 or more, or None"),
        ("instances", str, lambda v: v in ("position", "image"), '"position" or "image"'),
        ("objective", Callable | None, lambda v: not isinstance(v, type), function),
        ("teacher", nn.Module | None, lambda v: True, "a torch.nn.Module or None"),
        ("teacher_modules", Mapping | None, lambda v: True, "a dict of tap name to module name, or None"),
    ]
    check(settings, rules)
    teacher = settings["teacher"]
    if teacher is not None and unwrapped(teacher) is unwrapped(settings["model"]):
        raise CMIMError("The teacher is the binary network itself: pass another, full-precision network.")
    if teacher is None and settings["teacher_modules"] is not None:
        raise CMIMError("teacher_modules was given without a teacher.")
