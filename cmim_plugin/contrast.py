"""Pairs of rows -> heads -> objective -> one number: the contrast of one forward pass, the same on every rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .errors import CMIMError, warn_once
from .heads import Heads
from .negatives import Queue
from .objectives import count_negatives
from .passes import Pair, Pass, Tap

# In the first steps we check that labels and mask leave a negative. The check synchronizes with the device.
_FIRST_STEPS = 3
# Losses after which a bound under so many nats is told.
_LONG, _NOTHING = 1000, 0.05


@dataclass
class Losses:
    """The losses of some taps with the same number of rows, computed side by side.

    Attributes:
        taps: which.
        values: ``(len(taps),)`` nats, without a graph.
        rows, queued: candidates an anchor has in the batch and in the queue.
        labels, mask, queue_labels: what excluded some of them.
    """

    taps: list[int]
    values: Tensor
    rows: int
    queued: int = 0
    labels: Tensor | None = None
    mask: Tensor | None = None
    queue_labels: Tensor | None = None

    @cached_property
    def negatives(self) -> Tensor:
        """How many each anchor has: ``(taps, n)`` int64."""
        counts = count_negatives(self.rows, self.labels, self.queue_labels, self.queued, self.mask)
        return counts.expand(len(self.taps), -1)

    def bound(self, i: int, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The bound that the ``i``-th loss gives, by an objective's ``bound``."""
        counts = self.negatives[i]
        return of(self.values[i], counts if self.mask is None else counts[self.mask[i]])


class Contrast(nn.Module):
    """The heads, queues and objective of all taps.

    Args:
        taps: in forward order.
        objective: see :class:`cmim_plugin.CMIM`, as for the rest.
    """

    _layer_weights: Tensor
    _loaded: Tensor

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
        self.queues = nn.ModuleList([Queue(queue_size, embed_dim) for _ in taps if queue_size])
        raw = [layer_decay ** (len(taps) - 1 - k) for k in range(len(taps))]
        #: One a tap, of sum 1: ``weight`` means the same for a shallow and for a deep network.
        self.layer_weights = tuple(w / sum(raw) for w in raw)
        weights = torch.tensor(self.layer_weights, dtype=torch.float32, device="cpu")
        self.register_buffer("_layer_weights", weights, persistent=False)
        # The metrics of a loaded state, until there are new ones.
        self.register_buffer("_loaded", torch.full((len(taps), 2), math.nan, dtype=torch.float32, device="cpu"))
        #: Several ranks started from the same state.
        self.synced = False
        #: Tap -> where its last loss is.
        self.last: dict[int, tuple[Losses, int]] = {}
        self._steps = 0

    def forward(self, captured: Pass, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The weighted sum of the losses of all taps, 0-d, from those that this pass captured.

        Args:
            captured: a pass; a tap that it did not reach adds nothing.
            labels: ``(B,)`` or ``(B, *spatial)`` integers of this rank's batch.
            mask: ``(B, positions)`` bool, False for positions that do not count.
        """
        scheduled = captured.scheduled
        device = self.heads.weights.device
        labels, mask = _checked("labels", labels, captured, device), _checked("mask", mask, captured, device)
        z, row_labels, row_mask, sizes = self.embeddings(captured, labels, mask)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for k, size in sizes.items():
            if size:
                groups[size, self._queued(k)].append(k)
        # Those that were scheduled stand for all.
        weights = self._layer_weights * (len(self.taps) / len(scheduled))
        parts = []
        for taps in groups.values():
            of_taps = [None if side is None else _side_by_side(side, taps, sizes) for side in (row_labels, row_mask)]
            z_b, z_f = _side_by_side(z, taps, sizes, 1)
            losses = self._losses(taps, z_b, z_f, *of_taps)
            parts.append(losses.dot(torch.cat([weights[k : k + 1] for k in taps]).to(losses.dtype)))
        if not torch.compiler.is_compiling():  # each number would be compiled anew
            self._steps = min(self._steps + 1, _FIRST_STEPS)
        return sum(parts[1:], parts[0]) if parts else z.sum()  # a zero with a graph, where no rank has rows

    def embeddings(
        self, captured: Pass, labels: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, dict[int, int]]:
        """Both sides' embeddings of all ranks ``(2, rows, D)``, tap by tap; labels and mask; the rows of each tap."""
        weights = self.heads.weights
        rows: list[tuple[Tensor, Tensor]] = []
        reached = [k for k in captured.scheduled if captured.pairs[k].complete]
        sizes = dict.fromkeys(captured.scheduled, 0)
        for k in reached:
            binary, latent = captured.pairs[k].rows
            assert binary is not None and latent is not None
            check_rows(self.taps[k], binary, latent, weights.device)
            rows.append((binary, latent))
            sizes[k] = len(binary)
        together = self.synced and distributed.ranks() > 1
        shared = distributed.averaged(weights) if together else weights
        if reached:
            z = self.heads(reached, rows, shared)
        else:
            # No rows, but a graph: other ranks may have some, and wait for this one in the backward pass.
            tap = self.taps[0]
            none = [(weights.new_zeros(0, tap.channels), weights.new_zeros(0, tap.latent_channels))]
            z = self.heads([0], none, shared)
        pairs = [(self.taps[k].name, captured.pairs[k]) for k in reached]
        for name, pair in pairs:
            if mask is not None and pair.tokens not in (0, mask.shape[1]):
                warn_once(
                    self,
                    f"The mask has {mask.shape[1]} tokens a sample, tap {name} has {pair.tokens}: there all of them "
                    "count, padding too. Pass a mask with as many tokens, or leave the tap out with taps=.",
                )
        row_labels = None if labels is None else _of_all(pairs, lambda n, p: labels_of(p, labels, n), labels)
        row_mask = None if mask is None else _of_all(pairs, lambda n, p: mask_of(p, mask), mask)
        if together:
            counts = distributed.counts_of_all(list(sizes.values()), z.device)
            z = distributed.gather(z.transpose(0, 1), counts).transpose(0, 1)
            row_labels = None if row_labels is None else distributed.gather(row_labels, counts)
            row_mask = None if row_mask is None else distributed.gather(row_mask.to(torch.uint8), counts).bool()
            sizes = {k: sum(of_tap) for k, *of_tap in zip(sizes, *counts, strict=True)}
        return z, row_labels, row_mask, sizes

    def _losses(self, taps: list[int], z_b: Tensor, z_f: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        """The losses of taps whose embeddings, ``(taps, n, D)`` each, lie side by side: ``(taps,)``."""
        settings: dict[str, Tensor] = {} if mask is None else {"mask": mask}
        if len(self.queues):
            queues = [queue for k in taps if isinstance(queue := self.queues[k], Queue)]
            contents = zip(*(queue.contents() for queue in queues), strict=True)
            # Copies: the loss keeps them for its backward pass, and push() overwrites in place before that.
            settings |= dict(zip(("queue_b", "queue_f", "queue_labels"), map(torch.stack, contents), strict=True))
            for i, queue in enumerate(queues):
                queue.push(z_b[i].detach(), z_f[i].detach(), None if labels is None else labels[i])
        losses = self.objective(z_b, z_f, temperature=self.temperature, labels=labels, **settings)
        if not isinstance(losses, Tensor) or losses.shape != (len(taps),):
            raise CMIMError(
                f"objective got embeddings of {len(taps)} taps, shape {tuple(z_b.shape)}, and must return their "
                f"losses, shape ({len(taps)},); found {getattr(losses, 'shape', losses)!r}."
            )
        queue_labels = settings.get("queue_labels")
        queued = 0 if queue_labels is None else queue_labels.shape[-1]
        found = Losses(taps, losses.detach(), z_b.shape[1], queued, labels, mask, queue_labels)
        self.last.update({k: (found, i) for i, k in enumerate(taps)})
        none = z_b.shape[1] + queued == 1
        ask = (labels is not None or mask is not None) and self._steps < _FIRST_STEPS
        if none or (ask and not torch.compiler.is_compiling() and not bool(found.negatives.any(-1).all())):
            warn_once(self, "A batch had no negatives (one instance, or one class only): its loss is zero.")
        return losses

    def _queued(self, k: int) -> int:
        queue = self.queues[k] if len(self.queues) else None
        return queue.filled if isinstance(queue, Queue) else 0

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """See :attr:`cmim_plugin.CMIM.metrics`."""
        bound = getattr(self.objective, "bound", None)
        found: dict[str, dict[str, Tensor]] = {}
        for k, tap in enumerate(self.taps):
            if k in self.last:
                losses, i = self.last[k]
                found[tap.name] = {"loss": losses.values[i]}
                nothing_counts = losses.mask is not None and not bool(losses.mask[i].any())
                if bound is not None and not nothing_counts:
                    found[tap.name]["bound"] = losses.bound(i, bound)
            elif not self._loaded[k].isnan().all():
                values = zip(("loss", "bound"), self._loaded[k], strict=True)
                found[tap.name] = {name: value for name, value in values if not value.isnan()}
        return found

    def scalars(self, weight: float, all_taps: bool) -> dict[str, float]:
        """See :meth:`cmim_plugin.CMIM.scalars`."""
        metrics = self.metrics()
        known = [(metrics[t.name], w) for t, w in zip(self.taps, self.layer_weights, strict=True) if t.name in metrics]
        found = {}
        if known:
            found["cmim/loss"] = weight * sum(w * float(m["loss"]) for m, w in known) / sum(w for _, w in known)
        bounds = {name: float(m["bound"]) for name, m in metrics.items() if "bound" in m}
        if bounds:
            found |= {"cmim/bound": sum(bounds.values()) / len(bounds), "cmim/worst_bound": min(bounds.values())}
        return found | ({f"cmim/bound/{name}": bound for name, bound in bounds.items()} if all_taps else {})

    def tell_of_idle_heads(self, losses: int) -> None:
        """Warn, once, of heads that do not learn, after so many losses. Waits for the device."""
        if self.heads.lr and not bool(self.heads.steps):
            warn_once(
                self,
                f"{losses} losses were asked for, and no gradient came back to the heads. Is cmim(model) part of what "
                "backward() is called on?",
            )
        bounds = [float(m["bound"]) for m in self.metrics().values() if "bound" in m]
        if losses >= _LONG and bounds and max(bounds) < _NOTHING:
            warn_once(
                self,
                f"After {losses} losses the bound of every tap is still zero ({max(bounds):.2f} nats at most): the "
                "codes keep nothing that tells one place from another. Dead channels do that: see cmim.report().",
            )

    def _save_to_state_dict(self, *args: Any) -> None:
        for k, values in enumerate(map(self.metrics().get, (tap.name for tap in self.taps))):
            for i, name in enumerate(("loss", "bound")):
                self._loaded[k, i] = (values or {}).get(name, math.nan)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.last.clear()


def check_rows(tap: Tap, binary: Tensor, latent: Tensor, device: torch.device) -> None:
    """Refuse rows that heads on this device cannot embed, or that do not pair up."""
    if binary.device != device:
        raise CMIMError(
            f"The activations are on {binary.device}, the heads on {device}: "
            f"call cmim.to({str(binary.device)!r}), or attach after moving the model."
        )
    if len(binary) != len(latent):
        raise CMIMError(f"Tap {tap.name} has {len(binary)} rows on the binary side and {len(latent)} on the other.")


# -- what is given for samples or positions, for each row ------------------------------------------------------------


def _checked(name: str, value: Tensor | None, captured: Pass, device: torch.device) -> Tensor | None:
    """Labels or a mask of this pass's batch, on the device of the heads."""
    pair = next((pair for pair in captured.pairs.values() if pair.complete), None)
    if value is None or pair is None:
        return value if value is None else value.to(device)
    batch = pair.batch
    if name == "mask":
        fits = getattr(value, "ndim", 0) == 2 and pair.index is not None
        wanted = f'({batch}, tokens) booleans or integers, zero for padding (with instances="position")'
    elif pair.index is None:
        fits, wanted = getattr(value, "ndim", 0) == 1, f'{batch} integers, one an image (instances="image")'
    else:
        fits, wanted = True, f"{batch} integers, one a sample of the batch, or a map of them for each"
    if isinstance(value, Tensor) and fits and value.ndim and len(value) == batch and not value.is_floating_point():
        return value.to(device)
    found = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    raise CMIMError(f"{name} must be {wanted}; found {found}.")


def labels_of(pair: Pair, labels: Tensor, name: str) -> Tensor:
    """The label of each row: that of its sample, or that under its position, the nearest in a map of labels."""
    if pair.index is None:
        return labels
    samples, rest = _samples(pair)
    if labels.ndim == 1:
        return labels[samples]
    if pair.windows or pair.spatial is None or len(pair.spatial) != labels.ndim - 1:
        raise CMIMError(
            f"A map of labels, shape {tuple(labels.shape)}, does not lie over the positions of tap {name}: "
            "give one label a sample, shape (B,) (a class, not one-hot), or leave the tap out with taps=."
        )
    at = []
    for size, wanted in zip(reversed(pair.spatial), reversed(labels.shape[1:]), strict=True):
        # The label at the middle of the position.
        at.append((2 * (rest % size) + 1) * wanted // (2 * size))
        rest = rest // size
    return labels[(samples, *reversed(at))]


def mask_of(pair: Pair, mask: Tensor) -> Tensor:
    """Whether each row counts: what the mask says of its token. All count where a tap has other tokens, or none."""
    samples, rest = _samples(pair)
    if pair.tokens != mask.shape[1]:
        return torch.ones_like(rest, dtype=torch.bool)
    return mask[samples, rest % pair.tokens] != 0


def _samples(pair: Pair) -> tuple[Tensor, Tensor]:
    """The sample of each row, and its position within the sample."""
    assert pair.index is not None
    each = pair.total // max(pair.batch, 1)
    return pair.index // max(each, 1), pair.index % max(each, 1)


def _of_all(pairs: Sequence[tuple[str, Pair]], of: Callable[[str, Pair], Tensor], like: Tensor) -> Tensor:
    found = [of(name, pair) for name, pair in pairs]
    return torch.cat(found) if found else like.new_zeros(0)


def _side_by_side(rows: Tensor, taps: list[int], sizes: dict[int, int], dim: int = 0) -> Tensor:
    """``(..., taps, n, ...)``: the rows of those taps, which have ``n`` each, out of the rows of all in ``dim``."""
    if len(taps) == len(sizes):
        return rows.unflatten(dim, (len(taps), -1))
    parts = dict(zip(sizes, rows.split(list(sizes.values()), dim), strict=True))
    return torch.stack([parts[k] for k in taps], dim)
