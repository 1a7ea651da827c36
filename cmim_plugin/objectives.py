"""Contrastive objectives: pure functions of two sets of embeddings, and the bound in nats that each gives.

Row ``i`` of ``z_b`` (binary side) and row ``i`` of ``z_f`` (full-precision side) come from the same instance and
form the positive pair; every other row is a negative. The critic is ``s_ij = <z_b^i, z_f^j> / temperature``.
Both directions count: binary anchors against full-precision candidates, and the reverse.
"""

from __future__ import annotations

import math

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
    queue_b: Tensor | None = None,
    queue_f: Tensor | None = None,
    queue_labels: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4), the mean over both directions.

    ``L = -1/n sum_i log( exp(s_ii) / (exp(s_ii) + sum_{j in negatives(i)} exp(s_ij)) )``

    Args:
        z_b, z_f: ``(n, D)`` embeddings, floating point, usually of unit length. float16 and bfloat16 are computed
            in float32, whatever autocast says.
        temperature: divides the inner products.
        labels: ``(n,)`` integers. Pairs with the same label are not negatives. An anchor that has no negative left
            contributes zero.
        queue_b, queue_f: ``(Q, D)`` further candidates, negatives only: ``queue_f`` for binary anchors, ``queue_b``
            for full-precision anchors.
        queue_labels: ``(Q,)`` labels of the queue's entries, -1 for none; needed when both ``labels`` and a queue
            are given.

    Returns:
        The 0-d loss in nats, float32 (float64 for float64 embeddings).

    Raises:
        CMIMError: shapes or dtypes do not fit together, or the temperature is not positive.
    """
    scores = _scores(z_b, z_f, temperature, labels, queue_b, queue_f, queue_labels)
    negatives = None if labels is None else _negatives(scores[0], labels, queue_labels)
    return _mean_of([_info_nce_direction(s, negatives) for s in scores])


def info_nce_bound(loss: Tensor | float, num_negatives: Tensor | int) -> Tensor:
    """Lower bound on the mutual information, in nats: ``I(a_B; a_F) >= log(N + 1) - loss`` (arXiv 1807.03748, eq. 5).

    Args:
        loss: what :func:`info_nce` returned.
        num_negatives: ``N``, one number, or ``(n,)`` a number an anchor (:func:`count_negatives`).

    With label-excluded negatives the candidates are no longer drawn from the marginal, and the figure is a score to
    compare layers and epochs by, not a bound.
    """
    return torch.log1p(torch.as_tensor(num_negatives, dtype=torch.float32)).mean() - loss


def nce(
    z_b: Tensor,
    z_f: Tensor,
    num_samples: int,
    temperature: float = 0.1,
    labels: Tensor | None = None,
    *,
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
        z_b, z_f, temperature, labels, queue_b, queue_f, queue_labels: as in :func:`info_nce`.

    Returns:
        The 0-d loss in nats, float32 (float64 for float64 embeddings).

    Raises:
        CMIMError: as :func:`info_nce`, and when ``num_samples`` is not positive.
    """
    if num_samples <= 0:
        raise CMIMError(f"num_samples must be the number of training samples, a positive number; found {num_samples}.")
    scores = _scores(z_b, z_f, temperature, labels, queue_b, queue_f, queue_labels)
    negatives = _negatives(scores[0], labels, queue_labels)
    return _mean_of([_nce_direction(s, negatives, num_samples) for s in scores])


def nce_bound(loss: Tensor | float, num_negatives: Tensor | int) -> Tensor:
    """Lower bound on the mutual information, in nats: ``I(a_B; a_F) >= log N - loss`` (arXiv 1910.10699, eq. 12).

    Args:
        loss: what :func:`nce` returned.
        num_negatives: ``N``, one number, or ``(n,)`` a number an anchor (:func:`count_negatives`).
    """
    return torch.as_tensor(num_negatives, dtype=torch.float32).clamp_min(1).log().mean() - loss


def count_negatives(n: int, labels: Tensor | None = None, queue_labels: Tensor | None = None, queue: int = 0) -> Tensor:
    """How many negatives each of ``n`` anchors has: ``(n,)`` int64 on the labels' device.

    Args:
        n: anchors in the batch.
        labels: ``(n,)`` integers that exclude same-class pairs, or None.
        queue_labels: ``(queue,)`` labels of the queue, used together with ``labels``.
        queue: entries in the queue.
    """
    if labels is None:
        return torch.full((n,), n - 1 + queue)
    like = torch.empty(n, n + queue, device=labels.device)
    return _negatives(like, labels, queue_labels).sum(1)


def _info_nce_direction(scores: Tensor, negatives: Tensor | None) -> Tensor:
    """``negatives``: which candidates are, None for all but the positive."""
    if negatives is not None:
        candidates = negatives.clone().fill_diagonal_(True)
        scores = scores.masked_fill(~candidates, -math.inf)
    return (scores.logsumexp(1) - scores.diagonal()).mean()


def _nce_direction(scores: Tensor, negatives: Tensor, num_samples: int) -> Tensor:
    count = negatives.sum(1, keepdim=True)
    # An anchor without negatives: N = 0 makes h = 1 and its loss 0, in the limit. The logarithm is not asked for it.
    shifted = scores - (count.clamp_min(1).to(scores.dtype) / num_samples).log()
    positive = F.softplus(-shifted.diagonal()) * (count.squeeze(1) > 0)
    return (positive + (F.softplus(shifted) * negatives).sum(1)).mean()


def _mean_of(directions: list[Tensor]) -> Tensor:
    return torch.stack(directions).mean()


def _scores(
    z_b: Tensor,
    z_f: Tensor,
    temperature: float,
    labels: Tensor | None,
    queue_b: Tensor | None,
    queue_f: Tensor | None,
    queue_labels: Tensor | None,
) -> list[Tensor]:
    """The critic in both directions, each ``(n, n + Q)``: positives on the diagonal."""
    _check(z_b, z_f, temperature, labels, queue_b, queue_f, queue_labels)
    with torch.autocast(z_b.device.type, enabled=False):
        z_b, z_f = (_at_least_float32(z) for z in (z_b, z_f))
        scores = z_b @ z_f.T / temperature
        if queue_b is None or queue_f is None:
            return [scores, scores.T]
        to_queue_f = z_b @ queue_f.to(z_f.dtype).T / temperature
        to_queue_b = z_f @ queue_b.to(z_b.dtype).T / temperature
        return [torch.cat([scores, to_queue_f], 1), torch.cat([scores.T, to_queue_b], 1)]


def _negatives(like: Tensor, labels: Tensor | None, queue_labels: Tensor | None) -> Tensor:
    """Which entries of the scores are negatives: not the diagonal, not the anchor's own class."""
    negatives = torch.ones_like(like, dtype=torch.bool).fill_diagonal_(False)
    if labels is not None:
        # In int64: the queue's -1 would be a class in an unsigned dtype.
        labels = labels.long()
        others = labels if queue_labels is None else torch.cat([labels, queue_labels.long()])
        negatives &= labels[:, None] != others[None, :]
    return negatives


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check(
    z_b: Tensor,
    z_f: Tensor,
    temperature: float,
    labels: Tensor | None,
    queue_b: Tensor | None,
    queue_f: Tensor | None,
    queue_labels: Tensor | None,
) -> None:
    if z_b.ndim != 2 or z_b.shape != z_f.shape:
        raise CMIMError(
            "z_b and z_f must both be (instances, dimensions), row i of one belonging to row i of the other; "
            f"found {tuple(z_b.shape)} and {tuple(z_f.shape)}."
        )
    if not (z_b.is_floating_point() and z_f.is_floating_point()):
        raise CMIMError(f"z_b and z_f must be floating point; found {z_b.dtype} and {z_f.dtype}.")
    if (z_b.dtype == torch.float64) != (z_f.dtype == torch.float64):
        raise CMIMError(f"z_b and z_f must both be float64 or neither; found {z_b.dtype} and {z_f.dtype}.")
    if not len(z_b):
        raise CMIMError("z_b and z_f are empty: there is no instance to contrast.")
    if not temperature > 0:
        raise CMIMError(f"temperature must be positive; found {temperature}.")
    if labels is not None and (labels.shape != z_b.shape[:1] or labels.is_floating_point()):
        raise CMIMError(
            f"labels must be {z_b.shape[0]} integers, one a row; found shape {tuple(labels.shape)}, {labels.dtype}."
        )
    if (queue_b is None) != (queue_f is None):
        raise CMIMError("queue_b and queue_f go together: one serves full-precision anchors, the other binary ones.")
    if queue_b is not None and queue_f is not None:
        if queue_b.shape != queue_f.shape or queue_b.ndim != 2 or queue_b.shape[1] != z_b.shape[1]:
            raise CMIMError(
                f"queue_b and queue_f must both be (entries, {z_b.shape[1]}); "
                f"found {tuple(queue_b.shape)} and {tuple(queue_f.shape)}."
            )
        if labels is not None and (queue_labels is None or queue_labels.shape != queue_b.shape[:1]):
            found = None if queue_labels is None else tuple(queue_labels.shape)
            raise CMIMError(
                f"labels with a queue need queue_labels, {queue_b.shape[0]} integers (-1: no label); found {found}."
            )
