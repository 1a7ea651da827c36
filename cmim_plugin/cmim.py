"""The plug-in: taps, heads, objective, weights, one number."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .discovery import BinaryActivation, find_binary_activations
from .errors import CMIMError, CMIMWarning
from .heads import HeadPair
from .negatives import Queue
from .objectives import count_negatives, info_nce, info_nce_bound, nce, nce_bound
from .taps import BINARY, LATENT, Pair, Tap, Taps, attached_to
from .teacher import Teacher, latent_layout

_BOUNDS = {info_nce: info_nce_bound, nce: nce_bound}
# Optimizer steps of the network after which heads that never moved are reported.
_PATIENCE = 3


class CMIM(nn.Module):
    """Contrastive mutual information maximisation between binary activations and their latents (arXiv 2207.02970).

    Finds the binary activations of ``model``, hooks them and builds a pair of heads for each::

        cmim = CMIM(model, example_input)
        optimizer.add_param_group({"params": cmim.parameters()})
        ...
        loss = criterion(model(x), y)
        loss += cmim(model)

    The loss is ``weight * sum_k w_k L_k`` with ``w_k`` proportional to ``layer_decay ** (K - 1 - k)`` and of sum 1, so
    that ``weight`` means the same for a shallow and for a deep network.

    Args:
        model: the binary network, on the device that it trains on. Nothing of it is changed; it is not a submodule.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs of the model.
        taps: None for all binary activations found; names of taps (as :func:`find_binary_activations` gives them); or
            ``(name, module) -> bool``, asked for each one found.
        weight: what the loss is multiplied by.
        instances: what is one sample of the contrast: "position" (a random sample of the positions or tokens of the
            batch: a local binary code against its own latent) or "image" (pooled over space: the paper's reading).
        num_positions: positions a tap and step, for ``instances="position"``.
        objective: :func:`info_nce`; :func:`nce` as ``functools.partial(nce, num_samples=len(dataset))``; or any
            function of ``(z_b, z_f, *, temperature, labels, queue_b, queue_f, queue_labels)`` that returns a 0-d loss.
        temperature: of the critic.
        embed_dim: width ``D`` of the embeddings.
        queue_size: past embeddings kept a tap as further negatives, 0 for none.
        layer_decay: in (0, 1]; below 1 the weights grow towards the output.
        teacher: a full-precision network whose activations stand in for the latents; runs on the same inputs without
            gradients, in eval mode, and is not kept in this module's parameters or state.
        teacher_modules: tap name to teacher module name, for the taps whose module has another name in the teacher.

    Raises:
        CMIMError: no binary activation was found, an argument does not fit, or a CMIM is attached already. The model
            is then as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        taps: Collection[str] | Callable[[str, nn.Module], bool] | None = None,
        weight: float = 0.3,
        instances: str = "position",
        num_positions: int = 256,
        objective: Callable[..., Tensor] = info_nce,
        temperature: float = 0.1,
        embed_dim: int = 128,
        queue_size: int = 0,
        layer_decay: float = 1.0,
        teacher: nn.Module | None = None,
        teacher_modules: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        _check_settings(weight, instances, num_positions, objective, temperature, embed_dim, queue_size, layer_decay)
        model = _plain(model)
        if teacher is not None and _plain(teacher) is model:
            raise CMIMError("The teacher is the binary network itself: pass another, full-precision network.")
        if attached_to(model):
            raise CMIMError("A CMIM is attached to this model already: call remove() on it first.")
        if (ranks := _ranks()) > 1:
            raise CMIMError(f"Training on {ranks} ranks is not supported yet: heads would differ between them.")
        self.weight = weight
        self.instances = instances
        self.num_positions = num_positions
        self.objective = objective
        self.temperature = temperature
        #: ``{tap name: {"loss": nats, "bound": nats}}`` of the last call, 0-d tensors without a graph. "bound" is the
        #: lower bound on the mutual information that the objective gives, for the two objectives of this library.
        self.metrics: dict[str, dict[str, Tensor]] = {}
        self._model = weakref.ref(model)
        self.found = tuple(find_binary_activations(model, example_input))
        if instances == "position" and teacher is None:
            apart = 'its latent has another number of positions: only instances="image" can contrast them'
            self.found = tuple(f if f.aligned or not f.tapped else replace(f, reason=apart) for f in self.found)
        tapped = tuple(Tap.of(found) for found in _chosen(self.found, taps, model))

        self._teacher = None
        if teacher is not None:
            self._teacher = Teacher(teacher, example_input, tapped, teacher_modules)
            tapped = tuple(
                replace(
                    tap,
                    latent=None,
                    layouts=(tap.layouts[BINARY], layout := latent_layout(tap, shape)),
                    latent_channels=layout.channels(shape),
                )
                for tap, shape in zip(tapped, self._teacher.shapes, strict=True)
            )
        elif teacher_modules is not None:
            raise CMIMError("teacher_modules was given without a teacher.")

        #: What is contrasted, in forward order.
        self.taps: tuple[Tap, ...] = tapped
        raw = [layer_decay ** (len(tapped) - 1 - k) for k in range(len(tapped))]
        self.layer_weights = tuple(w / sum(raw) for w in raw)

        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        # The seed follows the user's torch.manual_seed(); reading it does not move the generator.
        self._generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(torch.initial_seed())
            heads = [HeadPair(tap.channels, tap.latent_channels, embed_dim).float() for tap in tapped]
            self.heads = nn.ModuleList(heads).to(device)
            self.queues = nn.ModuleList([Queue(queue_size, embed_dim) for _ in tapped if queue_size]).to(device)

        self._hooks = hooks = Taps(model, tapped, self._draw())
        if self._teacher is not None:
            hooks.before = partial(self._teacher.deliver, hooks)
        hooks.attach()
        # A plug-in that is thrown away takes its hooks with it.
        self._finalizer = weakref.finalize(self, hooks.detach)
        self._watch = _HeadsWatch(model, self)
        self._warned: set[str] = set()

    # -- the loss ------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of the model's last forward pass, which is used up by it.

        Args:
            model: the model that was attached to, as it is or wrapped (DDP, torch.compile).
            labels: ``(B,)`` integer classes of the batch. Pairs of the same class are then not contrasted.

        Returns:
            0-d float32, with gradients to heads and network. Zero, with its graph, where the batch has no negatives.

        Raises:
            CMIMError: no forward pass in training mode with gradients since the last call, another model, a model in
                eval mode, labels of the wrong shape, or the hooks were removed or are paused.
        """
        self._check_call(model)
        pairs = self._hooks.take()
        if not pairs:
            raise CMIMError(
                "No forward pass to take the loss of. Call model(x) in training mode, with gradients enabled, before "
                "each cmim(model); one forward pass gives one loss. (Not captured: a pass under torch.no_grad(), one "
                "that raised, one through nn.DataParallel or model.forward(x), and any pass of a model that was "
                "compiled and run before CMIM was attached: attach first, or call torch._dynamo.reset().)"
            )
        total: Tensor | None = None
        self.metrics = {}
        for k, (tap, pair) in enumerate(zip(self.taps, pairs, strict=True)):
            if pair.rows[BINARY] is None or pair.rows[LATENT] is None:
                self._warn(f"The forward pass did not reach tap {tap.name}: it adds nothing to the loss.")
                continue
            loss = self.layer_weights[k] * self._tap_loss(k, tap, pair, labels)
            total = loss if total is None else total + loss
        if total is None:
            raise CMIMError(
                "The forward pass reached none of the taps. A model that was compiled and run before CMIM was attached "
                "does that (attach first, or call torch._dynamo.reset()), or inputs that take another way through it."
            )
        self._hooks.draws = self._draw()
        self._watch.look(self)
        return self.weight * total

    def _tap_loss(self, k: int, tap: Tap, pair: Pair, labels: Tensor | None) -> Tensor:
        rows_b, rows_f = pair.rows
        assert rows_b is not None and rows_f is not None
        heads = self.heads[k]
        assert isinstance(heads, HeadPair)
        if rows_b.device != heads.binary.weight.device:
            raise CMIMError(
                f"The activations are on {rows_b.device}, the heads on {heads.binary.weight.device}: "
                f"call cmim.to({str(rows_b.device)!r}), or attach after moving the model."
            )
        if rows_b.shape[0] != rows_f.shape[0]:
            raise CMIMError(
                f"Tap {tap.name} has {rows_b.shape[0]} rows on the binary side and {rows_f.shape[0]} on the other."
            )
        labels = _labels_of(pair, labels, rows_b.device)
        z_b, z_f = heads.binary(rows_b), heads.latent(rows_f)
        queued: dict[str, Tensor] = {}
        if len(self.queues):
            queue = self.queues[k]
            assert isinstance(queue, Queue)
            queued = dict(zip(("queue_b", "queue_f", "queue_labels"), queue.contents(), strict=True))
            queue.push(z_b.detach(), z_f.detach(), labels)
        loss = self.objective(z_b, z_f, temperature=self.temperature, labels=labels, **queued)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise CMIMError(f"objective must return a 0-d tensor; found {getattr(loss, 'shape', loss)!r}.")

        queue_labels = queued.get("queue_labels")
        counts = count_negatives(len(z_b), labels, queue_labels, 0 if queue_labels is None else len(queue_labels))
        if not bool(counts.any()):
            self._warn("A batch had no negatives (one instance, or one class only): its loss is zero.")
        self.metrics[tap.name] = {"loss": loss.detach()}
        objective = self.objective.func if isinstance(self.objective, partial) else self.objective
        if bound := _BOUNDS.get(objective):
            self.metrics[tap.name]["bound"] = bound(loss.detach(), counts.to(loss.device))
        return loss

    # -- attach and remove ---------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take every hook off the model, which is then as it was. Calling it again does nothing."""
        self._finalizer()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model has no hook of this plug-in: to export it, to trace it, to measure it."""
        attached = self._hooks.attached
        self._hooks.detach()
        try:
            yield
        finally:
            model = self._model()
            if attached and self._finalizer.alive and model is not None and not attached_to(model):
                self._hooks.attach()

    # -- state ---------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Tensor | None]:
        """The generator of positions, so that a resumed run draws the positions that the unbroken one would have."""
        draws = self._hooks.draws
        return {"generator": self._generator.get_state(), "draws": None if draws is None else draws.cpu()}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        """What :meth:`get_extra_state` returned."""
        generator, draws = state["generator"], state["draws"]
        if generator is not None:
            self._generator.set_state(generator.cpu())
        own = self._hooks.draws
        if own is not None and (draws is None or draws.shape != own.shape):
            found = None if draws is None else tuple(draws.shape)
            raise CMIMError(f"The state draws {found} positions, this CMIM {tuple(own.shape)}: other settings.")
        if own is not None and draws is not None:
            self._hooks.draws = draws.clone()

    def __repr__(self) -> str:
        rows = [(tap.name, f"{tap.channels}", f"{w:.3f}") for tap, w in zip(self.taps, self.layer_weights, strict=True)]
        names = {tap.name for tap in self.taps}
        skipped = [(f.name, "-", "-", f.reason or "not chosen by taps=") for f in self.found if f.name not in names]
        other = "latent activation" if self._teacher is None else "teacher's activation"
        notes = [f"a_B against its {other}"] * len(rows)
        head = ("tap", "channels", "weight", "what")
        table = [head, *((*row, note) for row, note in zip(rows, notes, strict=True)), *skipped]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        state = "" if self._hooks.attached else ", not attached"
        title = (
            f"CMIM: {len(rows)} of {len(self.found)} binary activations tapped, one instance = one {self.instances}, "
            f"weight {self.weight:g}{state}"
        )
        return "\n".join([title, *(line.rstrip() for line in lines)])

    # -- helpers -------------------------------------------------------------------------------------------------

    def _draw(self) -> Tensor | None:
        if self.instances == "image":
            return None
        return torch.rand(len(self.taps), self.num_positions + 1, generator=self._generator, device="cpu")

    def _check_call(self, model: nn.Module) -> None:
        own = self._model()
        if own is None or _plain(model) is not own:
            raise CMIMError(
                f"This CMIM is attached to another model than the {type(model).__name__} passed in. A copy "
                "(copy.deepcopy, an EMA) is a plain model: attach a CMIM of its own to train it."
            )
        if not self._finalizer.alive:
            raise CMIMError("This CMIM was removed from its model: build a new one to go on.")
        if not self._hooks.attached:
            raise CMIMError("This CMIM is paused: leave the `with cmim.paused()` block before asking for the loss.")
        if not own.training:
            raise CMIMError("The model is in eval mode, in which nothing is captured: call model.train() first.")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, CMIMWarning, stacklevel=3)


class _HeadsWatch:
    """Notices that the network is being trained and the heads are not: the version counters of the one side move."""

    def __init__(self, model: nn.Module, cmim: CMIM) -> None:
        self._network = [(p, p._version) for p in model.parameters() if p.requires_grad]
        self._heads = [(p, p._version) for p in cmim.parameters() if p.requires_grad]
        self._done = not self._heads

    def look(self, cmim: CMIM) -> None:
        if self._done:
            return
        if any(p._version != before for p, before in self._heads):
            self._done = True
        elif sum(p._version >= before + _PATIENCE for p, before in self._network) > len(self._network) / 2:
            self._done = True
            cmim._warn(
                "The network is being trained, the heads of CMIM are not: "
                'optimizer.add_param_group({"params": cmim.parameters()}) was forgotten.'
            )


def _ranks() -> int:
    distributed = torch.distributed
    running = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if running else 1


def _plain(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile's wrapper."""
    if not isinstance(model, nn.Module):
        raise CMIMError(f"The model comes first, a torch.nn.Module; found a {type(model).__name__}.")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel):
            raise CMIMError("nn.DataParallel runs copies of the model in threads: use DistributedDataParallel.")
        else:
            return model


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


def _check_settings(
    weight: float,
    instances: str,
    num_positions: int,
    objective: Callable[..., Tensor],
    temperature: float,
    embed_dim: int,
    queue_size: int,
    layer_decay: float,
) -> None:
    if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise CMIMError(f"weight must be a number, zero or more; found {weight!r}.")
    if instances not in ("position", "image"):
        raise CMIMError(f'instances must be "position" or "image"; found {instances!r}.')
    for name, value, least in (
        ("num_positions", num_positions, 1),
        ("embed_dim", embed_dim, 1),
        ("queue_size", queue_size, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise CMIMError(f"{name} must be an integer, {least} or more; found {value!r}.")
    if not callable(objective):
        raise CMIMError(f"objective must be a function such as cmim_plugin.info_nce; found {objective!r}.")
    if objective is nce:
        raise CMIMError("nce needs the size of the training set: objective=functools.partial(nce, num_samples=...).")
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise CMIMError(f"temperature must be positive; found {temperature!r}.")
    if not isinstance(layer_decay, (int, float)) or not 0 < layer_decay <= 1:
        raise CMIMError(f"layer_decay must be in (0, 1]; found {layer_decay!r}.")


def _labels_of(pair: Pair, labels: Tensor | None, device: torch.device) -> Tensor | None:
    """The label of each row: that of its image."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise CMIMError(f"labels must be a tensor of {pair.batch} integers; found a {type(labels).__name__}.")
    if labels.shape != (pair.batch,) or labels.is_floating_point():
        raise CMIMError(
            f"labels must be {pair.batch} integers, one a sample of the batch; "
            f"found shape {tuple(labels.shape)}, {labels.dtype}."
        )
    labels = labels.to(device)
    return labels if pair.samples is None else labels[pair.samples]
