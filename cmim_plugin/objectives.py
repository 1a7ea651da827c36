"""Contrastive objectives: pure functions of two sets of embeddings, and the bound in nats that each gives.

Row ``i`` of ``z_b`` (binary side) and row ``i`` of ``z_f`` (full-precision side) come from the same instance and
form the positive pair; every other row is a negative. The critic is ``s_ij = <z_b^i, z_f^j> / temperature``.
Both directions count: binary anchors against full-precision candidates, and the reverse.

Dimensions before the last two are problems of their own, side by side: several taps in one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CMIMError


def info_nce(
    z_b: Tensor,
    z_f: Tensor,
    temperature: float = 0.1,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    queue_b: Tensor | None = None,
    queue_f: Tensor | None = None,
    queue_labels: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4), the mean over both directions.

    ``L = -1/n sum_i log( exp(s_ii) / (exp(s_ii) + sum_{j in negatives(i)} exp(s_ij)) )``

    Args:
        z_b, z_f: ``(..., n, D)`` embeddings, floating point, usually of unit length. float16 and bfloat16 are computed
            in float32, whatever autocast says.
        temperature: divides the inner products.
        labels: ``(..., n)`` integers. Pairs with the same label are not negatives; below zero is no label. An anchor
            that has no negative left contributes zero.
        mask: ``(..., n)`` bool, False for rows that are neither anchors nor negatives (padding).
        queue_b, queue_f: ``(..., Q, D)`` further candidates, negatives only: ``queue_f`` for binary anchors,
            ``queue_b`` for full-precision anchors.
        queue_labels: ``(..., Q)`` labels of the queue's entries; needed when both ``labels`` and a queue
            are given.

    Returns:
        The loss in nats, ``(...)`` (0-d for two-dimensional embeddings), float32 (float64 for float64 embeddings).

    Raises:
        CMIMError: shapes or dtypes do not fit together, or the temperature is not positive.
    """
    return _both_directions(_info_nce_rows, z_b, z_f, temperature, labels, mask, queue_b, queue_f, queue_labels)


def info_nce_bound(loss: Tensor | float, num_negatives: Tensor | int) -> Tensor:
    """Lower bound on the mutual information, in nats: ``I(a_B; a_F) >= log(N + 1) - loss`` (arXiv 1807.03748, eq. 5).

    Args:
        loss: what :func:`info_nce` returned.
        num_negatives: ``N``, one number, or ``(..., n)`` a number an anchor (:func:`count_negatives`).

    With label-excluded negatives the candidates are no longer drawn from the marginal, and the figure is a score to
    compare layers and epochs by, not a bound.
    """
    return torch.log1p(_float32(num_negatives)).mean() - loss


def nce(
    z_b: Tensor,
    z_f: Tensor,
    num_samples: int,
    temperature: float = 0.1,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    queue_b: Tensor | None = None,
    queue_f: Tensor | None = None,
    queue_labels: Tensor | None = None,
) -> Tensor:
    """Noise-contrastive objective of CMIM (arXiv 2207.02970, after CRD, arXiv 1910.10699), mean over both directions.

    ``L = -1/n sum_i [ log h(i, i) + sum_{j in negatives(i)} log(1 - h(i, j)) ]`` with
    ``h(i, j) = exp(s_ij) / (exp(s_ij) + N_i / M)``, ``N_i`` negatives of anchor ``i`` and ``M = num_samples``.

    The form is written from memory of the two papers and was not compared with their text; the constant by which the
    published code divides ``exp(s)`` is left out.

    Args:
        num_samples: ``M``, the number of samples in the training set.
        z_b, z_f, temperature, labels, mask, queue_b, queue_f, queue_labels: as in :func:`info_nce`.

    Returns:
        The loss in nats, shaped as by :func:`info_nce`.

    Raises:
        CMIMError: as :func:`info_nce`, and when ``num_samples`` is not positive.
    """
    if num_samples <= 0:
        raise CMIMError(f"num_samples must be the number of training samples, a positive number; found {num_samples}.")
    rows = partial(_nce_rows, num_samples=num_samples)
    return _both_directions(rows, z_b, z_f, temperature, labels, mask, queue_b, queue_f, queue_labels)


def nce_bound(loss: Tensor | float, num_negatives: Tensor | int) -> Tensor:
    """Lower bound on the mutual information, in nats: ``I(a_B; a_F) >= log N - loss`` (arXiv 1910.10699, eq. 12).

    Args:
        loss: what :func:`nce` returned.
        num_negatives: ``N``, one number, or ``(..., n)`` a number an anchor (:func:`count_negatives`).
    """
    return _float32(num_negatives).clamp_min(1).log().mean() - loss


@dataclass(frozen=True)
class InfoNCE:
    """:func:`info_nce` as an objective that carries its bound."""

    def __call__(self, z_b: Tensor, z_f: Tensor, **settings: Any) -> Tensor:
        """The loss in nats."""
        return info_nce(z_b, z_f, **settings)

    def bound(self, loss: Tensor, num_negatives: Tensor) -> Tensor:
        """:func:`info_nce_bound`."""
        return info_nce_bound(loss, num_negatives)


@dataclass(frozen=True)
class NCE:
    """:func:`nce` as an objective that carries its bound.

    Args:
        num_samples: images in the training set.
    """

    num_samples: int

    def __call__(self, z_b: Tensor, z_f: Tensor, **settings: Any) -> Tensor:
        """The loss in nats."""
        return nce(z_b, z_f, self.num_samples, **settings)

    def bound(self, loss: Tensor, num_negatives: Tensor) -> Tensor:
        """:func:`nce_bound`."""
        return nce_bound(loss, num_negatives)


def count_negatives(
    n: int,
    labels: Tensor | None = None,
    queue_labels: Tensor | None = None,
    queue: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """How many negatives each of ``n`` anchors has: int64, ``(n,)``, or shaped like ``labels`` and on their device.

    Args:
        n: anchors in the batch.
        labels: ``(..., n)`` integers that exclude same-class pairs, or None.
        queue_labels: ``(..., queue)`` labels of the queue, used together with ``labels``.
        queue: entries in the queue.
        mask: ``(..., n)`` bool, False for rows that do not count.
    """
    if labels is None and mask is None:
        return torch.full((n,), n - 1 + queue, device="cpu")
    device = labels.device if labels is not None else mask.device  # type: ignore[union-attr]
    return _negatives(n, queue, labels, mask, queue_labels, device).sum(-1)


def _info_nce_rows(scores: Tensor, negatives: Tensor | None) -> Tensor:
    """The log-likelihood of each anchor, ``(..., n)``, from its scores, ``(..., n, n + Q)``.

    ``negatives``: which candidates are, None for all but the positive.
    """
    if negatives is not None:
        candidates = negatives.clone()
        candidates.diagonal(0, -2, -1).fill_(True)
        scores = scores.masked_fill(~candidates, -math.inf)
    # A fused kernel in both passes, unlike logsumexp.
    return scores.log_softmax(-1).diagonal(0, -2, -1)


def _nce_rows(scores: Tensor, negatives: Tensor | None, num_samples: int) -> Tensor:
    if negatives is None:
        n, candidates = scores.shape[-2:]
        negatives = _negatives(n, candidates - n, None, None, None, scores.device)
    count = negatives.sum(-1, keepdim=True)
    # An anchor without negatives: N = 0 makes h = 1 and its loss 0, in the limit. The logarithm is not asked for it.
    shifted = scores - (count.clamp_min(1).to(scores.dtype) / num_samples).log()
    positive = F.logsigmoid(shifted.diagonal(0, -2, -1)) * (count.squeeze(-1) > 0)
    return positive + (F.logsigmoid(-shifted) * negatives).sum(-1)


def _both_directions(
    row_likelihoods: Callable[[Tensor, Tensor | None], Tensor],
    z_b: Tensor,
    z_f: Tensor,
    temperature: float,
    labels: Tensor | None,
    mask: Tensor | None,
    queue_b: Tensor | None,
    queue_f: Tensor | None,
    queue_labels: Tensor | None,
) -> Tensor:
    """Minus the mean of ``row_likelihoods`` over the anchors of both sides, which are one call."""
    _check(z_b, z_f, temperature, labels, mask, queue_b, queue_f, queue_labels)
    negatives = None
    if labels is not None or mask is not None:
        queue = 0 if queue_b is None else queue_b.shape[-2]
        negatives = _negatives(z_b.shape[-2], queue, labels, mask, queue_labels, z_b.device)
    with torch.autocast(z_b.device.type, enabled=False):
        z_b, z_f = (_at_least_float32(z) for z in (z_b, z_f))
        scores = z_b / temperature @ z_f.mT
        both = torch.stack([scores, scores.mT])
        if queue_b is not None and queue_f is not None:
            towards_f, towards_b = (q.to(scores.dtype).mT for q in (queue_f, queue_b))
            queued = torch.stack([z_b / temperature @ towards_f, z_f / temperature @ towards_b])
            both = torch.cat([both, queued], -1)
        likelihoods = row_likelihoods(both, negatives)
        if mask is None:
            return likelihoods.sum((0, -1)) / (-2 * z_b.shape[-2])
        return likelihoods.masked_fill(~mask, 0).sum((0, -1)) / (-2 * mask.sum(-1).clamp_min(1))


def _negatives(
    n: int,
    queue: int,
    labels: Tensor | None,
    mask: Tensor | None,
    queue_labels: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which candidates are negatives of which anchors: ``(..., n, n + queue)``.

    Not the anchor's own pair, not its own class, and nothing that is masked.
    """
    negatives = ~torch.eye(n, n + queue, dtype=torch.bool, device=device)
    if labels is not None:
        # In int64: the queue's -1 would be a class in an unsigned dtype.
        labels = labels.long()
        others = labels if queue_labels is None else torch.cat([labels, queue_labels.long()], -1)
        anchor = labels[..., None]
        negatives = negatives & ((anchor != others[..., None, :]) | (anchor < 0))
    if mask is not None:
        counts = mask if not queue else torch.cat([mask, mask.new_ones(*mask.shape[:-1], queue)], -1)
        negatives = negatives & counts[..., None, :]
    return negatives


def _float32(numbers: Tensor | int) -> Tensor:
    # Not as_tensor: it moves a tensor to the default device.
    return numbers.float() if isinstance(numbers, Tensor) else torch.tensor(float(numbers), device="cpu")


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check(
    z_b: Tensor,
    z_f: Tensor,
    temperature: float,
    labels: Tensor | None,
    mask: Tensor | None,
    queue_b: Tensor | None,
    queue_f: Tensor | None,
    queue_labels: Tensor | None,
) -> None:
    if z_b.ndim < 2 or z_b.shape != z_f.shape:
        raise CMIMError(
            "z_b and z_f must both be (..., instances, dimensions), row i of one belonging to row i of the other; "
            f"found {tuple(z_b.shape)} and {tuple(z_f.shape)}."
        )
    if not (z_b.is_floating_point() and z_f.is_floating_point()):
        raise CMIMError(f"z_b and z_f must be floating point; found {z_b.dtype} and {z_f.dtype}.")
    if (z_b.dtype == torch.float64) != (z_f.dtype == torch.float64):
        raise CMIMError(f"z_b and z_f must both be float64 or neither; found {z_b.dtype} and {z_f.dtype}.")
    if not z_b.shape[-2]:
        raise CMIMError("z_b and z_f are empty: there is no instance to contrast.")
    if not temperature > 0:
        raise CMIMError(f"temperature must be positive; found {temperature}.")
    if labels is not None and (labels.shape != z_b.shape[:-1] or labels.is_floating_point()):
        raise CMIMError(
            f"labels must be integers of shape {tuple(z_b.shape[:-1])}, one a row; "
            f"found shape {tuple(labels.shape)}, {labels.dtype}."
        )
    if mask is not None and (mask.shape != z_b.shape[:-1] or mask.dtype != torch.bool):
        raise CMIMError(
            f"mask must be bool of shape {tuple(z_b.shape[:-1])}, one a row; "
            f"found shape {tuple(mask.shape)}, {mask.dtype}."
        )
    if (queue_b is None) != (queue_f is None):
        raise CMIMError("queue_b and queue_f go together: one serves full-precision anchors, the other binary ones.")
    if queue_b is not None and queue_f is not None:
        fits = queue_b.ndim > 1 and queue_b.shape == (*z_b.shape[:-2], queue_b.shape[-2], z_b.shape[-1])
        if not fits or queue_b.shape != queue_f.shape:
            wanted = ", ".join(map(str, (*z_b.shape[:-2], "entries", z_b.shape[-1])))
            raise CMIMError(
                f"queue_b and queue_f must both be ({wanted}); found {tuple(queue_b.shape)} and {tuple(queue_f.shape)}."
            )
        if labels is not None and (queue_labels is None or queue_labels.shape != queue_b.shape[:-1]):
            found = None if queue_labels is None else tuple(queue_labels.shape)
            raise CMIMError(
                f"labels with a queue need queue_labels, integers of shape {tuple(queue_b.shape[:-1])} "
                f"(below zero: no label); found {found}."
            )
