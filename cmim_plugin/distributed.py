"""Several ranks compute the loss that one process would on the whole batch.

Every rank gathers the embeddings of all and computes the same loss from them. The gradient of its own rows is
multiplied by the number of ranks, because DistributedDataParallel and FSDP divide by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _compat


def ranks() -> int:
    """How many processes train together: 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if ranks() > 1 else 0


def start_alike(module: nn.Module, device: torch.device) -> None:
    """Give a module the state that it has on rank 0; ``device``: one that the backend can send from."""
    state = module.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            sent = tensor.detach().to(device).contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)
    module.load_state_dict(state)  # Python numbers such as Queue.filled follow the tensors


def counts_of_all(counts: Sequence[int], device: torch.device) -> tuple[tuple[int, ...], ...]:
    """The counts of every rank. Waits for the device."""
    local = torch.tensor(counts, device=device)
    gathered = local.new_empty(ranks() * len(counts))
    _compat.all_gather(gathered, local)
    return tuple(map(tuple, gathered.view(-1, len(counts)).tolist()))


def gather(rows: Tensor, counts: tuple[tuple[int, ...], ...]) -> Tensor:
    """The rows of all ranks, tap by tap and within a tap rank by rank; ``counts[rank][tap]``: number of rows.
    Gradients go to the rows of this rank, multiplied by the number of ranks."""
    return _Gather.apply(rows, counts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[tuple[int, ...], ...]) -> Tensor:
        order, ctx.own_rows = _order(counts, rank(), rows.device)
        ctx.ranks = len(counts)
        # Collectives want one shape on all ranks: shorter ones are padded, and the order leaves the padding out.
        longest = max(map(sum, counts))
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(len(counts) * longest, *rows.shape[1:])
        _compat.all_gather(gathered, padded)
        return gathered[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own_rows] * ctx.ranks, None


@lru_cache(maxsize=16)
def _order(counts: tuple[tuple[int, ...], ...], this_rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each row of the result lies in the padded rows of all ranks, and which of the result are this rank's."""
    longest = max(map(sum, counts))
    order = [
        rank * longest + sum(rank_counts[:tap]) + i
        for tap in range(len(counts[0]))
        for rank, rank_counts in enumerate(counts)
        for i in range(rank_counts[tap])
    ]
    own_rows = [i for i, place in enumerate(order) if place // longest == this_rank]
    # With the dtype: an empty list would make floats.
    return torch.tensor(order, dtype=torch.long, device=device), torch.tensor(own_rows, dtype=torch.long, device=device)


def averaged(parameters: Tensor) -> Tensor:
    """The same parameters; backward averages their gradient over all ranks."""
    return _Average.apply(parameters)


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameters: Tensor) -> Tensor:
        return parameters.view_as(parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad / ranks()
