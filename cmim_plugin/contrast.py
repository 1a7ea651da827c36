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
from .negatives import NO_LABEL, Queue
from .objectives import count_negatives, holds_integers
from .passes import Pair, Pass, mask_of, samples_of

# In the first steps we check that labels and mask leave a negative. The check waits for the device.
_FIRST_STEPS = 3
# For errors: what labels of positions, labels of whole images, and a mask must be.
_LABELS = "{} integers, one a sample of the batch, or a map of them for each"
_LABELS_OF_IMAGES = '{} integers, one an image (instances="image")'
_MASK = "({}, tokens) booleans or integers, zero for padding"


class Last(NamedTuple):
    """The last loss of a tap, in nats and without a graph, and what it takes to count the negatives for its bound."""

    loss: Tensor
    instances: int  # candidates from the batch
    queued: int = 0  # candidates from the queue
    labels: Tensor | None = None  # this and the next two exclude candidates
    mask: Tensor | None = None
    queue_labels: Tensor | None = None

    def negatives(self) -> Tensor:
        """The number of negatives of each anchor, int64."""
        counts = count_negatives(self.instances, self.labels, self.queue_labels, self.queued, self.mask)
        return counts if self.mask is None else counts[self.mask]


class Embedded(NamedTuple):
    """The embeddings of one tap, with their labels and mask."""

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
        self.loads = 0  # loads of a state_dict, which must agree on all ranks; CMIM._sync() starts it from rank 0's
        self.last: dict[int, Last] = {}
        self._scheduled_once: set[int] = set()  # taps that some step was to contrast, with or without a loss
        self._steps_checked = 0  # steps that looked for negatives, up to _FIRST_STEPS

    def forward(self, forward_pass: Pass, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The weighted sum of the losses of the taps that a pass captured, 0-d; the other arguments are those of
        :meth:`cmim_plugin.CMIM.forward`."""
        embedded = self.embed(forward_pass, labels, mask)
        # Taps with equal numbers of rows and of queue entries go through the objective together.
        nonempty = [k for k in embedded if len(embedded[k].z_b) > 0]
        filled = [queue.filled for queue in self.queues] or [0] * len(self.taps)
        sums = []
        for (_, queued), taps in grouped(nonempty, [(len(embedded[k].z_b), filled[k]) for k in nonempty]):
            losses = self._losses(taps, [embedded[k] for k in taps], queued)
            weights = torch.cat([self._layer_weights_on_device[k : k + 1] for k in taps])  # no copy from the host
            sums.append(losses.dot(weights.to(losses.dtype)))
        if not torch.compiler.is_compiling():  # a Python number that changes is compiled again
            self._scheduled_once.update(forward_pass.scheduled)
            self._steps_checked = min(self._steps_checked + 1, _FIRST_STEPS)
        return sum(sums[1:], sums[0]) if sums else zero_of(embedded)

    def embed(self, forward_pass: Pass, labels: Tensor | None, mask: Tensor | None) -> dict[int, Embedded]:
        """The embeddings of each tap that a pass captured; on several ranks, with the rows of all ranks."""
        mixed = [tap.name for tap in self.taps if tap.mixed]  # of all taps, so that each rank raises
        if mixed and labels is not None:
            raise CMIMError(f"Labels are of samples, which these taps mix: {mixed}. Leave them out of taps=.")
        reads_mask = forward_pass.position_draws is not None and not len(self.queues)
        if mask is not None and not reads_mask:
            raise CMIMError('A mask needs instances="position", and queue_size=0: a queue would keep the padding.')
        pairs = {k: forward_pass.pairs[k] for k in forward_pass.scheduled if forward_pass.pairs[k].complete}
        together = distributed.ranks() > 1
        weights = distributed.averaged(self.heads.weights) if together else self.heads.weights
        # Taps without rows get a graph, too: ranks that have rows wait for this one in the backward pass.
        embedded = dict.fromkeys(forward_pass.scheduled, Embedded(weights[:0], weights[:0]))
        if pairs:
            # Sizes are checked against a tap that does not mix samples, if there is one.
            first = ([pair for pair in pairs.values() if not pair.tap.mixed] or [*pairs.values()])[0]
            if labels is not None:
                _check_samples(pairs.values(), first)
                wanted, ndim = (_LABELS_OF_IMAGES, 1) if first.index is None else (_LABELS, None)
                _check_given("labels", labels, first, wanted, ndim)
                labels = labels.to(weights.device)
            is_users_mask = mask is not None
            if reads_mask:
                mask = self._mask_to_apply(forward_pass, mask, first)
            z = self.heads(list(pairs), [pair.sides for pair in pairs.values()], weights)
            for (k, pair), z_b, z_f in zip(pairs.items(), z[: len(pairs)], z[len(pairs) :], strict=True):
                row_mask = None
                if mask is not None:
                    row_mask = mask_of(pair, mask) if is_users_mask else pair.unpadded
                embedded[k] = Embedded(z_b, z_f, None if labels is None else labels_of(pair, labels), row_mask)
        return self._from_all_ranks(embedded) if together else embedded

    def _from_all_ranks(self, embedded: dict[int, Embedded]) -> dict[int, Embedded]:
        """The embeddings with the rows of all ranks, in the order of one process. Raises CMIMError on every rank where
        only some ranks loaded a state."""
        taps = list(embedded.values())
        flags = [any(e.labels is not None for e in taps), any(e.mask is not None for e in taps), self.loads]
        # One length on all ranks: a collective hangs otherwise.
        own_counts = [*(len(e.z_b) for e in taps), *[0] * (len(self.taps) - len(taps))]
        by_rank = distributed.counts_of_all([*flags, *own_counts], taps[0].z_b.device)
        has_labels, has_mask, loaded, *_ = zip(*by_rank, strict=True)
        if len(set(loaded)) > 1:
            raise CMIMError(
                "The ranks do not have the same state: load cmim's state_dict on every rank. Loads on rank 0, 1, ...: "
                f"{list(loaded)}."
            )
        counts = tuple(rank_counts[len(flags) :][: len(taps)] for rank_counts in by_rank)

        def gathered(parts: Iterable[Tensor]) -> tuple[Tensor, ...]:
            rows = distributed.gather(torch.cat(list(parts)), counts)
            return rows.split([sum(tap_counts) for tap_counts in zip(*counts, strict=True)])

        def as_integers(tensor: Tensor | None, e: Embedded, default: int) -> Tensor:
            return torch.full((len(e.z_b),), default, device=e.z_b.device) if tensor is None else tensor.long()

        z = gathered(torch.stack([e.z_b, e.z_f], 1) for e in taps)
        # A rank may have neither where others have: a model gets no attention_mask for a batch without padding.
        labels = gathered(as_integers(e.labels, e, NO_LABEL) for e in taps) if any(has_labels) else [None] * len(taps)
        masks = gathered(as_integers(e.mask, e, 1) for e in taps) if any(has_mask) else [None] * len(taps)
        return {
            k: Embedded(z_k[:, 0], z_k[:, 1], labels_k, None if mask_k is None else mask_k.bool())
            for k, z_k, labels_k, mask_k in zip(embedded, z, labels, masks, strict=True)
        }

    def _mask_to_apply(self, forward_pass: Pass, users_mask: Tensor | None, first: Pair) -> Tensor | None:
        """The user's mask, checked, else the model's own, if it is usable. Warns of taps that the mask does not fit."""
        mask, models_mask = users_mask, forward_pass.attention_mask
        if users_mask is not None:
            _check_given("mask", users_mask, first, _MASK, 2)
        else:  # its size is not checked again: a second comparison would make it a constant for torch.compile
            mask = forward_pass.padding_mask
            if mask is None and models_mask is not None:
                found = "floats" if models_mask.is_floating_point() else f"{models_mask.ndim} dimensions"
                warn_once(self, f"An attention_mask of {found} is not read: pass mask=, zero or False for padding.")
        if mask is not None and not torch.compiler.is_compiling():
            others = []
            for pair in (pair for pair in forward_pass.pairs.values() if pair.complete):
                # Without tokens, only a user's mask is expected to fit, and only where samples have several positions.
                expected = pair.tokens > 0 or (users_mask is not None and pair.total > len(mask))
                if pair.tap.mixed or pair.batch_size != len(mask) or (expected and pair.tokens != mask.shape[1]):
                    others.append(pair.tap.name)
            if others:  # no sizes in the text, which change from batch to batch: it is given once
                warn_once(
                    self,
                    f"The mask is not applied to these taps, which mix the samples, or have more or fewer samples, or "
                    f"tokens a sample, than the mask: {others}. Their padding counts. Pass a mask with as many tokens, "
                    "bring the batch to the front before the sign, or leave them out of taps=.",
                )
        return None if mask is None else mask.to(self.heads.weights.device)

    def _losses(self, taps: list[int], embedded: list[Embedded], queued: int) -> Tensor:
        """The losses of taps with equal numbers of rows and of queue entries: ``(taps,)``."""
        z = torch.stack([*(e.z_b for e in embedded), *(e.z_f for e in embedded)]).unflatten(0, (2, -1))
        labels, mask = _stacked(e.labels for e in embedded), _stacked(e.mask for e in embedded)
        settings: dict[str, Tensor] = {} if mask is None else {"mask": mask}
        if len(self.queues):
            # Copies: push() below overwrites the queue before the backward pass reads it.
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
        for i, (k, e) in enumerate(zip(taps, embedded, strict=True)):
            labels_of_queue = queue_labels[i] if len(self.queues) else None
            self.last[k] = Last(losses[i].detach(), n, queued, e.labels, e.mask, labels_of_queue)
            if len(self.queues):
                self.queues[k].push(z[:, i].detach(), e.labels)
        excludes = labels is not None or mask is not None
        counts_negatives = excludes and self._steps_checked < _FIRST_STEPS and not torch.compiler.is_compiling()
        if n + queued == 1 or (counts_negatives and not all(self.last[k].negatives().any() for k in taps)):
            what = "one instance, one class only, or padding"
            warn_once(self, f"A batch had no negatives for some tap ({what}): it adds nothing to the loss there.")
        return losses

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """See :attr:`cmim_plugin.CMIM.metrics`."""
        bound = getattr(self.objective, "bound", None)
        metrics: dict[str, dict[str, Tensor]] = {}
        for k, last in sorted(self.last.items()):
            metrics[self.taps[k].name] = {"loss": last.loss}
            if bound is not None and (last.mask is None or bool(last.mask.any())):
                metrics[self.taps[k].name]["bound"] = bound(last.loss, last.negatives())
        return metrics

    def scalars(self, weight: float | Tensor, all_taps: bool) -> dict[str, float]:
        """See :meth:`cmim_plugin.CMIM.scalars`."""
        shares, last = self.layer_weights, self.last
        if not last:
            return {}
        # The weighted mean over the taps that had their turn; those without a loss count as zero.
        loss = sum(shares[k] * float(last[k].loss) for k in last)
        scalars = {"cmim/loss": float(weight) * loss / sum(shares[k] for k in self._scheduled_once | last.keys())}
        bounds = {name: float(m["bound"]) for name, m in self.metrics().items() if "bound" in m}
        if bounds:
            scalars |= {"cmim/bound": sum(bounds.values()) / len(bounds), "cmim/worst_bound": min(bounds.values())}
        return scalars | ({f"cmim/bound/{name}": bound for name, bound in bounds.items()} if all_taps else {})

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]
        if prefix + "heads.weights" in state:  # with strict=False a state may be another module's
            self.last.clear()
            self._scheduled_once.clear()
            self.loads += 1

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Contrast:
        super()._apply(fn, recurse)
        self._layer_weights_on_device = self.heads.weights.new_tensor(self.layer_weights)  # a cast would round
        return self


def _stacked(parts: Iterable[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.stack(tensors) if tensors else None


def zero_of(embedded: dict[int, Embedded]) -> Tensor:
    """A zero with a graph, where no rank has rows."""
    return next(iter(embedded.values())).z_b[:0].sum()


def _check_samples(pairs: Iterable[Pair], first: Pair) -> None:
    if torch.compiler.is_compiling():  # a second comparison makes a size a constant
        return
    others = [pair.tap.name for pair in pairs if not pair.tap.mixed and pair.batch_size != first.batch_size]
    if others:
        raise CMIMError(
            f"Labels are of samples, and these taps have other samples than {first.tap.name}, as where some leave the "
            f"network early: {others}. Leave them out of taps=."
        )


def _check_given(name: str, value: Any, pair: Pair, wanted: str, ndim: int | None) -> None:
    """Labels or a mask: a tensor of integers or booleans with an entry for each sample of the pair's batch."""
    fits = isinstance(value, Tensor) and holds_integers(value) and value.ndim > 0 and ndim in (None, value.ndim)
    if not fits or not (pair.tap.mixed or len(value) == pair.batch_size):
        found = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        # Sizes are formatted in the error only: formatting makes them constants for torch.compile.
        hint = ". Have the inputs time first? Then attach with batch_size=." if fits else "."
        raise CMIMError(f"{name} must be {wanted.format(pair.batch_size)}; found {found}{hint}")


def labels_of(pair: Pair, labels: Tensor) -> Tensor:
    """The label of each row: of its sample, or, in a map of labels, of the place nearest to its position."""
    if pair.index is None:
        return labels
    samples, within = samples_of(pair)
    if labels.ndim == 1:
        return labels[samples]
    windowed = any(layout.windowed for layout in pair.tap.layouts)
    if windowed or pair.spatial is None or len(pair.spatial) != labels.ndim - 1:
        raise CMIMError(
            f"A map of labels, shape {tuple(labels.shape)}, does not lie over the positions of tap {pair.tap.name}: "
            "give one label a sample, shape (B,) (a class, not one-hot), or leave the tap out of taps=."
        )
    places = []
    for size, size_of_map in zip(reversed(pair.spatial), reversed(labels.shape[1:]), strict=True):
        # The label at the middle of the position.
        places.append((2 * (within % size) + 1) * size_of_map // (2 * size))
        within = within // size
    return labels[(samples, *reversed(places))]
