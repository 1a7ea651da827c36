"""A FIFO queue of past embeddings, negatives beyond the batch, without a dataset index (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NO_LABEL = -1


class Queue(nn.Module):
    """The last ``size`` embedding pairs of one tap, with their labels. It is used as far as it is filled."""

    embeddings_b: Tensor
    embeddings_f: Tensor
    labels: Tensor
    pushed: Tensor

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings_b", torch.zeros(size, embed_dim, dtype=torch.float32, device="cpu"))
        self.register_buffer("embeddings_f", torch.zeros(size, embed_dim, dtype=torch.float32, device="cpu"))
        self.register_buffer("labels", torch.full((size,), NO_LABEL, device="cpu"))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device="cpu"))
        #: Entries in the queue. A number, for shapes; one that stops changing, for torch.compile.
        self.filled = 0

    def contents(self) -> tuple[Tensor, Tensor, Tensor]:
        """The embeddings of both sides, ``(Q, D)``, and the labels, ``(Q,)``: views, which :meth:`push` overwrites."""
        return self.embeddings_b[: self.filled], self.embeddings_f[: self.filled], self.labels[: self.filled]

    @torch.no_grad()
    def push(self, z_b: Tensor, z_f: Tensor, labels: Tensor | None) -> None:
        """Put a batch ``(n, D)`` in, the oldest entries out. NaN becomes zero, for the losses of later batches."""
        size = len(self.labels)
        z_b, z_f = z_b[-size:], z_f[-size:]
        at = (self.pushed + torch.arange(len(z_b), device=self.labels.device)) % size
        self.embeddings_b[at] = z_b.to(self.embeddings_b.dtype).nan_to_num()
        self.embeddings_f[at] = z_f.to(self.embeddings_f.dtype).nan_to_num()
        if labels is None:
            self.labels.index_fill_(0, at, NO_LABEL)  # ``self.labels[at] = NO_LABEL`` copies from the host
        else:
            self.labels[at] = labels[-size:].to(self.labels.dtype)
        self.pushed += len(z_b)
        self.filled = min(self.filled + len(z_b), size)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self.filled = min(int(self.pushed), len(self.labels))
