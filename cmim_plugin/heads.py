"""Embedding heads: linear, then unit length. One for each side of each tap, trained together with the network."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Where the projection is (almost) zero, dividing by its length would blow its gradient up.
_SHORTEST = 1e-6


class Heads(nn.ModuleDict):
    """The heads of all taps. Those that read as many channels are one linear layer, ``embed_dim`` outputs each.

    The arithmetic of a head is small beside what each call and each parameter costs (an optimizer's step, a gradient
    that arrives), so both go by the number of widths and not by that of taps.

    Args:
        channels: of both sides of each tap, a_B first, then a_F (or the teacher's activation).
        embed_dim: outputs of a head.
    """

    def __init__(self, channels: Sequence[tuple[int, int]], embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        count: Counter[int] = Counter()
        #: For both sides of each tap: the layer, by its width, and which of the heads in it.
        self.places: list[list[tuple[str, int]]] = []
        for pair in channels:
            self.places.append([])
            for width in pair:
                self.places[-1].append((str(width), count[width]))
                count[width] += 1
        self.update({str(width): nn.Linear(width, heads * embed_dim) for width, heads in count.items()})

    def of(self, tap: int, parameters: Sequence[Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
        """``(D, C)`` weight and ``(D,)`` bias of both sides of a tap, views: to look at, or to set, single heads.

        Of this module's parameters, or of what stands in for them (their gradients, say).
        """
        of_layers = tuple(parameters or self.parameters())
        found = []
        for width, nth in self.places[tap]:
            first, part = 2 * list(self).index(width), slice(nth * self.embed_dim, (nth + 1) * self.embed_dim)
            found.append((of_layers[first][part], of_layers[first + 1][part]))
        return found

    def forward(
        self,
        taps: Sequence[int],
        rows: Sequence[tuple[Tensor, Tensor]],
        parameters: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Both sides of those taps under their heads.

        Args:
            taps: which.
            rows: ``(n_k, C_b)`` and ``(n_k, C_f)`` of each, of any floating dtype.
            parameters: what stands in for this module's parameters, in their order.

        Returns:
            ``(2, sum of n_k, D)``, of unit length: first those of all a_B, tap by tap, then those of all a_F. In
            float32 whatever autocast says (float64 where the heads are).
        """
        parameters = tuple(parameters or self.parameters())
        members = [(rows[i][side], *self.places[tap][side]) for side in (0, 1) for i, tap in enumerate(taps)]
        # By layer and number of rows: which of the tensors, and under which of the layer's heads.
        groups: dict[tuple[str, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for i, (tensor, width, nth) in enumerate(members):
            which, heads = groups[width, len(tensor)]
            which.append(i)
            heads.append(nth)
        layers = {width: layer for layer, width in enumerate(self)}
        device = parameters[0].device
        products = tuple(
            _Product(layers[width], which, sent(heads, torch.long, device))
            for (width, _), (which, heads) in groups.items()
        )
        tensors = [*(tensor for tensor, _, _ in members), *parameters]
        # What is compiled is fused with what is around it.
        if torch.compiler.is_compiling():
            return _embedded(products, self.embed_dim, *tensors)[0]
        z: Tensor = _Embed.apply(products, self.embed_dim, *tensors)
        return z


@dataclass(frozen=True)
class _Product:
    """Tensors of as many rows and channels: one batched product embeds them all."""

    layer: int
    rows: list[int]
    heads: Tensor


def _embedded(products: tuple[_Product, ...], embed_dim: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The embeddings, their lengths before they were made one, and the two factors of each product.

    ``tensors``: the rows, then weight and bias of each layer.
    """
    count = sum(len(product.rows) for product in products)
    projected: dict[int, Tensor] = {}
    factors: list[Tensor] = []
    with torch.autocast(tensors[-1].device.type, enabled=False):
        dtype = torch.float64 if tensors[-1].dtype == torch.float64 else torch.float32
        for product in products:
            first = count + 2 * product.layer
            weight, bias = (
                p.view(-1, embed_dim, *p.shape[1:]).index_select(0, product.heads).to(dtype)
                for p in tensors[first : first + 2]
            )
            x = torch.stack([tensors[i] for i in product.rows]).to(dtype)
            projected.update(zip(product.rows, torch.baddbmm(bias.unsqueeze(1), x, weight.mT).unbind(), strict=True))
            factors += [x, weight]
        z = torch.cat([projected[i] for i in range(count)]).view(2, -1, embed_dim)
        length = torch.linalg.vector_norm(z, dim=2, keepdim=True)
        return z / length.clamp_min(_SHORTEST), length, *factors


class _Embed(torch.autograd.Function):
    """:func:`_embedded` with a gradient in one piece.

    It is some ten small operations for each width. As nodes of a graph they would cost as much again as they do.
    """

    @staticmethod
    def forward(ctx: Any, products: tuple[_Product, ...], embed_dim: int, *tensors: Tensor) -> Tensor:
        ctx.products, ctx.embed_dim = products, embed_dim
        z, length, *factors = _embedded(products, embed_dim, *tensors)
        ctx.save_for_backward(z, length, *factors, *tensors)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        products, embed_dim = ctx.products, ctx.embed_dim
        z, length, *rest = ctx.saved_tensors
        factors, tensors = rest[: 2 * len(products)], rest[2 * len(products) :]
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted (create_graph=True).
            # Views: one tensor may be computed from another, and that path is not ours to walk.
            tensors = [t.view_as(t) for t in tensors]
            wanted = [t for t, needs in zip(tensors, needed, strict=True) if needs]
            z, *_ = _embedded(products, embed_dim, *tensors)
            gradients = iter(torch.autograd.grad(z, wanted, grad, create_graph=True, materialize_grads=True))
            return None, None, *(next(gradients) if needs else None for needs in needed)
        count = sum(len(product.rows) for product in products)
        found: list[Tensor | None] = [None] * count
        for parameter, needs in zip(tensors[count:], needed[count:], strict=True):
            found.append(torch.zeros_like(parameter) if needs else None)
        with torch.autocast(grad.device.type, enabled=False):
            # Only what is across z changes it: its length is one. (Where that was not reached it is a constant.)
            along = (grad * z).sum(2, keepdim=True).masked_fill_(length < _SHORTEST, 0)
            grad = torch.addcmul(grad, z, along, value=-1).div_(length.clamp_min(_SHORTEST))
            parts = grad.flatten(0, 1).split([len(rows) for rows in tensors[:count]])
            for product, x, weight in zip(products, factors[::2], factors[1::2], strict=True):
                towards = torch.stack([parts[i] for i in product.rows])
                for i, of_rows in zip(product.rows, (towards @ weight).unbind(), strict=True):
                    found[i] = of_rows
                first = count + 2 * product.layer
                for at, of_heads in ((first, towards.mT @ x), (first + 1, towards.sum(1))):
                    if (whole := found[at]) is not None:
                        heads = whole.view(-1, embed_dim, *whole.shape[1:])
                        heads.index_copy_(0, product.heads, of_heads.to(heads.dtype))
        return None, None, *found


def sent(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor. Without waiting for the device: they are in pageable memory, copied at once."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
