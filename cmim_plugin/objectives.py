"""Contrastive objectives: the loss of two sets of embeddings, and the lower bound in nats that it gives.

Row ``i`` of ``z_b`` (binary side) and row ``i`` of ``z_f`` (full-precision side) come from the same instance and
form the positive pair; the other rows are negatives, unless labels or a mask exclude them. The critic is
``s_ij = <z_b^i, z_f^j> / temperature``.
Both directions count: binary anchors against full-precision candidates, and the reverse.

Dimensions before the last two are independent problems: several taps in one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CMIMError


class _Objective:
    """The mean over both directions and all anchors of minus a log-likelihood, which the subclasses define."""

    def __call__(
        self,
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
        """The loss of embeddings of both sides.

        Args:
            z_b, z_f: ``(..., n, D)`` embeddings, floating point, usually of unit length. float16 and bfloat16 are
                computed in float32, whatever autocast says.
            temperature: divides the inner products.
            labels: ``(..., n)`` integers. Candidates with the label of the anchor are not its negatives; below zero is
                no label. An anchor that has no negative left contributes zero.
            mask: ``(..., n)`` bool, False for rows that are neither anchors nor negatives (padding).
            queue_b, queue_f: ``(..., Q, D)`` further candidates, negatives only: ``queue_f`` for binary anchors,
                ``queue_b`` for full-precision anchors.
            queue_labels: ``(..., Q)`` labels of the queue's entries, needed with both ``labels`` and a queue.

        Returns:
            The loss in nats, ``(...)`` (0-d for two-dimensional embeddings), float32 (float64 for float64 embeddings).

        Raises:
            CMIMError: shapes or dtypes do not fit together, or the temperature is not positive.
        """
        _check(z_b, z_f, temperature, labels, mask)
        if queue_b is not None or queue_f is not None:
            _check_queue(tuple(z_b.shape), labels, queue_b, queue_f, queue_labels)
        n, negatives = z_b.shape[-2], None
        if labels is not None or mask is not None:
            queued = 0 if queue_b is None else queue_b.shape[-2]
            negatives = _negatives(n, labels, queue_labels, queued, mask)
        with torch.autocast(z_b.device.type, enabled=False):
            z_b, z_f = (z if z.dtype == torch.float64 else z.float() for z in (z_b, z_f))
            towards_f = z_b / temperature @ z_f.mT
            scores = torch.stack([towards_f, towards_f.mT])
            if queue_b is not None and queue_f is not None:
                queue_b, queue_f = queue_b.to(scores.dtype), queue_f.to(scores.dtype)
                queue_scores = torch.stack([z_b / temperature @ queue_f.mT, z_f / temperature @ queue_b.mT])
                scores = torch.cat([scores, queue_scores], -1)
            likelihoods = self._log_likelihoods(scores, negatives)
            if mask is None:
                return likelihoods.sum((0, -1)) / (-2 * n)
            return likelihoods.masked_fill(~mask, 0).sum((0, -1)) / (-2 * mask.sum(-1).clamp_min(1))

    def _log_likelihoods(self, scores: Tensor, negatives: Tensor | None) -> Tensor:
        """The log-likelihood of each anchor, ``(..., n)``, from its scores with all candidates,
        ``(..., n, n + Q)``, positives on the diagonal. ``negatives``: bool, which are negatives; None: all others."""
        raise NotImplementedError


@dataclass(frozen=True)
class InfoNCE(_Objective):
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4), the mean over both directions.

    ``L = -1/n sum_i log( exp(s_ii) / (exp(s_ii) + sum_{j in negatives(i)} exp(s_ij)) )``
    """

    def _log_likelihoods(self, scores: Tensor, negatives: Tensor | None) -> Tensor:
        if negatives is not None:
            positives = torch.eye(*scores.shape[-2:], dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(~(negatives | positives), -math.inf)
        # One kernel forward and one backward; logsumexp takes several.
        return scores.log_softmax(-1).diagonal(0, -2, -1)

    def bound(self, loss: Tensor | float, num_negatives: Tensor | int) -> Tensor:
        """Lower bound on the mutual information in nats: ``I(a_B; a_F) >= log(N + 1) - loss`` (1807.03748, sec. 2.3).

        Args:
            loss: as it was returned.
            num_negatives: ``N``, one number, or ``(..., n)``, one for each anchor (:func:`count_negatives`).

        With label-excluded negatives the candidates are no longer drawn from the marginal, and the figure is a score to
        compare layers and epochs by, not a bound.
        """
        return torch.log1p(_float32(num_negatives)).mean() - loss


@dataclass(frozen=True)
class NCE(_Objective):
    """Noise-contrastive objective of CMIM (arXiv 2207.02970, after CRD, arXiv 1910.10699), mean over both directions.

    ``L = -1/n sum_i [ log h(i, i) + sum_{j in negatives(i)} log(1 - h(i, j)) ]`` with
    ``h(i, j) = exp(s_ij) / (exp(s_ij) + N_i / M)``, ``N_i`` negatives of anchor ``i`` and ``M = num_samples``.

    The form is written from memory of the two papers and was not compared with their text; the constant by which the
    published code divides ``exp(s)`` is left out.

    Args:
        num_samples: ``M``, the number of samples in the training set.

    Raises:
        CMIMError: ``num_samples`` is not positive.
    """

    num_samples: int

    def __post_init__(self) -> None:
        if self.num_samples <= 0:
            raise CMIMError(f"num_samples must be a positive number, of the training set; found {self.num_samples}.")

    def _log_likelihoods(self, scores: Tensor, negatives: Tensor | None) -> Tensor:
        if negatives is None:
            negatives = ~torch.eye(*scores.shape[-2:], dtype=torch.bool, device=scores.device)
        count = negatives.sum(-1, keepdim=True)
        # An anchor without negatives: h = 1 in the limit, and its loss is 0. The logarithm of 0 would be infinite.
        shifted = scores - (count.clamp_min(1).to(scores.dtype) / self.num_samples).log()
        positive = F.logsigmoid(shifted.diagonal(0, -2, -1)) * (count.squeeze(-1) > 0)
        return positive + (F.logsigmoid(-shifted) * negatives).sum(-1)

    def bound(self, loss: Tensor | float, num_negatives: Tensor | int) -> Tensor:
        """Lower bound on the mutual information, in nats: ``I(a_B; a_F) >= log N - loss`` (arXiv 1910.10699).

        The arguments are those of :meth:`InfoNCE.bound`.
        """
        return _float32(num_negatives).clamp_min(1).log().mean() - loss


def count_negatives(
    n: int, labels: Tensor | None = None, queue_labels: Tensor | None = None, queue: int = 0, mask: Tensor | None = None
) -> Tensor:
    """How many negatives each of ``n`` anchors has: int64, ``(n,)``, or shaped like ``labels`` and on their device.

    Args:
        n: anchors in the batch.
        labels: ``(..., n)`` integers that exclude same-class pairs, or None.
        queue_labels: ``(..., queue)`` labels of the queue, used together with ``labels``.
        queue: entries in the queue.
        mask: ``(..., n)`` bool, False for rows that do not count.
    """
    return _negatives(n, labels, queue_labels, queue, mask).sum(-1)


def _negatives(n: int, labels: Tensor | None, queue_labels: Tensor | None, queued: int, mask: Tensor | None) -> Tensor:
    """Which candidates are negatives of which anchors, ``(..., n, n + queued)`` bool: not its own pair, not its own
    class, nothing that is masked."""
    given = mask if labels is None else labels
    negatives = ~torch.eye(n, n + queued, dtype=torch.bool, device="cpu" if given is None else given.device)
    if labels is not None:
        labels = labels.long()  # unsigned ones do not compare with the queue's -1
        candidates = labels if queue_labels is None else torch.cat([labels, queue_labels], -1)
        anchors = labels[..., None]
        negatives = negatives & ((anchors != candidates[..., None, :]) | (anchors < 0))
    if mask is not None:
        valid = torch.cat([mask, mask.new_ones(*mask.shape[:-1], queued)], -1)
        negatives = negatives & valid[..., None, :]
    return negatives


def holds_integers(tensor: Tensor) -> bool:
    """Whether a tensor holds integers or booleans."""
    return not tensor.is_floating_point() and not tensor.is_complex()


def _float32(numbers: Tensor | int) -> Tensor:
    # Not as_tensor: it moves a tensor to the default device.
    return numbers.float() if isinstance(numbers, Tensor) else torch.tensor(float(numbers), device="cpu")


def _check(z_b: Tensor, z_f: Tensor, temperature: float, labels: Tensor | None, mask: Tensor | None) -> None:
    shape, dtypes = tuple(z_b.shape), {z_b.dtype, z_f.dtype}
    if z_b.ndim < 2 or z_b.shape != z_f.shape:
        raise CMIMError(f"z_b and z_f must both be (..., instances, dimensions); found {shape} and {tuple(z_f.shape)}.")
    if shape[-2] == 0:  # not its truth value: torch.compile of torch 2.6 would take the size for a constant
        raise CMIMError("z_b and z_f are empty: there is no instance to contrast.")
    if not all(dtype.is_floating_point for dtype in dtypes) or (torch.float64 in dtypes and len(dtypes) > 1):
        found = f"{z_b.dtype} and {z_f.dtype}"
        raise CMIMError(f"z_b and z_f must both be float64 or neither, and floating point; found {found}.")
    if not temperature > 0:
        raise CMIMError(f"temperature must be positive; found {temperature}.")
    if labels is not None and (labels.shape != shape[:-1] or not holds_integers(labels)):
        found = f"shape {tuple(labels.shape)}, {labels.dtype}"
        raise CMIMError(f"labels must be integers of shape {shape[:-1]}, one a row; found {found}.")
    if mask is not None and (mask.shape != shape[:-1] or mask.dtype != torch.bool):
        found = f"shape {tuple(mask.shape)}, {mask.dtype}"
        raise CMIMError(f"mask must be bool of shape {shape[:-1]}, one a row; found {found}.")


def _check_queue(shape: tuple[int, ...], labels: Tensor | None, *queue: Tensor | None) -> None:
    """``shape``: of the embeddings; ``queue``: queue_b, queue_f and queue_labels."""
    shape_b, shape_f, shape_labels = (None if t is None else tuple(t.shape) for t in queue)
    entries = (*shape[:-2], shape_b[-2] if shape_b and len(shape_b) > 1 else "entries")
    if shape_b != shape_f or shape_f != (*entries, shape[-1]):
        wanted = ", ".join(map(str, (*shape[:-2], "entries", shape[-1])))
        raise CMIMError(f"queue_b and queue_f go together, both ({wanted}); found {shape_b} and {shape_f}.")
    if labels is not None and shape_labels != entries:
        wanted = f"integers of shape {entries} (below zero: no label)"
        raise CMIMError(f"labels with a queue need queue_labels, {wanted}; found {shape_labels}.")
