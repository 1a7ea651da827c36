"""A FIFO queue of past embeddings, negatives beyond the batch, without a dataset index (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NO_LABEL = -1


class Queue(nn.Module):
    """The last ``size`` embedding pairs of one tap, with their labels. Only the filled part is used."""

    embeddings: Tensor  # (2, size, D): of a_B, of a_F
    labels: Tensor  # (size,) int64, NO_LABEL for none
    pushed: Tensor  # entries ever pushed, 0-d int64

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(2, size, embed_dim, dtype=torch.float32, device="cpu"))
        self.register_buffer("labels", torch.full((size,), NO_LABEL, device="cpu"))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device="cpu"))
        #: Entries in use, at most size. A Python int, because it is a shape; torch.compile settles once it is full.
        self.filled = 0

    @torch.no_grad()
    def push(self, z: Tensor, labels: Tensor | None) -> None:
        """Replace the oldest entries by a batch ``(2, n, D)``. NaN becomes zero: it would spoil later losses."""
        size = len(self.labels)
        z = z[:, -size:]
        count = z.shape[1]
        at = (self.pushed + torch.arange(count, device=self.labels.device)) % size
        self.embeddings[:, at] = z.to(self.embeddings.dtype).nan_to_num()
        if labels is None:
            self.labels.index_fill_(0, at, NO_LABEL)  # ``self.labels[at] = NO_LABEL`` copies from the host
        else:
            self.labels[at] = labels[-size:].to(self.labels.dtype)
        self.pushed += count
        self.filled = min(self.filled + count, size)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self.filled = min(int(self.pushed), len(self.labels))
