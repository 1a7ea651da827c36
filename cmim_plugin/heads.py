"""Embedding heads, linear then unit length, one for each side of each tap; and the optimizer that trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from .errors import CMIMError

# Projections much shorter than this are not stretched to unit length: that would blow their gradient up.
_SHORTEST = 1e-6
# Adam's (Kingma and Ba 2015, arXiv 1412.6980). Epsilon is smaller, for the entries of a gradient of length 1 are small.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-12


def grouped(items: Iterable[int], keys: Iterable[Any]) -> list[tuple[Any, list[int]]]:
    """Items of equal keys, in order. Not by a dict: a size that is hashed is a constant to torch.compile."""
    groups: list[tuple[Any, list[int]]] = []
    for item, key in zip(items, keys, strict=True):
        known = [group for other, group in groups if other == key]
        if known:
            known[0].append(item)
        else:
            groups.append((key, [item]))
    return groups


class Heads(nn.Module):
    """The heads of all taps, and an Adam of a fixed rate that trains them whatever the network is trained with.

    All weights lie in one tensor, so that the optimizer's step is a few operations. It is a buffer that requires a
    gradient, not a parameter: no optimizer, clipping, decay or wrapper of others touches it.

    Args:
        channels: of both sides of each tap, a_B first, then a_F (or the teacher's activation).
        embed_dim: outputs ``D`` of a head.
        lr: learning rate; 0 leaves the heads, and the gradient that they got, alone.
        generator: of the CPU, for the initial weights.
    """

    weights: Tensor  # (channels of all heads, D), tap by tap, the head of a_B before that of a_F
    exp_avg: Tensor  # Adam's two moments, not corrected for their start,
    exp_avg_sq: Tensor
    steps: Tensor  # and its number of steps, 0-d
    channels: Tensor  # (taps, 2) int64, as given
    is_copy = False  # of the heads of a plug-in
    _row_numbers: Tensor

    def __init__(
        self, channels: Sequence[tuple[int, int]], embed_dim: int, lr: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.lr = lr
        widths = [width for pair in channels for width in pair]
        heads = [slice(start, end) for start, end in pairwise(accumulate(widths, initial=0))]
        # For both sides of each tap: which rows of the weights are its head.
        self._slices = list(zip(heads[::2], heads[1::2], strict=True))
        drawn = [
            (torch.rand(width, embed_dim, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1)
            / math.sqrt(width)  # as nn.Linear does
            for width in widths
        ]
        weights = torch.cat(drawn)
        self.register_buffer("weights", weights)
        self.register_buffer("exp_avg", torch.zeros_like(weights))
        self.register_buffer("exp_avg_sq", torch.zeros_like(weights))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float32, device="cpu"))
        self.register_buffer("channels", torch.tensor(channels, device="cpu"))
        self.register_buffer("_row_numbers", torch.arange(len(weights), device="cpu"), persistent=False)
        self._refresh()

    # -- embeddings ----------------------------------------------------------------------------------------------

    def weights_of(self, tap: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(C, D)`` weights of both sides of a tap, views: of :attr:`weights`, or of a tensor like it."""
        weights = self.weights.detach() if weights is None else weights
        binary, latent = self._slices[tap]
        return weights[binary], weights[latent]

    def forward(
        self, taps: Sequence[int], rows: Sequence[tuple[Tensor, Tensor]], weights: Tensor | None = None
    ) -> list[Tensor]:
        """Both sides of some taps under their heads: ``(n_k, D)`` of unit length, of each a_B, then of each a_F, in the
        dtype of the weights. ``rows``: ``(n_k, C_b)`` and ``(n_k, C_f)`` of each, of any floating dtype."""
        weights = self.weights if weights is None else weights
        sides = [(rows[i][side], self._slices[tap][side]) for side in (0, 1) for i, tap in enumerate(taps)]
        # Sides with as many channels and rows are one batched product. Position i of its results is side order[i].
        groups = grouped(range(len(sides)), [x.shape for x, _ in sides])
        order = [position for _, group in groups for position in group]
        # The heads of the chosen sides, group by group, (their channels, D). index_select copies, and the graph keeps
        # the copy: a later step cannot change what a backward pass reads.
        chosen = weights.index_select(0, torch.cat([self._row_numbers[sides[p][1]] for p in order]))
        per_group = chosen.split([len(group) * width for (_, width), group in groups])
        projected = []
        with torch.autocast(weights.device.type, enabled=False):
            for ((_, width), group), of_group in zip(groups, per_group, strict=True):
                x = torch.stack([sides[p][0] for p in group]).to(weights.dtype)
                projected.append((x @ of_group.view(len(group), width, -1)).flatten(0, 1))
            z = torch.cat(projected)  # (rows of all sides, D), group by group
            # A code of zeros alone has no direction: dividing by _SHORTEST would blow its gradient up.
            z = z * z.detach().any(-1, keepdim=True)
            # Unit length by the root mean square: on a GPU one kernel each way, where F.normalize launches sixteen.
            dim = self.embed_dim
            z = nn.functional.rms_norm(z, (dim,), self._unit, eps=_SHORTEST**2 / dim)
        # Back into the order of `sides`: all a_B, then all a_F.
        found = dict(zip(order, z.split([len(sides[p][0]) for p in order]), strict=True))
        return [found[p] for p in range(len(sides))]

    # -- training ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """One step of Adam with the gradient that was left since the last one, which is then used up.

        A gradient that is zero, since no backward pass came, or not finite, since a GradScaler overflowed, is skipped,
        and the host does not wait. The gradient is divided by the sum of its absolute values: Adam averages over steps,
        between which a GradScaler or another weight changes the scale.
        """
        if not self.lr or self.is_copy:
            return
        grad = self.weights.grad
        if grad is None:  # somebody took it away
            self._refresh()
            return
        if grad.requires_grad:  # left by a backward pass with create_graph=True
            grad = grad.detach().clone()
            with torch.inference_mode(False):  # state_dict() may be called in inference mode
                self.weights.grad = torch.zeros_like(self.weights)
        size = torch.linalg.vector_norm(grad, 1).to(torch.float32)
        # size.fmod(size) is 0 for a finite number above zero; for 0, infinity and NaN it is NaN, and skip is 1.
        skip = size.fmod(size).nan_to_num(1.0)
        adam_step(self.weights, grad, self.exp_avg, self.exp_avg_sq, self.steps, size, skip, self.lr)
        grad.zero_()

    def become_copy(self) -> None:
        """No loss will give the weights a gradient."""
        self.is_copy = True
        self.weights.requires_grad_(False)

    @torch.inference_mode(False)  # a state may be loaded in inference mode
    def _refresh(self) -> None:
        """Make the weights a leaf, with a gradient that is always there: backward passes add to it in place."""
        for name in ("weights", "exp_avg", "exp_avg_sq", "steps"):
            buffer = getattr(self, name)
            # In half precision small steps of Adam would round to nothing; its kernel on a GPU reads float32 steps.
            dtype = torch.float32 if name == "steps" else torch.promote_types(buffer.dtype, torch.float32)
            if not (buffer.requires_grad and buffer.is_leaf and buffer.dtype == dtype):  # an optimizer may hold it
                setattr(self, name, buffer.detach().to(dtype))
        self.weights.requires_grad_(not self.is_copy)  # an average of copies writes into all tensors
        if self.weights.grad is None:
            self.weights.grad = torch.zeros_like(self.weights)
        else:  # in place, for a CUDA graph that was recorded
            self.weights.grad.zero_()
        self._unit = self.weights.new_full((self.embed_dim,), self.embed_dim**-0.5)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Heads:
        self.step()
        super()._apply(fn, recurse)
        self._refresh()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.step()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Names of taps may differ: a wrapper adds a prefix. Channels must match; the shape of the weights may hide it.
        channels = state.get(prefix + "channels")
        if channels is not None and not torch.equal(channels.cpu(), self.channels.cpu()):
            raise CMIMError(
                "The state is that of other taps. Build the CMIM as it was when it was saved: on the same network, "
                "with the same taps=. Channels of both sides of each tap:\n"
                f"Found:  {channels.tolist()}\nWanted: {self.channels.tolist()}"
            )
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]
        self._refresh()


# An operator: torch.compile does not trace the fused kernel.
@torch.library.custom_op("cmim_plugin::adam_step", mutates_args=("weights", "grad", "mean", "square", "steps"))
def adam_step(
    weights: Tensor, grad: Tensor, mean: Tensor, square: Tensor, steps: Tensor, scale: Tensor, skip: Tensor, lr: float
) -> None:
    """One step of Adam in place, in one kernel, with ``grad / scale``; none where ``skip``, 0-d float32, is 1."""
    # fmt: off
    adam(
        [weights], [grad], [mean], [square], [], [steps], fused=True, grad_scale=scale, found_inf=skip,
        beta1=_BETA1, beta2=_BETA2, lr=lr, eps=_EPSILON, weight_decay=0.0, amsgrad=False, maximize=False,
    )
    # fmt: on


adam_step.register_fake(lambda *args: None)
