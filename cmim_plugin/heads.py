"""Embedding heads: linear, then unit length. One for each side of each tap, trained together with the network."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
        layers = self._layers(parameters)
        return [(layers[width][0][nth], layers[width][1][nth]) for width, nth in self.places[tap]]

    def _layers(self, parameters: Sequence[Tensor] | None) -> dict[str, tuple[Tensor, Tensor]]:
        """By width: weights ``(heads, D, C)`` and biases ``(heads, D)``."""
        split = [p.view(-1, self.embed_dim, *p.shape[1:]) for p in parameters or self.parameters()]
        return {width: (split[2 * i], split[2 * i + 1]) for i, width in enumerate(self)}

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
            ``(sum of n_k, 2 D)``, tap by tap, each half of unit length: in float32 whatever autocast says (float64
            where the heads are).
        """
        layers = self._layers(parameters)
        like, _ = next(iter(layers.values()))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # By layer and number of rows: which tap and side, under which of the heads.
        groups: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
        for i, tap in enumerate(taps):
            for side, (width, nth) in enumerate(self.places[tap]):
                groups[width, len(rows[i][side])].append((i, side, nth))

        found: dict[tuple[int, int], Tensor] = {}
        with torch.autocast(like.device.type, enabled=False):
            for (width, _), members in groups.items():
                which = sent([nth for _, _, nth in members], torch.long, like.device)
                weight, bias = (part.index_select(0, which).to(dtype) for part in layers[width])
                x = torch.stack([rows[i][side] for i, side, _ in members]).to(dtype)
                projected = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
                for (i, side, _), z in zip(members, projected.unbind(), strict=True):
                    found[i, side] = z
            sides = [torch.cat([found[i, side] for i in range(len(taps))]) for side in (0, 1)]
            return F.normalize(torch.stack(sides, 1), dim=2, eps=_SHORTEST).flatten(1)


def sent(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor. Without waiting for the device: they are in pageable memory, copied at once."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
