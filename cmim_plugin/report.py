"""A look inside: what every binary activation of a network keeps of its latent, over held-out data.

:meth:`cmim_plugin.CMIM.report` makes a :class:`Report`: plain numbers, which can be pickled, printed as a table,
written as CSV, drawn (with matplotlib), and compared with those of another epoch.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .capture import Capture
from .contrast import Contrast, check_rows
from .discovery import BatchSource, Layout, is_two_valued
from .discovery.inputs import as_inputs, tensors_in
from .discovery.state import force_eager, preserve_generators
from .errors import CMIMError, CMIMWarning
from .passes import Pass
from .sampling import Schedule, new_draws, stratified_indices
from .teacher import Teacher
from .text import table

# Positions of a batch whose codes are kept, to count flips by, and how many codes a tap keeps of all batches.
_POSITIONS, _CODES = 64, 2**20
# Values of each input of a batch by which another report knows it again.
_VALUES = 64
# Scores no further apart are equal: clipped latents are often the very same.
_NOISE = 1e-6
# Anchors whose scores are held at once.
_AT_ONCE = 1024


@dataclass(frozen=True)
class TapReport:
    """One tap, over everything that a report saw.

    Attributes:
        name: of the tap.
        channels: of a_B.
        bound: lower bound on the mutual information of a_B and what it is contrasted with, in nats: the mean over the
            batches, each counted by its instances. None for an objective of the user's own.
        ceiling: what the bound can be at most, in nats: the logarithm of the number of candidates.
        retrieval: how often the embedding of an a_B is nearest to that of its own a_F among those of the batch, in %;
            ``k`` of them at the same distance count as one in ``k``.
        plus: share of the higher code, of all positions and channels, in [0, 1].
        dead, saturated: channels whose code was always the lower, always the higher one.
        flips: share of the codes that differ from an earlier report, in [0, 1]; None without one.

    ``bound``, ``ceiling`` and ``retrieval`` are None where no batch had two instances to tell apart.
    """

    name: str
    channels: int
    bound: float | None
    ceiling: float | None
    retrieval: float | None
    plus: float
    dead: int
    saturated: int
    flips: float | None = None

    @property
    def kept(self) -> float | None:
        """The bound as a share of its ceiling; below zero while the heads know nothing."""
        return None if self.bound is None or self.ceiling is None else self.bound / self.ceiling


@dataclass(frozen=True, repr=False)
class Report:
    """What each tap keeps of its latent: made by :meth:`cmim_plugin.CMIM.report`, in forward order.

    Attributes:
        taps: the figures, one entry a tap.
        samples, batches: how many were seen.
        instances: what one sample of the contrast was, "position" or "image".
        rank, ranks: whose data this is.
    """

    taps: tuple[TapReport, ...]
    samples: int
    batches: int
    instances: str
    rank: int = 0
    ranks: int = 1
    # A sample of the codes: of each tap, for each batch, the bits of one number and how many they are.
    _codes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    # Some values of the inputs of each batch.
    _seen: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def worst(self) -> str:
        """The tap that loses the most, which keeps the least of what its bound could reach.

        By the retrieval where the objective gives no bound, "" where there is neither.
        """
        for figure in (lambda tap: tap.kept, lambda tap: tap.retrieval):
            known = [tap for tap in self.taps if figure(tap) is not None]
            if known:
                return min(known, key=figure).name
        return ""

    def flips(self, earlier: Report) -> dict[str, float]:
        """The share of the codes that differ from an earlier report, for the taps of both: ``{tap name: share}``.

        Both reports look at the same positions, as many batches as both saw, at most about a million codes a tap.

        Raises:
            CMIMError: the two saw other inputs, or in another order, or have no tap in common.
        """
        if not isinstance(earlier, Report):
            raise CMIMError(f"An earlier report is needed, as cmim.report() gave it; found a {type(earlier).__name__}.")
        _check_same(zip(self._seen, earlier._seen, strict=False))
        found = {}
        for name, own in self._codes.items():
            differing = counted = 0
            for (bits, count), (others, other) in zip(own, earlier._codes.get(name, []), strict=False):
                if count and other and count != other:
                    raise CMIMError(f"Tap {name} has other channels or positions than in the earlier report.")
                if count and other:
                    differing += (bits ^ others).bit_count()
                    counted += count
            if counted:
                found[name] = differing / counted
        if not found:
            raise CMIMError(f"No tap in common: {list(self._codes)} here, {list(earlier._codes)} in the earlier one.")
        return found

    def scalars(self) -> dict[str, float]:
        """``{"tap name/figure": value}``, for TensorBoard: every figure that is known."""
        return {
            f"{tap.name}/{key}": float(value)
            for tap in self.taps
            for key, value in asdict(tap).items()
            if key not in ("name", "channels", "ceiling") and value is not None
        }

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line a tap: the attributes of :class:`TapReport`, empty where unknown."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(TapReport.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(tap) for tap in self.taps)

    def plot(self, path: str | os.PathLike[str], before: Report | None = None) -> Any:
        """Draw the figures of all taps side by side into a file, ``before`` those of another report beside them.

        Needs matplotlib. The ending of ``path`` says which format.

        Returns:
            The ``matplotlib.figure.Figure``, as ``SummaryWriter.add_figure`` takes it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise CMIMError(
                "Drawing a report needs matplotlib: pip install matplotlib. (The table, to_csv() and scalars() do not.)"
            ) from error
        panels: list[tuple[str, Callable[[TapReport], float | None]]] = [
            ("mutual information, at least (nats)", lambda tap: tap.bound),
            ("own latent retrieved (%)", lambda tap: tap.retrieval),
            ("codes +1 (%)", lambda tap: 100 * tap.plus),
            ("channels of one code (%)", lambda tap: 100 * (tap.dead + tap.saturated) / tap.channels),
            ("codes flipped (%)", lambda tap: None if tap.flips is None else 100 * tap.flips),
        ]
        if all(tap.flips is None for tap in self.taps):
            panels.pop()
        names = [tap.name for tap in self.taps]
        height = 0.8 if before is None else 0.4
        bars = [("now", self, "tab:blue", 0.0 if before is None else height / 2)]
        if before is not None:
            bars.insert(0, ("before", before, "lightgray", -height / 2))
        figure = Figure(figsize=(2 + 3 * len(panels), 1.5 + 0.3 * len(names)), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, figure_of) in zip(row, panels, strict=True):
            for label, report, color, shift in bars:
                drawn = [tap for tap in report.taps if tap.name in names]
                widths = [math.nan if (value := figure_of(tap)) is None else value for tap in drawn]
                axes.barh([names.index(t.name) + shift for t in drawn], widths, height, color=color, label=label)
            axes.set_title(title, fontsize=10)
            if title.endswith("(%)"):
                axes.set_xlim(0, 100)
        ceilings = [math.nan if tap.ceiling is None else tap.ceiling for tap in self.taps]
        row[0].plot(ceilings, range(len(names)), "k|", markersize=10, label="at most")
        row[0].legend(fontsize=8)
        row[2].axvline(50, color="black", linewidth=0.8, linestyle=":")
        row[0].set_yticks(range(len(names)), names)
        row[0].invert_yaxis()
        for tick in row[0].get_yticklabels():
            if tick.get_text() == self.worst:
                tick.set(color="tab:red", fontweight="bold")
        figure.suptitle(f"{self._title()}; red: loses the most", fontsize=10)
        figure.savefig(path, dpi=120)
        return figure

    def __repr__(self) -> str:
        head = ["tap", "channels", "bound", "at most", "kept", "retrieval", "+1", "dead", "saturated", "flips"]
        cells = [
            [
                tap.name,
                f"{tap.channels}",
                _text("{:.2f}", tap.bound),
                _text("{:.2f}", tap.ceiling),
                _text("{:.0%}", tap.kept),
                _text("{:.1f}%", tap.retrieval),
                f"{tap.plus:.1%}",
                f"{tap.dead}",
                f"{tap.saturated}",
                _text("{:.2%}", tap.flips),
            ]
            for tap in self.taps
        ]
        heading, *lines = table([head, *cells], right=True).splitlines()
        marks = ["  <- loses the most" if len(cells) > 1 and row[0] == self.worst else "" for row in cells]
        return "\n".join([self._title(), heading, *(line + mark for line, mark in zip(lines, marks, strict=True))])

    def _title(self) -> str:
        whose = "" if self.ranks == 1 else f", the data of rank {self.rank} of {self.ranks} alone"
        return (
            f"Report on inputs: {self.samples}, batches: {self.batches}, one instance = one {self.instances}, "
            f"bounds in nats{whose}"
        )


def measure(
    model: nn.Module,
    contrast: Contrast,
    batch_source: BatchSource | None,
    teacher: Teacher | None,
    num_positions: int | None,
    loader: Iterable[Any],
    inputs: Callable[[Any], Any] | None,
    max_batches: int | None,
    since: Report | None,
) -> Report:
    """:meth:`cmim_plugin.CMIM.report`, of the model inside any wrapper. ``num_positions``: None for whole images."""
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise CMIMError(f"max_batches must be an integer, 1 or more, or None for all; found {max_batches!r}.")
    if isinstance(loader, Tensor):
        raise CMIMError("The loader must give batches: for a single batch x, pass [x]; found a tensor.")
    if since is not None and not isinstance(since, Report):
        raise CMIMError(f"since must be an earlier report of cmim.report(); found a {type(since).__name__}.")
    device = next((p.device for p in model.parameters()), contrast.heads.weights.device)
    tallies = [_Tally(tap.name, tap.channels) for tap in contrast.taps]
    # Generators of their own: another number of instances does not move the positions whose codes are kept.
    for_codes, for_instances = (torch.Generator("cpu").manual_seed(seed) for seed in (0, 1))
    code_draws = torch.empty(0, dtype=torch.int64, device="cpu")

    def observer(k: int, activation: Tensor, layout: Layout) -> None:
        tallies[k].look(activation.detach(), layout, code_draws)

    schedule = Schedule(len(tallies), None, num_positions, for_instances, shared=False).to(device)
    before = None if teacher is None else teacher.deliver
    capture = Capture(model, contrast.taps, schedule, batch_source, observer, before)
    samples, seen = 0, []
    failures: dict[int | None, str] = {}
    # A loader that shuffles or augments draws from the generators, too: they are kept around all of it.
    with preserve_generators(model.parameters()), torch.no_grad(), _evaluating(model), force_eager():
        capture.attach()
        try:
            for batch in itertools.islice(loader, max_batches):
                args, kwargs = _inputs_of(batch, inputs, device)
                code_draws = new_draws((_POSITIONS,), for_codes)
                seen.append(_fingerprint((args, kwargs), new_draws((_VALUES,), for_codes)))
                if since is not None:
                    _check_same(zip(seen[-1:], since._seen[len(seen) - 1 :], strict=False))
                for tally in tallies:
                    tally.begin()
                model(*args, **kwargs)
                captured = capture.pop()
                schedule.advance()
                failures.update(captured.failures)
                for k, tally in enumerate(tallies):
                    tally.contrast(contrast, k, captured)
                samples += max(pair.batch_size for pair in captured.pairs.values())
        finally:
            capture.detach()
    if not seen:
        raise CMIMError("The loader gave no batch: nothing to report on. (A generator that was used up does that.)")
    astray = [tally.name for tally in tallies if tally.astray or not tally.values]
    if len(astray) == len(tallies):
        why = f" {next(iter(failures.values()))}." if failures else ""
        raise CMIMError(
            f"In eval mode the model reached none of the taps with a binary activation and its latent.{why}"
        )
    if astray:
        warnings.warn(
            f"In eval mode the model takes another way than in training, and the pairs of these taps were not found: "
            f"{astray}. The report leaves them out.",
            CMIMWarning,
            stacklevel=3,
        )
    kept = [tally for tally in tallies if tally.name not in astray]
    report = Report(
        tuple(tally.result() for tally in kept),
        samples,
        len(seen),
        "image" if num_positions is None else "position",
        distributed.rank(),
        distributed.ranks(),
        {tally.name: tally.codes for tally in kept},
        seen,
    )
    if since is None:
        return report
    flips = report.flips(since)
    return replace(report, taps=tuple(replace(tap, flips=flips.get(tap.name)) for tap in report.taps))


class _Tally:
    """The sums of one tap over the batches."""

    def __init__(self, name: str, channels: int) -> None:
        self.name = name
        self.channels = channels
        # Another tensor was found where the binary activation is in training, or one side only.
        self.astray = False
        # Higher codes of each channel, and of how many.
        self.higher: Tensor | int = 0
        self.values = 0
        self.codes: list[tuple[int, int]] = []
        self.kept = 0
        self.instances = 0
        self.bound: float | None = 0.0
        self.ceiling = 0.0
        self.retrieved = 0.0

    def begin(self) -> None:
        """A batch starts: no codes of it yet."""
        self.codes.append((0, 0))

    def look(self, activation: Tensor, layout: Layout, draw: Tensor) -> None:
        """Count the codes of a_B, all of them, and keep some."""
        if not self.values and not is_two_valued(activation, layout):
            self.astray = True
        shape = activation.shape
        higher = _higher(activation)
        per_channel, positions = _by_channel(higher, layout)
        self.higher = self.higher + per_channel.sum((0, positions))
        self.values += higher.numel() // self.channels
        if self.kept < _CODES:
            index = stratified_indices(draw.to(activation.device), layout.positions(shape))
            bits = higher.take(layout.elements(index, shape)).flatten()
            self.codes[-1] = (_packed(bits), len(bits))
            self.kept += len(bits)

    def contrast(self, contrast: Contrast, k: int, captured: Pass) -> None:
        """Bound and retrieval of one batch."""
        binary, latent = captured.pairs[k].rows
        if (binary is None) != (latent is None):
            self.astray = True
        if binary is None or latent is None or len(binary) < 2:
            return
        check_rows(contrast.taps[k], binary, latent, contrast.heads.weights.device)
        z_b, z_f = contrast.heads([k], [(binary, latent)])
        n = len(z_b)
        self.instances += n
        self.ceiling += n * math.log(n)
        self.retrieved += _retrieved(z_b, z_f)
        bound = getattr(contrast.objective, "bound", None)
        if bound is None or self.bound is None:
            self.bound = None
        else:
            losses = contrast.objective(z_b[None], z_f[None], temperature=contrast.temperature, labels=None)
            self.bound += n * float(bound(losses[0], torch.tensor(n - 1, device="cpu")))

    def result(self) -> TapReport:
        """The figures."""
        assert isinstance(self.higher, Tensor)
        n = self.instances
        return TapReport(
            self.name,
            self.channels,
            bound=self.bound / n if n and self.bound is not None else None,
            ceiling=self.ceiling / n if n else None,
            retrieval=100 * self.retrieved / n if n else None,
            plus=int(self.higher.sum()) / (self.values * self.channels),
            dead=int((self.higher == 0).sum()),
            saturated=int((self.higher == self.values).sum()),
        )


def _retrieved(z_b: Tensor, z_f: Tensor) -> float:
    """How many rows of ``z_b`` are nearest to their own row of ``z_f``; one in ``k`` where ``k`` are equally near."""
    found = 0.0
    for first, anchors in zip(range(0, len(z_b), _AT_ONCE), z_b.split(_AT_ONCE), strict=True):
        with torch.autocast(z_b.device.type, enabled=False):
            scores = anchors @ z_f.mT
        own = scores.diagonal(first)[:, None]
        # NaN compares false: it finds nothing.
        nearest = (scores <= own + _NOISE).all(1)
        found += float((nearest / (scores >= own - _NOISE).sum(1).clamp_min(1)).sum())
    return found


def _higher(activation: Tensor) -> Tensor:
    """Which codes are the higher of the two: bool, shaped like the activation.

    Above zero, which also holds where each channel or sample has a scale of its own; between the two where both are of
    one sign. A constant tensor has its sign for a code.
    """
    low, high = activation.amin(), activation.amax()
    apart = high - low > 1e-2 * torch.maximum(low.abs(), high.abs())
    one_sign = apart & ((low > 0) | (high <= 0))
    return activation > torch.where(one_sign, low / 2 + high / 2, 0)


def _by_channel(x: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """``(rows, channels, positions)`` or ``(rows, positions, channels)``, and which dimension the positions are."""
    if layout.spatial is None:
        return x.reshape(x.shape[0], -1, x.shape[-1]), 1
    return x.reshape(x.shape[0], layout.channels(x.shape), -1), 2


def _packed(bits: Tensor) -> int:
    """One number of all bits; the count of those that differ between two is ``(a ^ b).bit_count()``."""
    padded = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8).to(torch.uint8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return int.from_bytes(bytes((padded * powers).sum(1, dtype=torch.uint8).tolist()), "little")


def _fingerprint(inputs: Any, draw: Tensor) -> tuple[float, ...]:
    """Some values of each tensor among the inputs."""
    found: list[float] = []
    for _, tensor in tensors_in(inputs):
        if tensor.numel():
            index = stratified_indices(draw, tensor.numel()).to(tensor.device)
            found += tensor.detach().reshape(-1)[index].cpu().double().nan_to_num().tolist()
    return tuple(found)


def _check_same(batches: Iterable[tuple[tuple[float, ...], tuple[float, ...]]]) -> None:
    if any(own != other for own, other in batches):
        raise CMIMError(
            "The two reports saw other inputs, or the same ones in another order, so their codes cannot be compared: "
            "give both a loader without shuffling and random augmentation, with the same batch size."
        )


def _inputs_of(
    batch: Any, inputs: Callable[[Any], Any] | None, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of the model, on its device."""
    found = inputs(batch) if inputs is not None else batch
    if inputs is None and isinstance(batch, (tuple, list, Mapping)):
        found = next(iter(batch.values() if isinstance(batch, Mapping) else batch), None)
    if not isinstance(found, (Tensor, tuple, list, Mapping)):
        what = "inputs= returned" if inputs is not None else "the first element of a batch is"
        raise CMIMError(
            "The input of the model must be a tensor, a tuple of positional inputs or a dict of keyword inputs; "
            f"{what} a {type(found).__name__}. Pass inputs=, a function from a batch to it."
        )
    args, kwargs = as_inputs(found)
    return tuple(_moved(value, device) for value in args), {key: _moved(value, device) for key, value in kwargs.items()}


def _moved(tree: Any, device: torch.device) -> Any:
    """The same structure with its tensors on the device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {key: _moved(value, device) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [_moved(value, device) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and each module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def _text(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)
