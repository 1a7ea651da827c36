"""One linear head with outputs of unit length for each side of each tap, and the Adam that trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from .errors import CMIMError, check_saved

# The least divisor of the normalization: it bounds the gradient of short projections.
_SHORTEST = 1e-6
# Adam's (Kingma and Ba 2015, arXiv 1412.6980). Epsilon is smaller, because a gradient of L1 norm 1 has small entries.
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-12


def grouped(items: Iterable[int], keys: Iterable[Any]) -> list[tuple[Any, list[int]]]:
    """Items of equal keys, in order. Not by a dict: hashing a size makes it a constant for torch.compile."""
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
        channels: for each tap, those of a_B and of a_F (or the teacher's activation).
        embed_dim: outputs ``D`` of a head.
        lr: learning rate; with 0, step() does nothing, and the gradient stays.
        generator: of the CPU, for the initial weights.
    """

    weights: Tensor  # (channels of all heads, D), tap by tap, the head of a_B before that of a_F
    exp_avg: Tensor  # Adam's first moment, without bias correction
    exp_avg_sq: Tensor  # Adam's second moment, likewise
    steps: Tensor  # Adam's number of steps, 0-d
    channels: Tensor  # (taps, 2) int64, the argument
    is_copy = False  # heads of a copied plug-in: they do not train
    _row_numbers: Tensor  # arange, to index the weights with

    def __init__(
        self, channels: Sequence[tuple[int, int]], embed_dim: int, lr: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.lr = lr
        widths = [width for pair in channels for width in pair]
        rows = [slice(start, end) for start, end in pairwise(accumulate(widths, initial=0))]
        # For both sides of each tap: which rows of the weights are its head.
        self._slices = list(zip(rows[::2], rows[1::2], strict=True))
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

    def weights_of(self, tap: int, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both heads of a tap, ``(C_b, D)`` and ``(C_f, D)``: views of the weights, or of a tensor like them."""
        source = self.weights.detach() if source is None else source
        binary, latent = self._slices[tap]
        return source[binary], source[latent]

    def forward(
        self, taps: Sequence[int], rows: Sequence[tuple[Tensor, Tensor]], weights: Tensor | None = None
    ) -> list[Tensor]:
        """Apply the heads of some taps: ``(n_k, D)`` of unit length, of all a_B, then of all a_F, in the dtype of the
        weights. ``rows``: ``(n_k, C_b)`` and ``(n_k, C_f)`` of each tap, of any floating dtype."""
        weights = self.weights if weights is None else weights
        sides = [(rows[i][side], self._slices[tap][side]) for side in (0, 1) for i, tap in enumerate(taps)]
        # Sides of one shape are one batched product. Result i, group by group, is that of side order[i].
        groups = grouped(range(len(sides)), [x.shape for x, _ in sides])
        order = [position for _, group in groups for position in group]
        # The heads, group by group, (all channels, D). Its backward is one index_add, not a full tensor for each slice.
        # The product keeps this copy for its own backward: a later step of Adam cannot change it.
        chosen = weights.index_select(0, torch.cat([self._row_numbers[sides[p][1]] for p in order]))
        per_group = chosen.split([len(group) * width for (_, width), group in groups])
        projected = []
        with torch.autocast(weights.device.type, enabled=False):
            for ((_, width), group), group_weights in zip(groups, per_group, strict=True):
                x = torch.stack([sides[p][0] for p in group]).to(weights.dtype)
                projected.append((x @ group_weights.view(len(group), width, -1)).flatten(0, 1))
            z = torch.cat(projected)  # (rows of all sides, D), group by group
            # A projection of zero (a code of zeros) has no direction. It gets no gradient, not one over _SHORTEST.
            z = z * z.detach().any(-1, keepdim=True)
            # z / |z| is rms_norm(z) / sqrt(D): on a GPU one kernel each way, where F.normalize launches sixteen.
            dim = self.embed_dim
            z = nn.functional.rms_norm(z, (dim,), self._unit, eps=_SHORTEST**2 / dim)
        # Back into the order of `sides`: all a_B, then all a_F.
        z_of_side = dict(zip(order, z.split([len(sides[p][0]) for p in order]), strict=True))
        return [z_of_side[p] for p in range(len(sides))]

    # -- training ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """One step of Adam with the gradient that came since the last step and is then set to zero.

        A gradient of zero (no backward pass came) or one that is not finite (a GradScaler overflowed) is skipped, and
        the host does not wait. The gradient is divided by the sum of its absolute values: Adam averages over steps,
        between which a GradScaler or another weight changes the scale.
        """
        if not self.lr or self.is_copy:
            return
        grad = self.weights.grad
        if grad is None:  # set to None, as an optimizer's zero_grad() does
            self._refresh()
            return
        if grad.requires_grad:  # left by a backward pass with create_graph=True
            grad = grad.detach().clone()
            with torch.inference_mode(False):  # state_dict() may be called in inference mode
                self.weights.grad = torch.zeros_like(self.weights)
        size = torch.linalg.vector_norm(grad, 1).to(torch.float32)
        # 1 where size is 0, infinite or NaN (fmod then gives NaN), else 0: two kernels, and the host does not wait.
        skip = size.fmod(size).nan_to_num(1.0)
        adam_step(self.weights, grad, self.exp_avg, self.exp_avg_sq, self.steps, size, skip, self.lr)
        grad.zero_()

    def become_copy(self) -> None:
        """From now on these are the heads of a copy: no step, no gradient."""
        self.is_copy = True
        self.weights.requires_grad_(False)

    @torch.inference_mode(False)  # a state may be loaded in inference mode
    def _refresh(self) -> None:
        """Make the weights a leaf with a gradient of zero, float32 or wider: backward passes add to it in place."""
        for name in ("weights", "exp_avg", "exp_avg_sq", "steps"):
            buffer = getattr(self, name)
            # In half precision small steps of Adam would round to nothing; its kernel on a GPU reads float32 steps.
            dtype = torch.float32 if name == "steps" else torch.promote_types(buffer.dtype, torch.float32)
            # Where they fit, the weights stay the very tensor: a user's optimizer may hold it (heads_lr=0).
            if not (buffer.requires_grad and buffer.is_leaf and buffer.dtype == dtype):
                setattr(self, name, buffer.detach().to(dtype))
        self.weights.requires_grad_(not self.is_copy)  # AveragedModel writes into the tensors of a copy
        if self.weights.grad is None:
            self.weights.grad = torch.zeros_like(self.weights)
        else:  # in place: a recorded CUDA graph holds this tensor
            self.weights.grad.zero_()
        self._unit = self.weights.new_full((self.embed_dim,), self.embed_dim**-0.5)  # 1 / sqrt(D), for rms_norm

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Heads:
        self.step()
        super()._apply(fn, recurse)
        self._refresh()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.step()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Names of taps may differ: a wrapper adds a prefix. Channels may not: the shape of the weights tells their sum.
        channels = state.get(prefix + "channels")
        if channels is not None and not torch.equal(channels.cpu(), self.channels.cpu()):
            raise CMIMError(
                "The state is that of other taps. Build the CMIM as it was when it was saved: on the same network, "
                "with the same taps=. Channels of both sides of each tap:\n"
                f"Found:  {channels.tolist()}\nWanted: {self.channels.tolist()}"
            )
        check_saved("embed_dim", state.get(prefix + "weights", self.weights).shape[-1], self.embed_dim)
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]
        self._refresh()


# An operator: torch.compile does not trace the kernel. Its arguments grad_scale and found_inf are those of GradScaler.
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
