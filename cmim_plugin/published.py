"""The variant that the code published with the paper runs: teacher, last layer, memory bank indexed by the sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cmim import CMIM, _Group
from .errors import CMIMError
from .objectives import nce

# As in the code of CRD (arXiv 1910.10699), which the published code took over.
_EPSILON = 1e-7


def bank_nce(anchors: Tensor, candidates: Tensor, num_samples: int, temperature: float, normalizer: Tensor) -> Tensor:
    """Noise-contrastive loss of anchors against entries of a memory bank, one direction (arXiv 1910.10699, eq. 9, 18).

    ``L = -1/n sum_i [ log h(i, 0) + sum_{j > 0} log(1 - h(i, j)) ]`` with ``h = p / (p + N/M)`` and
    ``p_ij = exp(s_ij) / normalizer``.

    Args:
        anchors: ``(n, D)`` unit rows.
        candidates: ``(n, 1 + N, D)`` unit rows; the first is the anchor's own entry.
        num_samples: ``M``, entries in the bank.
        temperature: divides the inner products.
        normalizer: 0-d, the constant that stands in for the partition function.

    Returns:
        0-d loss in nats.
    """
    p = (torch.einsum("nd,nkd->nk", anchors, candidates) / temperature).exp() / normalizer
    noise = (candidates.shape[1] - 1) / num_samples
    positive = (p[:, 0] / (p[:, 0] + noise + _EPSILON)).log()
    negative = (noise / (p[:, 1:] + noise + _EPSILON)).log()
    return -(positive.sum() + negative.sum()) / len(anchors)


class PublishedCMIM(CMIM):
    """CMIM as we understand its authors' code, for comparison with their figures.

    A separate, pretrained full-precision network gives the other side; the last tap only; negatives from other classes,
    out of a memory bank of both sides' embeddings that every sample of the training set has an entry in::

        cmim = PublishedCMIM(model, example_input, teacher=teacher, targets=torch.tensor(train_set.targets))
        loss = criterion(model(x), y) + cmim(model, indices)  # where the samples stand in the training set

    Written from a description of that code, which was not run beside it: the negatives of an anchor are drawn with
    replacement here. The loss starts large (one term for each negative) and falls within some steps. With frozen heads
    there is nothing of it for an optimizer.

    Args:
        model, example_input: as for :class:`CMIM`.
        teacher, teacher_modules: as for :class:`CMIM`.
        targets: ``(M,)`` integer classes of the training set, in its order.
        taps: as for :class:`CMIM`; None for the last one.
        weight, temperature, embed_dim: as for :class:`CMIM`, with that code's values.
        num_negatives: ``N``.
        momentum: of the bank: an entry becomes ``momentum * entry + (1 - momentum) * embedding``, of unit length.
        train_heads: False, as published, leaves the heads as they were drawn.

    Raises:
        CMIMError: as for :class:`CMIM`, and for targets that are no classes or of a single class.
    """

    order: Tensor
    first: Tensor
    size: Tensor
    targets: Tensor
    banks: Tensor
    normalizers: Tensor
    _unless_told = slice(-1, None)

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
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            raise CMIMError("targets must be the (M,) integer classes of the training set, in its order.")
        if len(targets.unique()) < 2:
            raise CMIMError("targets has one class only: negatives are drawn from other classes.")
        if not 0 <= momentum < 1:
            raise CMIMError(f"momentum must be in [0, 1); found {momentum!r}.")
        if not isinstance(num_negatives, int) or num_negatives < 1:
            raise CMIMError(f"num_negatives must be an integer, 1 or more; found {num_negatives!r}.")
        super().__init__(
            model,
            example_input,
            taps=taps,
            weight=weight,
            instances="image",
            taps_per_step=None,
            objective=partial(nce, num_samples=len(targets)),
            temperature=temperature,
            embed_dim=embed_dim,
            teacher=teacher,
            teacher_modules=teacher_modules,
        )
        self.num_negatives = num_negatives
        self.momentum = momentum
        self.heads.requires_grad_(train_heads)
        with torch.device("cpu"):
            classes, targets = targets.cpu().unique(return_inverse=True)
            # The samples class by class, and where each class begins in that order.
            order = targets.argsort(stable=True)
            size = targets.bincount(minlength=len(classes))
            bound = (3 / embed_dim) ** 0.5
            drawn = torch.rand(len(self.taps), 2, len(targets), embed_dim, generator=self._generator)
            self.register_buffer("banks", (2 * drawn - 1) * bound)
            self.register_buffer("normalizers", torch.zeros(len(self.taps), 2))
            for name, tensor in (
                ("order", order),
                ("first", size.cumsum(0) - size),
                ("size", size),
                ("targets", targets),
            ):
                self.register_buffer(name, tensor, persistent=False)
        self.to(self._device)
        self._draw()

    def forward(self, model: nn.Module, labels: Tensor | None = None) -> Tensor:
        """The weighted loss of the model's last forward pass, which is used up by it.

        Args:
            model: as for :class:`CMIM`.
            labels: ``(B,)`` integers: not classes (which would pass, as indices), but *where each sample
                stands in the training set*.
        """
        if labels is None:
            raise CMIMError("PublishedCMIM needs the samples' indices in the training set: cmim(model, indices).")
        return super().forward(model, labels)

    def _losses(self, taps: list[int], z_b: Tensor, z_f: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        # Scores in half precision, divided by the temperature and exponentiated, would be others.
        with torch.autocast(z_b.device.type, enabled=False):
            losses = torch.stack([self._bank_loss(k, z_b[i], z_f[i], labels[i]) for i, k in enumerate(taps)])
        self._note(_Group(taps, losses.detach(), 1, self.num_negatives, None, None))
        return losses

    def _bank_loss(self, k: int, z_b: Tensor, z_f: Tensor, indices: Tensor) -> Tensor:
        if int(indices.min()) < 0 or int(indices.max()) >= len(self.targets):
            found = f"{int(indices.min())} to {int(indices.max())}"
            raise CMIMError(f"indices must be those of the {len(self.targets)} samples of targets; found {found}.")
        bank = self.banks[k]
        chosen = torch.cat([indices[:, None], self._negatives(indices)], 1)
        loss = z_b.new_zeros(())
        for side, anchors in ((1, z_b), (0, z_f)):
            candidates = bank[side][chosen]
            if not self.normalizers[k, side]:
                with torch.no_grad():
                    scores = torch.einsum("nd,nkd->nk", anchors, candidates) / self.temperature
                    self.normalizers[k, side] = scores.exp().mean() * len(self.targets)
            normalizer = self.normalizers[k, side].clone()
            loss = loss + bank_nce(anchors, candidates, len(self.targets), self.temperature, normalizer)
        with torch.no_grad():
            for side, rows in enumerate((z_b, z_f)):
                bank[side, indices] = F.normalize(
                    self.momentum * bank[side, indices] + (1 - self.momentum) * rows, dim=1
                )
        return loss

    def _negatives(self, indices: Tensor) -> Tensor:
        """Samples of other classes, ``(n, N)``."""
        own = self.targets[indices]
        first, size = self.first[own][:, None], self.size[own][:, None]
        draws = torch.rand(len(indices), self.num_negatives, generator=self._generator, device="cpu")
        others = len(self.targets) - size
        place = torch.minimum((draws.to(indices.device, torch.float64) * others).long(), others - 1)
        return self.order[torch.where(place < first, place, place + size)]
