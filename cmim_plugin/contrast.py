"""Pairs of rows -> heads -> objective -> one number: the contrast of one forward pass, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import distributed
from .discovery.find import Tap
from .errors import CMIMError, warn_once
from .heads import Heads, grouped
from .negatives import Queue
from .objectives import count_negatives, holds_integers
from .passes import Pair, Pass, mask_of, samples_of

# In the first steps we check that labels and mask leave a negative. The check waits for the device.
_FIRST_STEPS = 3
# What labels of positions, labels of whole images, and a mask are to be.
_LABELS = "{} integers, one a sample of the batch, or a map of them for each"
_LABELS_OF_IMAGES = '{} integers, one an image (instances="image")'
_MASK = "({}, tokens) booleans or integers, zero for padding"


class Last(NamedTuple):
    """The last loss of a tap, in nats and without a graph, and what its bound needs, which is read when asked for."""

    loss: Tensor
    instances: int  # candidates that an anchor has in the batch,
    queued: int = 0  # and in the queue
    labels: Tensor | None = None  # these three excluded some of them
    mask: Tensor | None = None
    queue_labels: Tensor | None = None

    def negatives(self) -> Tensor:
        """How many each anchor has, int64."""
        counts = count_negatives(self.instances, self.labels, self.queue_labels, self.queued, self.mask)
        return counts if self.mask is None else counts[self.mask]


class Embedded(NamedTuple):
    """The embeddings of one tap, and what was given for each of them."""

    z_b: Tensor  # (n, D)
    z_f: Tensor
    labels: Tensor | None = None  # (n,) integers
    mask: Tensor | None = None  # (n,) booleans


class Contrast(nn.Module):
    """The heads, queues and objective of all taps; the arguments are those of :class:`cmim_plugin.CMIM`."""

    def __init__(
        self,
        taps: Sequence[Tap],
        *,
        objective: Callable[..., Tensor],
        temperature: float,
        embed_dim: int,
        heads_lr: float,
        queue_size: int,
        layer_decay: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.objective = objective
        self.temperature = temperature
        self.heads = Heads([(tap.channels, tap.latent_channels) for tap in taps], embed_dim, heads_lr, generator)
        self.queues: Sequence[Queue] = nn.ModuleList(  # type: ignore[assignment]
            Queue(queue_size, embed_dim) for _ in taps if queue_size
        )
        raw = [layer_decay ** (len(taps) - 1 - k) for k in range(len(taps))]
        #: One weight per tap. They sum to 1: ``weight`` means the same for a shallow and for a deep network.
        self.layer_weights = tuple(w / sum(raw) for w in raw)
        self._layer_weights_on_device = self.heads.weights.new_tensor(self.layer_weights)
        self.loads = 0  # how often a state was loaded; before all ranks started from one state, by rank 0
        self.last: dict[int, Last] = {}
        self._scheduled_once: set[int] = set()  # taps that a loss was asked of, also of those that gave none
        self._steps_checked = 0  # for negatives, up to _FIRST_STEPS

    def forward(self, forward_pass: Pass, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The weighted sum of the losses of the taps that this pass forward_pass, 0-d; the arguments are those of
        :meth:`cmim_plugin.CMIM.forward`."""
        rows = self.embed(forward_pass, labels, mask)
        # One call of the objective for all taps of as many rows and as full a queue.
        nonempty = [k for k in rows if len(rows[k].z_b) > 0]
        filled = [queue.filled for queue in self.queues] or [0] * len(self.taps)
        sums = []
        for (_, queued), taps in grouped(nonempty, [(len(rows[k].z_b), filled[k]) for k in nonempty]):
            losses = self._losses(taps, [rows[k] for k in taps], queued)
            layer_weights = torch.cat([self._layer_weights_on_device[k : k + 1] for k in taps])
            sums.append(losses.dot(layer_weights.to(losses.dtype)))
        if not torch.compiler.is_compiling():  # each number would be compiled anew
            self._scheduled_once.update(forward_pass.scheduled)
            self._steps_checked = min(self._steps_checked + 1, _FIRST_STEPS)
        return sum(sums[1:], sums[0]) if sums else zero_of(rows)

    def embed(self, forward_pass: Pass, labels: Tensor | None, mask: Tensor | None) -> dict[int, Embedded]:
        """The embeddings of each tap that a pass forward_pass; on several ranks, the rows of all of them."""
        mixed = [tap.name for tap in self.taps if tap.mixed]  # of all, so that each rank raises
        if mixed and labels is not None:
            raise CMIMError(f"Labels are of samples, which these taps mix: {mixed}. Leave them out with taps=.")
        reads_mask = forward_pass.position_draws is not None and not len(self.queues)
        if mask is not None and not reads_mask:
            raise CMIMError('A mask needs instances="position", and queue_size=0: a queue would keep the padding.')
        pairs = {k: forward_pass.pairs[k] for k in forward_pass.scheduled if forward_pass.pairs[k].complete}
        together = distributed.ranks() > 1
        weights = distributed.averaged(self.heads.weights) if together else self.heads.weights
        # Without rows there is a graph: other ranks may have some, and wait for this one in the backward pass.
        rows = dict.fromkeys(forward_pass.scheduled, Embedded(weights[:0], weights[:0]))
        if pairs:
            # What mixes the samples may have another number of them.
            first = ([pair for pair in pairs.values() if not pair.tap.mixed] or [*pairs.values()])[0]
            if labels is not None:
                _check_samples(pairs.values(), first)
                wanted, ndim = (_LABELS_OF_IMAGES, 1) if first.index is None else (_LABELS, None)
                _check_given("labels", labels, first, wanted, ndim)
                labels = labels.to(weights.device)
            own, mask = mask is None, self._usable_mask(forward_pass, mask, first) if reads_mask else None
            z = self.heads(list(pairs), [pair.sides for pair in pairs.values()], weights)
            for (k, pair), z_b, z_f in zip(pairs.items(), z[: len(pairs)], z[len(pairs) :], strict=True):
                of_mask = None if mask is None else pair.unpadded if own else mask_of(pair, mask)
                rows[k] = Embedded(z_b, z_f, None if labels is None else labels_of(pair, labels), of_mask)
        return self._of_all_ranks(rows) if together else rows

    def _of_all_ranks(self, rows: dict[int, Embedded]) -> dict[int, Embedded]:
        """The same with the rows of all ranks, in the order that one process would have them in. Raises CMIMError on
        every rank where some of them loaded a state since all started from one, and others did not."""
        some = list(rows.values())
        given = [any(r.labels is not None for r in some), any(r.mask is not None for r in some), self.loads]
        # As many numbers on each rank, whatever taps it contrasts.
        own = [*(len(r.z_b) for r in some), *[0] * (len(self.taps) - len(some))]
        told = distributed.counts_of_all([*given, *own], some[0].z_b.device)
        has_labels, has_mask, loaded, *_ = zip(*told, strict=True)  # by rank
        if len(set(loaded)) > 1:
            raise CMIMError(
                "The ranks do not have the same state: load cmim's state_dict on every rank. Loads on rank 0, 1, ...: "
                f"{list(loaded)}."
            )
        counts = tuple(of_rank[len(given) :][: len(some)] for of_rank in told)

        def gathered(parts: Iterable[Tensor]) -> tuple[Tensor, ...]:
            found = distributed.gather(torch.cat(list(parts)), counts)
            return found.split([sum(of_tap) for of_tap in zip(*counts, strict=True)])

        def or_else(own: Tensor | None, r: Embedded, value: int) -> Tensor:
            return torch.full((len(r.z_b),), value, device=r.z_b.device) if own is None else own.long()

        z = gathered(torch.stack([r.z_b, r.z_f], 1) for r in some)
        # A rank may have neither where others have: a model gets no attention_mask for a batch without padding.
        labels = gathered(or_else(r.labels, r, -1) for r in some) if any(has_labels) else [None] * len(some)
        mask = gathered(or_else(r.mask, r, 1) for r in some) if any(has_mask) else [None] * len(some)
        return {
            k: Embedded(z_k[:, 0], z_k[:, 1], of_label, None if of_mask is None else of_mask.bool())
            for k, z_k, of_label, of_mask in zip(rows, z, labels, mask, strict=True)
        }

    def _usable_mask(self, forward_pass: Pass, mask: Tensor | None, first: Pair) -> Tensor | None:
        """The mask that the user gave, else the one that the model itself was given. Warns of taps that it does not
        fit."""
        own = mask is None
        if mask is None:
            mask = forward_pass.padding_mask
            if mask is None and forward_pass.attention_mask is not None:
                found = (
                    "floats"
                    if forward_pass.attention_mask.is_floating_point()
                    else f"{forward_pass.attention_mask.ndim} dimensions"
                )
                warn_once(self, f"An attention_mask of {found} is not read: pass mask=, zero or False for padding.")
        else:  # a size that is compared again is a constant to torch.compile
            _check_given("mask", mask, first, _MASK, 2)
        if mask is not None and not torch.compiler.is_compiling():
            others = []
            for pair in filter(lambda pair: pair.complete, forward_pass.pairs.values()):
                other_tokens = pair.tokens != mask.shape[1] and (pair.tokens or (not own and pair.total > len(mask)))
                if pair.tap.mixed or other_tokens or pair.batch_size != len(mask):
                    others.append(pair.tap.name)
            if others:  # without the numbers, which change from batch to batch: once
                warn_once(
                    self,
                    f"The mask is not applied to these taps, which mix the samples, or have more or fewer samples, or "
                    f"tokens a sample, than the mask: {others}. Their padding counts. Pass a mask with as many tokens, "
                    "bring the batch to the front before the sign, or leave them out with taps=.",
                )
        return None if mask is None else mask.to(self.heads.weights.device)

    def _losses(self, taps: list[int], rows: list[Embedded], queued: int) -> Tensor:
        """The losses of taps with as many rows and as many queued entries each: ``(taps,)``."""
        z = torch.stack([*(r.z_b for r in rows), *(r.z_f for r in rows)]).unflatten(0, (2, -1))
        labels, mask = _stacked(r.labels for r in rows), _stacked(r.mask for r in rows)
        settings: dict[str, Tensor] = {} if mask is None else {"mask": mask}
        if len(self.queues):
            # Copies: the loss keeps them for its backward pass, and push() overwrites in place before that.
            queues = torch.stack([self.queues[k].embeddings[:, :queued] for k in taps], 1)
            queue_labels = torch.stack([self.queues[k].labels[:queued] for k in taps])
            settings.update({"queue_b": queues[0], "queue_f": queues[1], "queue_labels": queue_labels})
        z_b, z_f = z
        losses = self.objective(z_b, z_f, temperature=self.temperature, labels=labels, **settings)
        if not isinstance(losses, Tensor) or losses.shape != (len(taps),):
            raise CMIMError(
                f"objective got embeddings of {len(taps)} taps, shape {tuple(z.shape[1:])}, and must return their "
                f"losses, shape ({len(taps)},); found {getattr(losses, 'shape', losses)!r}."
            )
        n = z.shape[2]
        for i, (k, r) in enumerate(zip(taps, rows, strict=True)):
            of_queue = queue_labels[i] if len(self.queues) else None
            self.last[k] = Last(losses[i].detach(), n, queued, r.labels, r.mask, of_queue)
            if len(self.queues):
                self.queues[k].push(z[:, i].detach(), r.labels)
        some_excluded = labels is not None or mask is not None
        look = some_excluded and self._steps_checked < _FIRST_STEPS and not torch.compiler.is_compiling()
        if n + queued == 1 or (look and not all(self.last[k].negatives().any() for k in taps)):
            what = "one instance, one class only, or padding"
            warn_once(self, f"A batch had no negatives for some tap ({what}): it adds nothing to the loss there.")
        return losses

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """See :attr:`cmim_plugin.CMIM.metrics`."""
        bound = getattr(self.objective, "bound", None)
        found: dict[str, dict[str, Tensor]] = {}
        for k, last in sorted(self.last.items()):
            found[self.taps[k].name] = {"loss": last.loss}
            if bound is not None and (last.mask is None or bool(last.mask.any())):
                found[self.taps[k].name]["bound"] = bound(last.loss, last.negatives())
        return found

    def scalars(self, weight: float | Tensor, all_taps: bool) -> dict[str, float]:
        """See :meth:`cmim_plugin.CMIM.scalars`."""
        shares, last = self.layer_weights, self.last
        if not last:
            return {}
        loss = sum(shares[k] * float(last[k].loss) for k in last)
        found = {"cmim/loss": float(weight) * loss / sum(shares[k] for k in self._scheduled_once | last.keys())}
        bounds = {name: float(m["bound"]) for name, m in self.metrics().items() if "bound" in m}
        if bounds:
            found |= {"cmim/bound": sum(bounds.values()) / len(bounds), "cmim/worst_bound": min(bounds.values())}
        return found | ({f"cmim/bound/{name}": bound for name, bound in bounds.items()} if all_taps else {})

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]
        if prefix + "heads.weights" in state:  # with strict=False a state may be another module's
            self.last.clear()
            self.loads += 1

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Contrast:
        super()._apply(fn, recurse)
        self._layer_weights_on_device = self.heads.weights.new_tensor(
            self.layer_weights
        )  # in half precision they would round
        return self


# -- what is given for samples or positions, for each row ------------------------------------------------------------


def _stacked(parts: Iterable[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.stack(given) if given else None


def zero_of(rows: dict[int, Embedded]) -> Tensor:
    """A zero with a graph, for where no rank has rows."""
    return next(iter(rows.values())).z_b[:0].sum()


def _check_samples(pairs: Iterable[Pair], first: Pair) -> None:
    if torch.compiler.is_compiling():  # a size that is compared again is a constant
        return
    others = [pair.tap.name for pair in pairs if not pair.tap.mixed and pair.batch_size != first.batch_size]
    if others:
        raise CMIMError(
            f"Labels are of samples, and these taps have other samples than {first.tap.name}, as where some leave the "
            f"network early: {others}. Leave them out with taps=."
        )


def _check_given(name: str, value: Any, pair: Pair, wanted: str, ndim: int | None) -> None:
    """Labels or a mask: a tensor of integers or booleans with an entry for each sample of the pair's batch."""
    fits = isinstance(value, Tensor) and holds_integers(value) and value.ndim > 0 and value.ndim == (ndim or value.ndim)
    if not fits or not (pair.tap.mixed or len(value) == pair.batch_size):
        found = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        # Written here only: a size that is formatted is a constant to torch.compile.
        time = ". Have the inputs time first? Then attach with batch_size=." if fits else "."
        raise CMIMError(f"{name} must be {wanted.format(pair.batch_size)}; found {found}{time}")


def labels_of(pair: Pair, labels: Tensor) -> Tensor:
    """The label of each row: that of its sample, or that under its position, the nearest in a map of labels."""
    if pair.index is None:
        return labels
    samples, rest = samples_of(pair)
    if labels.ndim == 1:
        return labels[samples]
    windowed = any(layout.windowed for layout in pair.tap.layouts)
    if windowed or pair.spatial is None or len(pair.spatial) != labels.ndim - 1:
        raise CMIMError(
            f"A map of labels, shape {tuple(labels.shape)}, does not lie over the positions of tap {pair.tap.name}: "
            "give one label a sample, shape (B,) (a class, not one-hot), or leave the tap out with taps=."
        )
    at = []
    for size, wanted in zip(reversed(pair.spatial), reversed(labels.shape[1:]), strict=True):
        # The label at the middle of the position.
        at.append((2 * (rest % size) + 1) * wanted // (2 * size))
        rest = rest // size
    return labels[(samples, *reversed(at))]
