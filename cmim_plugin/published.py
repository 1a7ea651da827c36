"""The variant of the authors' published code: teacher, last layer, memory bank with an entry for each sample."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contrast import Contrast, Last, zero_of
from .errors import CMIMError
from .objectives import NCE, holds_integers
from .passes import Pass
from .plugin import CMIM, Rules, check
from .sampling import advance_draws, new_draws, seeded_generator, upper_half

_EPSILON = 1e-7  # as in the code of CRD (arXiv 1910.10699), which the published code took over


class PublishedCMIM(CMIM):
    """CMIM as we understand its authors' code, for comparison with their figures.

    A separate, pretrained full-precision network gives the other side; the last tap only; negatives from other classes,
    out of a memory bank in which every sample of the training set has an entry for each side::

        cmim = PublishedCMIM(model, example_input, teacher=teacher, targets=torch.tensor(train_set.targets))
        loss = criterion(model(x), y) + cmim(model, indices=indices)  # where the samples stand in the training set

    Written from a description of that code, which was not run beside it: the negatives of an anchor are drawn with
    replacement here. The loss starts large (one term for each negative) and falls within some steps.

    Args:
        model, example_input, teacher, teacher_modules: as for :class:`CMIM`.
        targets: ``(M,)`` integer classes of the training set, in its order.
        taps: as for :class:`CMIM`; None for the last one.
        weight, temperature, embed_dim: as for :class:`CMIM`, with that code's values.
        num_negatives: ``N``, the negatives of each anchor.
        momentum: of the bank: an entry becomes ``momentum * entry + (1 - momentum) * embedding``, of unit length.
        train_heads: False, as published, leaves the heads as they were drawn.

    Raises:
        CMIMError: as for :class:`CMIM`, and for targets that are no classes or of a single class.
    """

    bank: MemoryBank
    _default_taps = slice(-1, None)

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        teacher: nn.Module,
        targets: Tensor,
        teacher_modules: Mapping[str, str] | None = None,
        taps: Collection[str] | None = None,
        weight: float = 3.2,
        num_negatives: int = 4096,
        momentum: float = 0.5,
        temperature: float = 0.1,
        embed_dim: int = 128,
        train_heads: bool = False,
    ) -> None:
        rules: Rules = [
            ("teacher", nn.Module, lambda v: True, "a torch.nn.Module"),
            ("momentum", numbers.Real, lambda v: 0 <= v < 1, "in [0, 1)"),
            ("num_negatives", numbers.Integral, lambda v: v >= 1, "an integer, 1 or more"),
        ]
        check(locals(), rules)
        if not isinstance(targets, Tensor) or targets.ndim != 1 or not holds_integers(targets):
            raise CMIMError("targets must be a tensor of the (M,) integer classes of the training set, in its order.")
        if len(targets.unique()) < 2:
            raise CMIMError("targets has one class only: negatives are drawn from other classes.")
        super().__init__(
            model,
            example_input,
            taps=taps,
            weight=weight,
            instances="image",
            taps_per_step=None,
            objective=NCE(len(targets)),
            temperature=temperature,
            embed_dim=embed_dim,
            heads_lr=3e-3 if train_heads else 0.0,
            teacher=teacher,
            teacher_modules=teacher_modules,
        )
        try:
            self.bank = MemoryBank(self.contrast, targets, num_negatives, momentum)
            self.bank.to(self.heads.weights.device)
        except BaseException:  # out of memory, an interrupt
            self.remove()
            raise
        # CMIM.__init__ did this before there was a bank.
        self._synced = False
        self._sync()

    @classmethod
    def paper(cls, *args: Any, **settings: Any) -> CMIM:
        """Not of this class: raises CMIMError."""
        raise CMIMError("PublishedCMIM is the authors' code. The paper's plain reading is CMIM.paper(...).")

    def forward(self, model: nn.Module, *, indices: Tensor) -> Tensor:  # type: ignore[override]
        """The weighted loss of the model's last forward pass, which is used up by it: 0-d, in nats.

        Args:
            model: as for :class:`CMIM`.
            indices: ``(B,)`` integers, the index of each sample of the batch in the training set.

        Raises:
            CMIMError: as in :meth:`CMIM.forward`, and for indices of another number or outside of the training set.
        """
        captured = self._begin_step(model)
        return self._finish_step(self.bank(self.contrast, captured, indices), captured)


class MemoryBank(nn.Module):
    """An entry for each side of each sample of the training set, and the loss against those of other classes.

    Noise-contrastive (arXiv 1910.10699), the sum over both directions:
    ``L = -1/n sum_i [ log h(i, 0) + sum_{j > 0} log(1 - h(i, j)) ]`` with ``h = p / (p + N/M)`` and
    ``p_ij = exp(s_ij) / Z``. Candidate 0 is the anchor's own entry of the other side; the ``N`` others are negatives.

    The arguments are those of :class:`PublishedCMIM`.
    """

    entries: Tensor  # (taps, 2, M, D), of the binary and of the full-precision side; of unit length once updated
    normalizers: Tensor  # (taps, 2), the constants Z in place of the partition functions: from the first batch
    draws: Tensor  # (N,) int64, states of random sequences: each anchor of a batch advances them once
    targets: Tensor
    order: Tensor  # indices of the samples, sorted by class
    classes: Tensor  # their classes, sorted

    def __init__(self, contrast: Contrast, targets: Tensor, num_negatives: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        generator = seeded_generator(1)  # not that of the heads
        shape = len(contrast.taps), 2, len(targets), contrast.heads.embed_dim
        targets = targets.long().cpu()
        classes, order = targets.sort(stable=True)
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("classes", classes, persistent=False)
        drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        self.register_buffer("entries", (2 * drawn - 1) * (3 / shape[-1]) ** 0.5)
        self.register_buffer("normalizers", torch.zeros(shape[:2], dtype=torch.float32, device="cpu"))
        self.register_buffer("draws", new_draws((num_negatives,), generator))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MemoryBank:
        super()._apply(fn, recurse)
        for name in ("entries", "normalizers"):  # half precision would lose small updates
            buffer = getattr(self, name)
            setattr(self, name, buffer.to(torch.promote_types(buffer.dtype, torch.float32)))
        return self

    def forward(self, contrast: Contrast, captured: Pass, indices: Tensor) -> Tensor:
        """The weighted sum of the losses of all taps, 0-d."""
        indices = self._checked(captured, indices)
        # Passed as labels: embed() gathers them from all ranks and gives each row its own.
        rows = contrast.embed(captured, indices, None)
        total = zero_of(rows)
        for k, (z_b, z_f, of_rows, _) in rows.items():
            if of_rows is not None and len(of_rows):
                # In half precision, exp(s / temperature) would be another number.
                with torch.autocast(z_b.device.type, enabled=False):
                    loss = self._loss(k, z_b, z_f, of_rows, contrast.temperature)
                # One candidate is the anchor's own, the others come out of the bank.
                contrast.last[k] = Last(loss.detach(), 1, len(self.draws))
                total = total + contrast.layer_weights[k] * loss
        return total

    def _checked(self, captured: Pass, indices: Tensor) -> Tensor:
        """The indices, int64, on the device of the bank."""
        is_list = isinstance(indices, Tensor) and indices.ndim == 1
        if not is_list or not holds_integers(indices) or indices.dtype == torch.bool:
            raise CMIMError("indices must be a tensor of (B,) integers: where the samples stand in the training set.")
        indices = indices.to(self.entries.device, torch.int64)
        sizes = [pair.batch_size for pair in captured.pairs.values() if pair.complete]
        if sizes and sizes[0] != len(indices):
            raise CMIMError(f"indices must be one a sample, {sizes[0]} of them; found {len(indices)}.")
        count = len(self.targets)
        if bool(((indices < 0) | (indices >= count)).any()):
            found = f"{int(indices.min())} to {int(indices.max())}"
            raise CMIMError(f"indices must be those of the {count} samples of targets; found {found}.")
        return indices

    def _loss(self, k: int, z_b: Tensor, z_f: Tensor, indices: Tensor, temperature: float) -> Tensor:
        """The loss of one tap; its entries move towards the embeddings."""
        bank, count = self.entries[k], len(self.targets)
        candidates = torch.cat([indices[:, None], self.negatives(indices)], 1)
        noise = len(self.draws) / count
        loss = z_b.new_zeros(())
        for side, anchors in ((1, z_b), (0, z_f)):
            exponentials = (torch.einsum("nd,nkd->nk", anchors, bank[side][candidates]) / temperature).exp()
            if not self.normalizers[k, side]:
                self.normalizers[k, side] = exponentials.detach().mean() * count
            p = exponentials / self.normalizers[k, side].clone()
            positive = (p[:, 0] / (p[:, 0] + noise + _EPSILON)).log()
            negative = (noise / (p[:, 1:] + noise + _EPSILON)).log()
            loss = loss - (positive.sum() + negative.sum()) / len(anchors)
        with torch.no_grad():
            for side, rows in enumerate((z_b, z_f)):
                moved = self.momentum * bank[side, indices] + (1 - self.momentum) * rows
                bank[side, indices] = F.normalize(moved, dim=1)
        return loss

    def negatives(self, indices: Tensor) -> Tensor:
        """``(n, N)``: indices of samples of other classes, drawn with replacement."""
        drawn = []
        for _ in range(len(indices)):
            advance_draws(self.draws)
            drawn.append(upper_half(self.draws))
        own = self.targets[indices][:, None]
        # The samples of the own class are a block of `order`: draw among the others, and skip the block.
        first, end = (torch.searchsorted(self.classes, own, right=right) for right in (False, True))
        place = torch.stack(drawn).remainder(len(self.order) - (end - first))
        return self.order[torch.where(place < first, place, place + end - first)]
