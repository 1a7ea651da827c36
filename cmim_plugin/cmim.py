"""The plug-in: taps, heads, objective, weights, one number."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .discovery import BinaryActivation, discover
from .errors import CMIMError, CMIMWarning
from .heads import Heads, sent
from .negatives import Queue
from .objectives import count_negatives, info_nce, info_nce_bound, nce, nce_bound
from .report import Report, measure
from .taps import BINARY, LATENT, Pair, Tap, Taps, attached_to
from .teacher import Teacher, latent_layout

_BOUNDS = {info_nce: info_nce_bound, nce: nce_bound}
# Optimizer steps of the network after which heads that never moved are reported.
_PATIENCE = 3
# Steps in which the labels are asked whether any pair of theirs is a negative one: the answer waits for the device.
_FIRST_STEPS = 3


@dataclass
class _Group:
    """Taps with the same number of rows, whose losses were computed side by side: what `CMIM.metrics` needs."""

    taps: list[int]
    losses: Tensor
    rows: int
    queued: int
    labels: Tensor | None
    queue_labels: Tensor | None

    @cached_property
    def negatives(self) -> Tensor:
        """How many each anchor has: ``(taps, n)``."""
        counts = count_negatives(self.rows, self.labels, self.queue_labels, self.queued)
        return counts.expand(len(self.taps), -1)


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
        num_positions: positions a tap and step, for ``instances="position"``; of all ranks together.
        taps_per_step: contrast so many taps a step, chosen at random, whose losses then stand for those of all: the
            expected gradient is the same, the cost does not grow with depth. None for all of them, as in the first
            step, and wherever something is compiled.
        objective: :func:`info_nce`; :func:`nce` as ``functools.partial(nce, num_samples=len(dataset))``; or any
            function of ``(z_b, z_f, *, temperature, labels, queue_b, queue_f, queue_labels)`` that takes the embeddings
            of several taps side by side, ``(taps, n, D)``, and returns their losses, ``(taps,)``.
        temperature: of the critic.
        embed_dim: width ``D`` of the embeddings.
        queue_size: past embeddings kept a tap as further negatives, 0 for none: of the steps that chose the tap.
        layer_decay: in (0, 1]; below 1 the weights grow towards the output.
        teacher: a full-precision network whose activations stand in for the latents; runs on the same inputs without
            gradients, in eval mode, and is not kept in this module's parameters or state.
        teacher_modules: tap name to teacher module name, for the taps whose module has another name in the teacher.

    Raises:
        CMIMError: no binary activation was found, an argument does not fit, or a CMIM is attached already. The model
            is then as it was.
    """

    # Which taps are contrasted where the user says nothing of them.
    _unless_told = slice(None)

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
        if taps_per_step is not None and (not isinstance(taps_per_step, int) or taps_per_step < 1):
            raise CMIMError(f"taps_per_step must be an integer, 1 or more, or None for all; found {taps_per_step!r}.")
        model = _plain(model)
        if teacher is not None and _plain(teacher) is model:
            raise CMIMError("The teacher is the binary network itself: pass another, full-precision network.")
        if attached_to(model):
            raise CMIMError("A CMIM is attached to this model already: call remove() on it first.")
        self.weight = weight
        self.instances = instances
        self.num_positions = num_positions
        self.taps_per_step = taps_per_step
        self.objective = objective
        self.temperature = temperature
        # Tap -> where its last loss is.
        self._last: dict[int, tuple[_Group, int]] = {}
        # What a loaded state says of the taps that had no loss since.
        self._before: dict[str, dict[str, Tensor]] = {}
        self._model = weakref.ref(model)
        discovery = discover(model, example_input)
        self.found, self.source = discovery.found, discovery.batch
        if instances == "position" and teacher is None:
            apart = 'its latent has another number of positions: only instances="image" can contrast them'
            self.found = tuple(f if f.aligned or not f.tapped else replace(f, reason=apart) for f in self.found)
        chosen = _chosen(self.found, taps, model)
        tapped = tuple(Tap.of(found) for found in (chosen if taps is not None else chosen[self._unless_told]))

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
            self.heads = Heads([(tap.channels, tap.latent_channels) for tap in tapped], embed_dim).float()
            self.queues = nn.ModuleList([Queue(queue_size, embed_dim) for _ in tapped if queue_size])
        self.to(device)

        self._hooks = hooks = Taps(model, tapped)
        hooks.source = self.source
        self._shared = False
        self._share()
        self._draw(first=True)
        if self._teacher is not None:
            hooks.before = partial(self._teacher.deliver, hooks)
        hooks.attach()
        # A plug-in that is thrown away takes its hooks with it.
        self._finalizer = weakref.finalize(self, hooks.detach)
        self._watch = _HeadsWatch(model, self)
        self._warned: set[str] = set()
        # Counted no further than needed: torch.compile compiles again whenever it changes.
        self._steps = 0

    @classmethod
    def paper(cls, model: nn.Module, example_input: Any, num_samples: int, **settings: Any) -> CMIM:
        """The paper's plain reading: whole images, every layer, :func:`nce`, weights that grow towards the output.

        What it gave where it was measured is in benchmarks/FINDINGS.md. Weight 0.03 and layer decay 0.8 are this
        library's, not the paper's.

        Args:
            model, example_input: as for the class.
            num_samples: images in the training set.
            settings: arguments of the class, in place of those.
        """
        chosen = {
            "instances": "image",
            "objective": partial(nce, num_samples=num_samples),
            "weight": 0.03,
            "layer_decay": 0.8,
            "taps_per_step": None,
            **settings,
        }
        return cls(model, example_input, **chosen)

    # -- the loss ------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of the model's last forward pass, which is used up by it.

        Args:
            model: the model that was attached to, as it is or wrapped (DDP, torch.compile).
            labels: ``(B,)`` integer classes of the batch, or for positions ``(B, *spatial)`` of its pixels, at any
                resolution. Pairs of the same class are then not contrasted; below zero is no label.

        Returns:
            0-d float32, with gradients to heads and network. Zero, with its graph, where the batch has no negatives.
            On several ranks the same number on each: that of the batches of all ranks, taken together.

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
                "compiled and run before CMIM was attached, or whose twin was: attach first, or call "
                "torch._dynamo.reset().)"
            )
        reached = [k for k, pair in enumerate(pairs) if pair.rows[BINARY] is not None and pair.rows[LATENT] is not None]
        asked = list(range(len(pairs))) if self._hooks.chosen is None else sorted(self._hooks.chosen)
        if not reached and self._hooks.chosen is None:
            raise CMIMError(
                "The forward pass reached none of the taps. A model that was compiled and run before CMIM was attached "
                "does that (attach first, or call torch._dynamo.reset()), or inputs that take another way through it. "
                "Where it computed something otherwise than in its first pass, the next pass is captured again."
            )
        for k in [k for k in asked if k not in reached]:
            self._warn(f"The forward pass did not reach tap {self.taps[k].name}: it adds nothing to the loss.")

        z, row_labels, sizes = self._embedded(pairs, reached, asked, labels)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for k, size in sizes.items():
            if size:
                groups[size, self._queued(k)].append(k)
        parts = []
        for taps in groups.values():
            of_taps = None if row_labels is None else _side_by_side(row_labels, taps, sizes)
            z_b, z_f = (_side_by_side(side, taps, sizes) for side in z)
            losses = self._losses(taps, z_b, z_f, of_taps)
            # Those that were asked for stand for all.
            scaled = [self.layer_weights[k] * len(pairs) / len(asked) for k in taps]
            parts.append(losses.dot(sent(scaled, losses.dtype, losses.device)))
        self._steps = min(self._steps + 1, _FIRST_STEPS)
        self._draw()
        self._watch.look(self)
        return self.weight * (sum(parts[1:], parts[0]) if parts else z.sum())

    def _embedded(
        self, pairs: list[Pair], reached: list[int], asked: list[int], labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[int, int]]:
        """Both sides' embeddings ``(2, rows, D)`` of all ranks, tap by tap, their labels, and the rows of each tap."""
        if labels is not None and reached:
            labels = _checked_labels(labels, pairs[reached[0]], self._device)
        # Before they shared a generator each rank chose for itself.
        present = asked if self._shared or distributed.ranks() == 1 else range(len(pairs))
        self._share()
        rows: list[tuple[Tensor, Tensor]] = []
        sizes = dict.fromkeys(present, 0)
        device = self._device
        for k in reached:
            binary, latent = pairs[k].rows
            assert binary is not None and latent is not None
            self._check_rows(k, binary, latent, device)
            rows.append((binary, latent))
            sizes[k] = len(binary)

        parameters: tuple[Tensor, ...] = tuple(self.heads.parameters())
        if self._shared:
            parameters = distributed.averaged(parameters)
        if reached:
            z = self.heads(reached, rows, parameters)
        else:
            # No rows, but a graph: other ranks may have some, and wait for this one in the backward pass.
            tap = self.taps[0]
            none = parameters[0].new_zeros(0, tap.channels), parameters[0].new_zeros(0, tap.latent_channels)
            z = self.heads([0], [none], parameters)
        row_labels = None
        if labels is not None:
            found = [_labels_of(pairs[k], labels, self.taps[k].name) for k in reached]
            row_labels = torch.cat(found) if found else labels.new_zeros(0, device=z.device)
        if self._shared:
            counts = distributed.counts_of_all(list(sizes.values()), z.device)
            z = distributed.gather(z.transpose(0, 1), counts).transpose(0, 1)
            row_labels = None if row_labels is None else distributed.gather(row_labels, counts)
            sizes = {k: sum(of_tap) for k, *of_tap in zip(present, *counts, strict=True)}
        return z, row_labels, sizes

    def _losses(self, taps: list[int], z_b: Tensor, z_f: Tensor, labels: Tensor | None) -> Tensor:
        """The losses of taps whose embeddings, ``(taps, n, D)`` each, lie side by side: ``(taps,)``."""
        if torch.compiler.is_compiling():
            self._hooks.compiled = True
        queued: dict[str, Tensor] = {}
        if len(self.queues):
            queues = [queue for k in taps if isinstance(queue := self.queues[k], Queue)]
            contents = zip(*(queue.contents() for queue in queues), strict=True)
            # Copies: the loss keeps them for its backward pass, and push() overwrites in place before that.
            queued = dict(zip(("queue_b", "queue_f", "queue_labels"), map(torch.stack, contents), strict=True))
            for i, queue in enumerate(queues):
                queue.push(z_b[i].detach(), z_f[i].detach(), None if labels is None else labels[i])
        losses = self.objective(z_b, z_f, temperature=self.temperature, labels=labels, **queued)
        if not isinstance(losses, Tensor) or losses.shape != (len(taps),):
            raise CMIMError(
                f"objective got embeddings of {len(taps)} taps, shape {tuple(z_b.shape)}, and must return their "
                f"losses, shape ({len(taps)},); found {getattr(losses, 'shape', losses)!r}."
            )
        queue_labels = queued.get("queue_labels")
        in_queue = 0 if queue_labels is None else queue_labels.shape[-1]
        group = _Group(taps, losses.detach(), z_b.shape[1], in_queue, labels, queue_labels)
        self._note(group)
        none = z_b.shape[1] + in_queue == 1
        if none or (labels is not None and self._steps < _FIRST_STEPS and not bool(group.negatives.any(-1).all())):
            self._warn("A batch had no negatives (one instance, or one class only): its loss is zero.")
        return losses

    def _note(self, group: _Group) -> None:
        """Keep a group's losses for :attr:`metrics`."""
        for i, k in enumerate(group.taps):
            self._last[k] = (group, i)

    @property
    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """``{tap name: {"loss": nats, "bound": nats}}``, 0-d tensors without a graph: of the last step with that tap.

        "bound" is the lower bound on the mutual information that the objective gives, for the two objectives of this
        library. Computed when it is read.
        """
        bound = self._bound
        found: dict[str, dict[str, Tensor]] = {}
        for k, tap in enumerate(self.taps):
            if k in self._last:
                group, i = self._last[k]
                found[tap.name] = {"loss": group.losses[i]}
                if bound:
                    found[tap.name]["bound"] = bound(group.losses[i], group.negatives[i])
            elif tap.name in self._before:
                found[tap.name] = self._before[tap.name]
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
        return measure(self, self._checked(model), loader, inputs, max_batches, since)

    @property
    def _bound(self) -> Callable[[Tensor, Tensor | int], Tensor] | None:
        """From a loss and the number of negatives; None for an objective of the user's own."""
        return _BOUNDS.get(self.objective.func if isinstance(self.objective, partial) else self.objective)

    @property
    def _device(self) -> torch.device:
        return next(self.heads.parameters()).device

    def _queued(self, k: int) -> int:
        queue = self.queues[k] if len(self.queues) else None
        return queue.filled if isinstance(queue, Queue) else 0

    def _check_rows(self, k: int, binary: Tensor, latent: Tensor, device: torch.device) -> None:
        if binary.device != device:
            raise CMIMError(
                f"The activations are on {binary.device}, the heads on {device}: "
                f"call cmim.to({str(binary.device)!r}), or attach after moving the model."
            )
        if len(binary) != len(latent):
            raise CMIMError(
                f"Tap {self.taps[k].name} has {len(binary)} rows on the binary side and {len(latent)} on the other."
            )

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

    def get_extra_state(self) -> dict[str, Any]:
        """Where the next taps and positions are drawn from, so that a resumed run draws what the unbroken one would."""
        first = torch.tensor(self._hooks.chosen is None)
        taps = {tap.name: torch.tensor([tap.channels, tap.latent_channels]) for tap in self.taps}
        return {"taps": taps, "generator": self._drawn_from, "first": first, "metrics": self.metrics}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """What :meth:`get_extra_state` returned.

        Raises:
            CMIMError: of taps of other widths, though the parameters may have the same shapes. (Names may differ: a
                wrapped model's have a prefix.)
        """
        found = {name: tuple(channels.tolist()) for name, channels in state["taps"].items()}
        wanted = {tap.name: (tap.channels, tap.latent_channels) for tap in self.taps}
        if list(found.values()) != list(wanted.values()):
            raise CMIMError(
                f"The state is that of other taps (name: channels of both sides).\nFound:  {found}\nWanted: {wanted}"
            )
        self._generator.set_state(state["generator"].cpu())
        self._draw(first=bool(state["first"]))
        self._last.clear()
        self._before = {
            name: {key: value.to(self._device) for key, value in figures.items()}
            for name, figures in state["metrics"].items()
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> CMIM:
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce__(self) -> Any:
        raise CMIMError(
            "A CMIM cannot be pickled, for it belongs to a model in this process. Save cmim.state_dict(); to restore, "
            "build CMIM(model, example_input) and call its load_state_dict()."
        )

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
        some = f", {self.taps_per_step} of them a step" if (self.taps_per_step or len(rows)) < len(rows) else ""
        title = (
            f"CMIM: {len(rows)} of {len(self.found)} binary activations tapped{some}, "
            f"one instance = one {self.instances}, weight {self.weight:g}{state}"
        )
        return "\n".join([title, *(line.rstrip() for line in lines)])

    # -- helpers -------------------------------------------------------------------------------------------------

    def _draw(self, first: bool = False) -> None:
        """Draw taps and positions of the next step: positions of all ranks, of which this one takes its share."""
        self._drawn_from = self._generator.get_state()
        self._hooks.chosen = None
        if (
            self.taps_per_step is not None
            and self.taps_per_step < len(self.taps)
            and not (first or self._hooks.compiled)
        ):
            order = torch.randperm(len(self.taps), generator=self._generator, device="cpu")
            self._hooks.chosen = frozenset(order[: self.taps_per_step].tolist())
        if self.instances == "position":
            ranks = distributed.ranks() if self._shared else 1
            share = -(-self.num_positions // ranks)
            draws = torch.rand(len(self.taps), share * ranks, generator=self._generator, device="cpu")
            start = share * distributed.rank() if self._shared else 0
            self._hooks.draws = draws[:, start : start + share].contiguous()

    def _share(self) -> None:
        """Start from the same heads, queue and generator on all ranks, as soon as there are several."""
        if self._shared or distributed.ranks() == 1:
            return
        state = self._generator.get_state()
        distributed.broadcast([*self.parameters(), *self.buffers(), state], self._device)
        self._generator.set_state(state)
        for queue in self.queues:
            assert isinstance(queue, Queue)
            queue.recount()
        self._shared = True

    def _checked(self, model: nn.Module) -> nn.Module:
        own = self._model()
        if own is None or _plain(model) is not own:
            raise CMIMError(
                f"This CMIM is attached to another model than the {type(model).__name__} passed in. A copy "
                "(copy.deepcopy, an EMA) is a plain model: attach a CMIM of its own to train it."
            )
        return own

    def _check_call(self, model: nn.Module) -> None:
        own = self._checked(model)
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
        if self._done or not any(p.requires_grad for p, _ in self._heads):
            return
        if any(p._version != before for p, before in self._heads):
            self._done = True
        elif sum(p._version >= before + _PATIENCE for p, before in self._network) > len(self._network) / 2:
            self._done = True
            cmim._warn(
                "The network is being trained, the heads of CMIM are not: "
                'optimizer.add_param_group({"params": cmim.parameters()}) was forgotten.'
            )


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


def _checked_labels(labels: Tensor, pair: Pair, device: torch.device) -> Tensor:
    if not isinstance(labels, Tensor):
        raise CMIMError(f"labels must be a tensor of {pair.batch} integers; found a {type(labels).__name__}.")
    if not labels.ndim or len(labels) != pair.batch or labels.is_floating_point():
        raise CMIMError(
            f"labels must be {pair.batch} integers, one a sample of the batch, or a map of them for each; "
            f"found shape {tuple(labels.shape)}, {labels.dtype}."
        )
    if labels.ndim > 1 and pair.index is None:
        raise CMIMError(
            f'instances="image" has one label an image, {pair.batch} integers; found shape {tuple(labels.shape)}.'
        )
    return labels.to(device)


def _labels_of(pair: Pair, labels: Tensor, name: str) -> Tensor:
    """The label of each row: that of its image, or that under its position, the nearest in the map of labels."""
    if pair.index is None:
        return labels
    samples = pair.samples()
    if labels.ndim == 1:
        return labels[samples]
    if pair.places is None or len(pair.places) != labels.ndim - 1:
        raise CMIMError(
            f"A map of labels, shape {tuple(labels.shape)}, does not lie over the positions of tap {name}: "
            "give one label a sample, shape (B,) (a class, not one-hot), or leave the tap out with taps=."
        )
    rest, at = pair.index, []
    for size, wanted in zip(reversed(pair.places), reversed(labels.shape[1:]), strict=True):
        # The label at the middle of the position.
        at.append((2 * (rest % size) + 1) * wanted // (2 * size))
        rest = rest // size
    return labels[(samples, *reversed(at))]


def _side_by_side(rows: Tensor, taps: list[int], sizes: dict[int, int]) -> Tensor:
    """``(taps, n, ...)``: the rows of those taps, which have ``n`` each, out of the rows of all."""
    if len(taps) == len(sizes):
        return rows.unflatten(0, (len(taps), -1))
    parts = dict(zip(sizes, rows.split(list(sizes.values())), strict=True))
    return torch.stack([parts[k] for k in taps])
