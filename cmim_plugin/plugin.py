"""The plug-in: composes the rest, checks what it is given, keeps the state, prints itself."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import weakref
from torch import Tensor, nn

from .capture import BINARY, Capture, Pass, Tap, attached_to
from .contrast import Contrast
from .discovery import BinaryActivation, discover
from .errors import CMIMError, warn_once
from .heads import Heads
from .objectives import NCE, InfoNCE
from .report import Report, measure
from .sampling import advance
from .teacher import Teacher, latent_layout
from .text import folded, table
from .wrappers import averages_one_backward, path_to, refuse_replicas, unwrapped
from . import distributed

# Heads hold at most this share of the network's parameters, or so many where that is more: embeddings get narrower.
_HEADS_SHARE, _HEADS_LEAST = 0.2, 250_000
# Losses after which it is looked whether the heads learn; the answer waits for the device.
_LOOK_AT = (100, 1000)


class CMIM(nn.Module):
    """Contrastive mutual information maximisation between binary activations and their latents (arXiv 2207.02970).

    Finds the binary activations of ``model``, hooks them and builds a pair of heads for each::

        cmim = CMIM(model, example_input)
        ...
        loss = criterion(model(x), y)
        loss += cmim(model)

    The heads train themselves: each loss first takes a step of Adam with the gradient that the backward pass of the last
    one left. There is nothing to add to an optimizer, and :meth:`parameters` is empty. The loss is
    ``weight * sum_k w_k L_k`` in nats, with ``w_k`` proportional to ``layer_decay ** (K - 1 - k)`` and of sum 1.

    Args:
        model: the binary network, on the device that it trains on. Nothing of it is changed; it is not a submodule.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs of the model. Zeros will do.
        taps: None for all binary activations found; names of taps (as :func:`find_binary_activations` gives them); or
            ``(name, module) -> bool``, asked for each one found.
        weight: what the loss is multiplied by. May be changed at any time: ``cmim.weight = ...``.
        instances: what is one sample of the contrast: "position" (a random sample of the positions or tokens of the
            batch: a local binary code against its own latent) or "image" (pooled over space: the paper's reading).
        num_positions: positions a tap and step, for ``instances="position"``; of all ranks together.
        taps_per_step: contrast so many taps a step, in turn, whose losses then stand for those of all: the gradient is
            the same on average, and the cost does not grow with depth. None for all of them; so does what is compiled or
            recorded in a CUDA graph.
        objective: :class:`InfoNCE`, ``NCE(num_samples=len(dataset))``, or any function of ``(z_b, z_f, *, temperature,
            labels, ...)`` (the keywords of :func:`info_nce` that are used) that takes the embeddings of several taps side
            by side, ``(taps, n, D)``, and returns their losses, ``(taps,)``. One with a method ``bound(loss,
            num_negatives)`` gives bounds.
        temperature: of the critic.
        embed_dim: width ``D`` of the embeddings. None for 128, or less (64, 32) where the heads would hold more than a
            fifth of the network's parameters and more than 250,000.
        heads_lr: learning rate of the heads' Adam. 0 leaves the training of ``cmim.heads.weights`` to you.
        queue_size: past embeddings kept a tap as further negatives, 0 for none: of the steps that had the tap.
        layer_decay: in (0, 1]; below 1 the weights grow towards the output.
        teacher: a full-precision network whose activations stand in for the latents; runs on the same inputs without
            gradients, in eval mode, and is not kept in this module's state.
        teacher_modules: tap name to teacher module name, for the taps whose module has another name in the teacher.
        batch_size: samples in ``example_input``, where its tensors leave that open.

    Raises:
        CMIMError: no binary activation was found, an argument does not fit, or a CMIM is attached already. The model
            is then as it was.
    """

    #: ``(taps, num_positions)`` int64: the random numbers by which the next pass chooses its positions. To fix them, write
    #: into this tensor; :func:`cmim_plugin.stratified_indices` says what becomes of them.
    draws: Tensor
    _calls: Tensor
    _channels: Tensor
    _last: Tensor
    # Which taps are contrasted where the user says nothing of them.
    _default_taps = slice(None)

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
        objective = InfoNCE() if objective is None else objective
        _check_numbers(
            weight=(weight, 0, math.inf, False),
            temperature=(temperature, 0, math.inf, True),
            layer_decay=(layer_decay, 0, 1, True),
            heads_lr=(heads_lr, 0, math.inf, False),
        )
        _check_integers(
            num_positions=(num_positions, 1),
            queue_size=(queue_size, 0),
            taps_per_step=(1 if taps_per_step is None else taps_per_step, 1),
            embed_dim=(1 if embed_dim is None else embed_dim, 1),
            batch_size=(1 if batch_size is None else batch_size, 1),
        )
        if instances not in ("position", "image"):
            raise CMIMError(f'instances must be "position" or "image"; found {instances!r}.')
        if not callable(objective) or objective is NCE or objective is InfoNCE:
            raise CMIMError(
                f"objective must be a function such as InfoNCE() or NCE(num_samples=...); found {objective!r}."
            )
        model = unwrapped(model)
        if teacher is not None and unwrapped(teacher) is model:
            raise CMIMError("The teacher is the binary network itself: pass another, full-precision network.")
        if teacher is None and teacher_modules is not None:
            raise CMIMError("teacher_modules was given without a teacher.")
        if attached_to(model):
            raise CMIMError("A CMIM is attached to this model already: call remove() on it first.")

        discovery = discover(model, example_input, batch_size)
        found = discovery.found
        if instances == "position" and teacher is None:
            apart = 'its latent has another number of positions: only instances="image" can contrast them'
            found = tuple(replace(f, reason=apart) if f.tapped and not f.aligned else f for f in found)
        chosen = _chosen(found, taps, model)
        tapped = tuple(Tap.of(f) for f in (chosen if taps is not None else chosen[self._default_taps]))
        self._teacher = None
        if teacher is not None:
            self._teacher = Teacher(teacher, example_input, tapped, teacher_modules)
            tapped = tuple(map(_taught, tapped, self._teacher.shapes))

        #: All that was found, tapped or not and why.
        self.found: tuple[BinaryActivation, ...] = found
        #: What is contrasted, in forward order.
        self.taps: tuple[Tap, ...] = tapped
        self.weight = weight
        self.instances = instances
        self.num_positions = num_positions
        self.taps_per_step = taps_per_step
        # The seed follows the user's torch.manual_seed(); reading it does not move the generator.
        generator = torch.Generator("cpu").manual_seed(torch.initial_seed() % 2**63)
        self.contrast = Contrast(
            tapped,
            objective=objective,
            temperature=temperature,
            embed_dim=embed_dim or _default_embed_dim(model, tapped),
            heads_lr=heads_lr,
            queue_size=queue_size,
            layer_decay=layer_decay,
            generator=generator,
        )
        low, high = -(2**63), 2**63 - 1
        draws = torch.randint(low, high, (len(tapped), num_positions), generator=generator, device="cpu")
        self.register_buffer("draws", draws)
        self.register_buffer("_calls", torch.zeros((), dtype=torch.int64, device="cpu"))
        channels = [(tap.channels, tap.latent_channels) for tap in tapped]
        self.register_buffer("_channels", torch.tensor(channels, device="cpu"))
        self.register_buffer("_last", torch.full((len(tapped), 2), math.nan, dtype=torch.float32, device="cpu"))
        self.to(next((p.device for p in model.parameters()), torch.device("cpu")))
        self._losses = 0
        self._sum: Tensor | None = None
        self._removed = False
        self._capture = Capture(model, tapped, discovery.batch)
        if self._teacher is not None:
            self._capture.before = self._teacher.deliver
        self._restart()
        self._sync()
        self._capture.attach()
        # A plug-in that is thrown away takes its hooks with it.
        self._finalizer = weakref.finalize(self, self._capture.detach)
        self._finalizer.atexit = False

    @classmethod
    def paper(cls, model: nn.Module, example_input: Any, num_samples: int, **settings: Any) -> CMIM:
        """The paper's plain reading: whole images, every layer, :class:`NCE`, weights that grow towards the output.

        Weight 0.03 and layer decay 0.8 are this library's, not the paper's.

        Args:
            model, example_input: as for the class.
            num_samples: images in the training set.
            settings: arguments of the class, in place of those.
        """
        reading = {"instances": "image", "objective": NCE(num_samples), "weight": 0.03, "layer_decay": 0.8}
        return cls(model, example_input, **{**reading, "taps_per_step": None, **settings})

    # -- the loss ------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The weighted loss of the model's last forward pass with gradients, which is used up by it.

        A pass in eval mode counts too, but does not take the place of one in training mode whose loss was not asked for.

        Args:
            model: the model that was attached to, as it is or wrapped (DDP, FSDP, torch.compile, Fabric, ...).
            labels: ``(B,)`` integer classes of the batch, or for positions ``(B, *spatial)`` of its pixels, at any
                resolution. Pairs of the same class are then not contrasted; below zero is no label.
            mask: ``(B, tokens)``, zero or False for padding, which is then no instance. None for the ``attention_mask``
                that the model itself was given by that name, if there was one.

        Returns:
            0-d float32, with gradients to heads and network. Zero, with its graph, where the batch has no negatives.
            On several ranks the same number on each: that of the batches of all ranks, taken together.

        Raises:
            CMIMError: nothing was captured, or something could not be, and why; another model; labels or a mask of the
                wrong shape; the hooks were removed or are paused.
        """
        captured = self._captured(model)
        self._sync()
        self.heads.step()
        if mask is None:
            mask = captured.mask
        labels, mask = _checked("labels", labels, captured), _checked("mask", mask, captured)
        if mask is not None and len(self.contrast.queues):
            raise CMIMError("A mask and a queue do not go together: padding would be queued. Attach with queue_size=0.")
        return self._weighted(self.contrast(captured, labels, mask))

    def _captured(self, model: nn.Module) -> Pass:
        """The pass to take the loss of."""
        path = self._path_to(model)
        if self._removed:
            raise CMIMError("This CMIM was removed from its model: build a new one to go on.")
        if not self._capture.attached:
            raise CMIMError("This CMIM is paused: leave the `with cmim.paused()` block before asking for the loss.")
        captured = self._capture.pop()
        if captured is None:
            raise CMIMError(_nothing_captured(self._capture))
        if None in captured.failures:
            raise CMIMError(f"The forward pass could not be captured: {captured.failures[None]}")
        told = [f"Tap {self.taps[k].name}: {why}." for k, why in captured.failures.items() if k is not None]
        reached = [k for k, pair in captured.pairs.items() if pair.complete and k not in captured.without_gradient]
        serious = [k for k in captured.failures if k not in captured.without_gradient]
        if serious or (told and not reached):
            raise CMIMError("The forward pass could not be captured. " + "\n".join(told))
        for line in told:
            warn_once(self, line + " It adds nothing to the loss.")
        if not captured.entered:
            raise CMIMError(
                "The forward pass reached none of the taps. A model that was compiled and run before CMIM was attached "
                "does that (attach first, or call torch._dynamo.reset()), inputs that take another way through it, modules "
                "that were replaced, and hooks that other code cleared (attach again)."
            )
        for k in captured.scheduled:
            if k not in reached and k not in captured.failures:
                warn_once(self, f"The forward pass did not reach tap {self.taps[k].name}: it adds nothing to the loss.")
        captured.backward.one_pass = averages_one_backward(path)
        return captured

    def _weighted(self, contrast: Tensor) -> Tensor:
        """The loss, and everything that goes on to the next one."""
        advance(self.draws)
        if torch.compiler.is_compiling():
            # Each choice of taps would be compiled anew.
            self._capture.scheduled, self.taps_per_step = None, None
            return self.weight * contrast
        self._losses += 1
        self._sum = contrast.detach()
        self._schedule()
        if self._losses in _LOOK_AT:
            self._look()
        return self.weight * contrast

    def _schedule(self) -> None:
        """The taps of the next pass: evenly spread over the network, each as often as any other."""
        count, of = len(self.taps), self.taps_per_step
        self._capture.scheduled = None
        if of is not None and of < count:
            self._capture.scheduled = tuple(sorted((self._losses + i * count // of) % count for i in range(of)))

    def _sync(self) -> None:
        """Start from the state of rank 0, as soon as there are several ranks."""
        if not self.contrast.synced and distributed.ranks() > 1:
            self._calls.fill_(self._losses)
            self.contrast.sync([self.draws, self._calls])
            self._losses = int(self._calls)
            self._restart()

    def _restart(self) -> None:
        """Go on with these buffers; each rank takes its share of the positions of all."""
        self._schedule()
        self._capture.draws = None
        if self.instances == "position":
            count, ranks, rank = self.num_positions, distributed.ranks(), distributed.rank()
            share = slice(count * rank // ranks, count * (rank + 1) // ranks)
            # The buffer itself where that is all: what is compiled then has one tensor to write to, not two.
            self._capture.draws = self.draws if ranks == 1 else self.draws[:, share]

    def _look(self) -> None:
        """Tell, once, of heads that do not learn."""
        if self.weight and self.heads.lr and not bool(self.heads.steps):
            warn_once(
                self,
                f"{self._losses} losses were asked for, and no gradient came back to the heads. Is cmim(model) part of what "
                "backward() is called on?",
            )
        bounds = [float(m["bound"]) for m in self.metrics.values() if "bound" in m]
        if self._losses == _LOOK_AT[-1] and bounds and max(bounds) < 0.05:
            warn_once(
                self,
                f"After {self._losses} losses the bound of every tap is still zero ({max(bounds):.2f} nats at most): the "
                "codes keep nothing that tells one place from another. Dead channels do that: see cmim.report().",
            )

    # -- figures -------------------------------------------------------------------------------------------------

    @property
    def heads(self) -> Heads:
        """The heads and their optimizer."""
        return self.contrast.heads

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Names of the taps that the next pass captures."""
        chosen = self._capture.scheduled
        return tuple(tap.name for k, tap in enumerate(self.taps) if chosen is None or k in chosen)

    @property
    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """``{tap name: {"loss": nats, "bound": nats}}``, 0-d tensors without a graph: of the last step with that tap.

        "bound" is the lower bound on the mutual information that the objective gives. Computed when it is read.
        """
        bound = getattr(self.contrast.objective, "bound", None)
        found: dict[str, dict[str, Tensor]] = {}
        for k, tap in enumerate(self.taps):
            if k in self.contrast.last:
                losses, i = self.contrast.last[k]
                found[tap.name] = {"loss": losses.values[i]}
                if bound is not None:
                    found[tap.name]["bound"] = losses.bound(i, bound)
            elif not self._last[k].isnan().all():  # of a loaded state
                values = zip(("loss", "bound"), self._last[k], strict=True)
                found[tap.name] = {name: value for name, value in values if not value.isnan()}
        return found

    def scalars(self, all_taps: bool = False) -> dict[str, float]:
        """Numbers of the last step for a logger or a progress bar. Reading them waits for the device.

        Returns:
            ``{"cmim/loss": weighted loss, "cmim/bound": mean over taps, "cmim/worst_bound": the lowest}``, in nats; with
            ``all_taps`` also ``"cmim/bound/<tap name>"``. Without the bounds where the objective gives none, empty before
            the first loss.
        """
        found = {} if self._sum is None else {"cmim/loss": self.weight * float(self._sum)}
        bounds = {name: float(m["bound"]) for name, m in self.metrics.items() if "bound" in m}
        if bounds:
            found["cmim/bound"] = sum(bounds.values()) / len(bounds)
            found["cmim/worst_bound"] = min(bounds.values())
        if all_taps:
            found |= {f"cmim/bound/{name}": bound for name, bound in bounds.items()}
        return found

    def report(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        inputs: Callable[[Any], Any] | None = None,
        max_batches: int | None = None,
        since: Report | None = None,
    ) -> Report:
        """What each tap keeps of its latent, over held-out data: see :class:`Report`. Nothing of the training moves.

        The model runs in eval mode without gradients, whatever mode it is in, and comes back in that mode; so do the
        random generators. Queue and labels play no part: the negatives are the other instances of the batch. Every
        report looks at the same positions. On several ranks each runs and reports its own data, by itself (a sharded
        model needs as many batches on each).

        The bound and the retrieval are those of the heads: for a network that was trained without CMIM, attach one and
        train its heads alone first.

        Args:
            model: the model that was attached to, as it is or wrapped.
            loader: batches. Of a tuple, list or dict the first element is the input of the model: a tensor, a tuple of
                positional inputs or a dict of keyword inputs. Tensors are moved to the device of the model.
            inputs: batch to input of the model, for batches of another form.
            max_batches: stop after so many.
            since: an earlier report on the same inputs in the same order, to count the codes that flipped since.

        Raises:
            CMIMError: another model, a batch without an input, no batch, no tap reached, or ``since`` saw other inputs.
        """
        own = self._path_to(model)[-1]
        positions = self.num_positions if self.instances == "position" else None
        return measure(
            own, self.contrast, self._capture.batch, self._teacher, positions, loader, inputs, max_batches, since
        )

    # -- attach and remove ---------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take every hook off the model, which is then as it was. Calling it again does nothing."""
        self._removed = True
        self._capture.detach()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model has no hook of this plug-in: to export it, to trace it, to measure it."""
        attached = self._capture.attached
        self._capture.detach()
        try:
            yield
        finally:
            model = self._capture.model()
            if attached and not self._removed and model is not None and not attached_to(model):
                self._capture.attach()

    def _path_to(self, model: nn.Module) -> list[nn.Module]:
        """The wrappers from the model that was passed in down to the one that was attached to."""
        own = self._capture.model()
        if isinstance(model, nn.DataParallel):
            refuse_replicas(model)
        path = None if own is None else path_to(own, model)
        if path is None:
            raise CMIMError(
                f"This CMIM is attached to another model than the {type(model).__name__} passed in: pass the model that "
                "you attached to. A copy (copy.deepcopy, an EMA) is a plain model: attach a CMIM of its own to train it."
            )
        return path

    # -- state ---------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._calls.fill_(self._losses)
        for k, tap in enumerate(self.taps):
            values = self.metrics.get(tap.name, {})
            for i, name in enumerate(("loss", "bound")):
                self._last[k, i] = values.get(name, math.nan)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Names may differ: those of a wrapped model have a prefix. Widths may not, though parameters may have one shape.
        channels = state.get(prefix + "_channels")
        if channels is not None and not torch.equal(channels.cpu(), self._channels.cpu()):
            raise CMIMError(
                "The state is that of other taps (channels of both sides of each).\n"
                f"Found:  {channels.tolist()}\nWanted: {self._channels.tolist()}"
            )
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]
        self.contrast.last.clear()
        self._losses = int(self._calls)
        self._restart()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CMIM:
        super()._apply(fn, recurse)
        if hasattr(self, "_capture"):
            self._restart()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CMIM:
        """A copy belongs to no model: it holds the same state, and gives no loss."""
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        own = {name: value for name, value in self.__dict__.items() if name not in ("_capture", "_finalizer")}
        copied.__dict__.update(copy.deepcopy(own, memo))
        copied._capture = Capture(nn.Module(), self.taps, None)
        copied._restart()
        return copied

    def __reduce__(self) -> Any:
        raise CMIMError(
            "A CMIM cannot be pickled, for it belongs to a model in this process. Save cmim.state_dict(); to restore, "
            "build CMIM(model, example_input) and call its load_state_dict()."
        )

    def __repr__(self) -> str:
        named = {f.name: f for f in self.found}
        other = "its latent" if self._teacher is None else "the teacher's activation"
        rows = [(t.name, f"{t.channels}", f"{w:.3f}", f"a_B against {other}") for t, w in self._weighted_taps()]
        names = {tap.name for tap in self.taps}
        rows += [(n, "-", "-", f.reason or "not chosen by taps=") for n, f in named.items() if n not in names]
        count = len(self.taps)
        some = f", {self.taps_per_step} of them a step" if (self.taps_per_step or count) < count else ""
        title = (
            f"CMIM: {count} of {len(self.found)} binary activations tapped{some}, one instance = one {self.instances}, "
            f"weight {self.weight:g}{'' if self._capture.attached else ', not attached'}"
        )
        return "\n".join([title, table([("tap", "channels", "share", "what"), *folded(rows)])])

    def _weighted_taps(self) -> list[tuple[Tap, float]]:
        return list(zip(self.taps, self.contrast.layer_weights, strict=True))


# -- helpers ---------------------------------------------------------------------------------------------------------


def _chosen(
    found: tuple[BinaryActivation, ...],
    taps: Collection[str] | Callable[[str, nn.Module], bool] | None,
    model: nn.Module,
) -> list[BinaryActivation]:
    """The binary activations that the user wants tapped, all of them tappable."""
    tappable = [f for f in found if f.tapped]
    listing = "\n".join(f"  {f.name}: {f.reason or 'can be tapped'}" for f in found) or "  (none)"
    if not tappable:
        raise CMIMError(
            f"No binary activation that can be tapped was found in this {type(model).__name__}. A binary activation is "
            "a tensor of two values, computed from the input with a gradient, that a convolution or a matrix product "
            f"receives. Two-valued operands that came nearest:\n{listing}"
        )
    if taps is None:
        return tappable
    if callable(taps):
        chosen = [f for f in tappable if taps(f.name, model.get_submodule(f.module))]
        if not chosen:
            raise CMIMError(f"taps= chose none of the binary activations found:\n{listing}")
        return chosen
    if isinstance(taps, str):
        raise CMIMError(f"taps must be a collection of names, not one string: taps=[{taps!r}].")
    wrong = [name for name in taps if name not in {f.name for f in tappable}]
    if wrong or not taps:
        raise CMIMError(f"taps= names {wrong or 'nothing'}, which cannot be tapped. Found:\n{listing}")
    return [f for f in tappable if f.name in taps]


def _taught(tap: Tap, shape: torch.Size) -> Tap:
    """The tap with the teacher's activation, of this shape, in the latent's place."""
    layout = latent_layout(tap, shape)
    return replace(tap, latent=None, layouts=(tap.layouts[BINARY], layout), latent_channels=layout.channels(shape))


def _default_embed_dim(model: nn.Module, taps: tuple[Tap, ...]) -> int:
    parameters = sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))
    most = max(_HEADS_SHARE * parameters, _HEADS_LEAST)
    channels = sum(tap.channels + tap.latent_channels for tap in taps)
    return next((dim for dim in (128, 64) if dim * channels <= most), 32)


def _nothing_captured(capture: Capture) -> str:
    if not torch.is_grad_enabled():
        return (
            "No forward pass to take the loss of: under torch.no_grad() nothing is captured, and there is nothing to train. "
            "In a function that both trains and validates, write: if model.training: loss = loss + cmim(model)"
        )
    if capture.waits_elsewhere():
        return (
            "No forward pass of this thread to take the loss of: the model ran in another thread. Call cmim(model) in the "
            "thread that runs the model."
        )
    return (
        "No forward pass to take the loss of. Call model(x) with gradients enabled before each cmim(model); one forward pass "
        "gives one loss. (Not captured: a pass under torch.no_grad(), one that raised, one through model.forward(x) or a "
        "replica of nn.DataParallel, a pass of a model that was compiled and run before CMIM was attached (attach first, or "
        "call torch._dynamo.reset()), and one of a model whose hooks other code cleared (attach again).)"
    )


def _checked(name: str, value: Tensor | None, captured: Pass) -> Tensor | None:
    """Labels or a mask of this pass's batch, on its device."""
    pair = next((pair for pair in captured.pairs.values() if pair.complete), None)
    if value is None or pair is None:
        return value
    if not isinstance(value, Tensor):
        raise CMIMError(f"{name} must be a tensor for {pair.batch} samples; found a {type(value).__name__}.")
    fits = value.ndim > 0 and len(value) == pair.batch
    if name == "mask":
        if not fits or value.ndim != 2:
            raise CMIMError(
                f"mask must be (samples, tokens), {pair.batch} rows, zero for padding; found {tuple(value.shape)}."
            )
    elif not fits or value.is_floating_point():
        raise CMIMError(
            f"labels must be {pair.batch} integers, one a sample of the batch, or a map of them for each; "
            f"found shape {tuple(value.shape)}, {value.dtype}."
        )
    elif value.ndim > 1 and pair.index is None:
        raise CMIMError(
            f'instances="image" has one label an image, {pair.batch} integers; found shape {tuple(value.shape)}.'
        )
    rows = pair.rows[BINARY]
    assert rows is not None
    return value.to(rows.device)


def _check_numbers(**settings: tuple[Any, float, float, bool]) -> None:
    """Each is (value, least, most, whether the least itself is refused)."""
    for name, (value, least, most, above) in settings.items():
        fits = isinstance(value, (int, float)) and least <= value <= most and value != math.inf
        if not fits or (above and value == least):
            wanted = f"above {least:g}" if above else f"{least:g} or more"
            raise CMIMError(
                f"{name} must be a number, {wanted}{'' if most == math.inf else f', at most {most:g}'}; found {value!r}."
            )


def _check_integers(**settings: tuple[Any, int]) -> None:
    """Each is (value, least)."""
    for name, (value, least) in settings.items():
        if not isinstance(value, int) or value < least:
            raise CMIMError(f"{name} must be an integer, {least} or more; found {value!r}.")
