"""A look inside: how much each binary activation keeps of its latent, measured on held-out data."""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from ._compat import force_eager
from .capture import Capture
from .contrast import Contrast
from .discovery.codes import is_two_valued
from .discovery.inputs import as_inputs, mapped
from .discovery.state import preserve_generators
from .errors import CMIMError, CMIMWarning
from .passes import BINARY, Pass
from .sampling import Schedule
from .text import table

_INPUT_OF_BATCH = (
    "Of a batch that is a tuple, list or dict, the first element alone is the model's input. For another, pass "
    "inputs=, as inputs=lambda batch: batch[1], or inputs=lambda batch: batch for all. For one batch, pass [batch]."
)
_NOISE = 1e-6  # scores this close are a tie: clipping makes many latents the very same
# Column heading -> attribute of TapReport, and its format.
# fmt: off
_COLUMNS = {
    "tap": ("name", "{}"), "channels": ("channels", "{}"), "bound": ("bound", "{:.2f}"),
    "at most": ("ceiling", "{:.2f}"), "kept": ("kept", "{:.0%}"), "retrieval": ("retrieval", "{:.1%}"),
    "+1": ("plus", "{:.1%}"), "dead": ("dead", "{}"), "saturated": ("saturated", "{}"),
}
# fmt: on


@dataclass(frozen=True)
class TapReport:
    """The figures of one tap, over all batches of a report.

    Attributes:
        name: of the tap.
        channels: of a_B.
        bound: lower bound on the mutual information of a_B and what it is contrasted with, in nats: the mean over the
            batches, weighted by their numbers of instances. None for an objective without one.
        ceiling: the largest bound that is possible, in nats: the logarithm of the number of candidates.
        retrieval: how often the embedding of an a_B is nearest to that of its own a_F among those of the batch, in
            [0, 1]; a tie of ``k`` of them counts ``1 / k``.
        plus: share of the higher code, of all positions and channels, in [0, 1].
        dead, saturated: channels whose code was always the lower, always the higher one.

    ``bound``, ``ceiling`` and ``retrieval`` are None if no batch had two instances to tell apart.
    """

    name: str
    channels: int
    bound: float | None
    ceiling: float | None
    retrieval: float | None
    plus: float
    dead: int
    saturated: int

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
        instances: what was contrasted, "position" or "image".
        rank, ranks: the rank whose data was measured, and the number of ranks.
        heads_trained: False if the heads' own Adam has taken no step yet: bound and retrieval then say nothing. True
            with ``heads_lr=0``: others may have trained the heads.
    """

    taps: tuple[TapReport, ...]
    samples: int
    batches: int
    instances: str
    rank: int = 0
    ranks: int = 1
    heads_trained: bool = True

    @property
    def worst(self) -> str:
        """The tap with the lowest ``kept``; with the lowest ``retrieval`` if there is no bound; "" without either."""
        kept = {tap.name: tap.kept for tap in self.taps if tap.kept is not None}
        figures = kept or {tap.name: tap.retrieval for tap in self.taps if tap.retrieval is not None}
        return min(figures, key=lambda name: figures[name], default="")

    def scalars(self) -> dict[str, float]:
        """``{"tap name/figure": value}``, for TensorBoard: every figure that is known."""
        return {
            f"{tap.name}/{key}": float(value)
            for tap in self.taps
            for key, value in asdict(tap).items()
            if key not in ("name", "channels", "ceiling") and value is not None
        }

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line a tap: the attributes of :class:`TapReport`, empty if unknown."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(TapReport.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(tap) for tap in self.taps)

    def plot(self, path: str | os.PathLike[str], before: Report | None = None) -> Any:
        """Draw the figures of all taps side by side into a file; its ending gives the format. Needs matplotlib.

        ``before``: another report of the same taps, drawn beside this one.

        Returns:
            The ``matplotlib.figure.Figure``, as ``SummaryWriter.add_figure`` takes it.
        """
        if before is not None and [tap.name for tap in before.taps] != [tap.name for tap in self.taps]:
            raise CMIMError(
                f"before= must be a report of the same taps: found {[tap.name for tap in before.taps]}, wanted "
                f"{[tap.name for tap in self.taps]}."
            )
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise CMIMError(
                "Drawing a report needs matplotlib: pip install matplotlib. (The table, to_csv() and scalars() do not.)"
            ) from error
        panels: dict[str, Callable[[TapReport], float | None]] = {
            "mutual information, at least (nats)": lambda tap: tap.bound,
            "own latent retrieved (%)": lambda tap: None if tap.retrieval is None else 100 * tap.retrieval,
            "codes +1 (%)": lambda tap: 100 * tap.plus,
            "channels of one code (%)": lambda tap: 100 * (tap.dead + tap.saturated) / tap.channels,
        }
        figure = Figure(figsize=(2 + 3 * len(panels), 1.5 + 0.3 * len(self.taps)), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True)
        bars = [("before", before, "lightgray")] if before is not None else []
        bars.append(("now", self, "tab:blue"))
        height, places = 0.8 / len(bars), range(len(self.taps))
        for axes, (title, figure_of) in zip(row, panels.items(), strict=True):
            for i, (label, report, color) in enumerate(bars):
                at = [place + (i + 0.5) * height - 0.4 for place in places]
                axes.barh(at, _with_nan(map(figure_of, report.taps)), height, color=color, label=label)
            axes.set_title(title, fontsize=10)
            if title.endswith("(%)"):
                axes.set_xlim(0, 100)
        row[0].plot(_with_nan(tap.ceiling for tap in self.taps), places, "k|", markersize=10, label="at most")
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        row[2].axvline(50, color="black", linewidth=0.8, linestyle=":")
        row[0].set_yticks(places, [tap.name for tap in self.taps])
        row[0].invert_yaxis()
        figure.suptitle(self._title(), fontsize=10)
        figure.savefig(path, dpi=120)
        return figure

    def __repr__(self) -> str:
        marked = self.worst if len(self.taps) > 1 and self.heads_trained else None
        rows = [[*_COLUMNS, ""]]
        for tap in self.taps:
            values = [(getattr(tap, attribute), form) for attribute, form in _COLUMNS.values()]
            cells = ["-" if value is None else form.format(value) for value, form in values]
            rows.append([*cells, "<- loses the most" if tap.name == marked else ""])
        return f"{self._title()}\n{table(rows, right=True)}"

    def _title(self) -> str:
        whose = "" if self.ranks == 1 else f", the data of rank {self.rank} of {self.ranks} alone"
        untrained = "" if self.heads_trained else "; the heads are not trained yet: bound and retrieval say nothing"
        return (
            f"Report on {self.samples} samples in {self.batches} batch{'es' * (self.batches > 1)}, "
            f"one instance = one {self.instances}, bounds in nats{whose}{untrained}"
        )


def measure(
    model: nn.Module,
    contrast: Contrast,
    training: Capture,
    loader: Iterable[Any],
    inputs: Callable[[Any], Any] | None,
    max_batches: int | None,
) -> Report:
    """:meth:`cmim_plugin.CMIM.report`. ``model``: without wrappers; ``training``: its capture."""
    if max_batches is not None and (not isinstance(max_batches, numbers.Integral) or max_batches < 1):
        raise CMIMError(f"max_batches must be an integer, 1 or more, or None for all; found {max_batches!r}.")
    if isinstance(loader, Tensor):
        raise CMIMError("The loader must give batches: for a single batch x, pass [x]; found a tensor.")
    device = next((p.device for p in model.parameters()), contrast.heads.weights.device)
    tallies = [_Tally(contrast, k) for k in range(len(contrast.taps))]
    generator, positions = torch.Generator("cpu").manual_seed(0), training.schedule.positions
    schedule = Schedule(len(tallies), None, positions, generator, shared=False).to(device)
    samples = batches = 0

    def observer(running: Pass, k: int, activation: Tensor) -> None:
        tallies[k].count_codes(activation, running.padding_mask)

    source, teacher, modules = training.batch_source, training.teacher, training.modules
    capture = Capture(model, contrast.taps, schedule, source, observer, teacher, modules)
    troubles: list[str] = []
    # A loader that shuffles or augments draws from the generators, too.
    with preserve_generators(model.parameters()), torch.no_grad(), _evaluating(model), force_eager():
        capture.attach()
        try:
            for batch in itertools.islice(loader, max_batches):
                args, kwargs = _inputs_of(batch, inputs, device)
                batches += 1
                try:
                    model(*args, **kwargs)
                except Exception as error:
                    hint = "" if inputs else f" {_INPUT_OF_BATCH}"
                    raise CMIMError(f"The model's forward raised {type(error).__name__}: {error}.{hint}") from error
                captured = capture.pop()
                troubles += captured.troubles()
                for tally in tallies:
                    tally.contrast_rows(captured)
                samples += max(pair.batch_size for pair in captured.pairs.values())
                schedule.advance()
        finally:
            capture.detach()
    if not batches:
        raise CMIMError("The loader gave no batch: nothing to report on. (A generator that was used up does that.)")
    found = [tally for tally in tallies if tally.positions and not tally.mismatched]
    why = troubles[0] if troubles else "In eval mode the model takes another way than in training."
    if not found:
        raise CMIMError(f"In eval mode no tap had both its binary activation and its latent. {why}")
    if len(found) < len(tallies):
        missing = [tally.tap.name for tally in tallies if tally not in found]
        message = f"The report leaves out these taps, whose pairs were not found in eval mode: {missing}. {why}"
        warnings.warn(message, CMIMWarning, stacklevel=3)
    return Report(
        taps=tuple(tally.result() for tally in found),
        samples=samples,
        batches=batches,
        instances="image" if positions is None else "position",
        rank=distributed.rank(),
        ranks=distributed.ranks(),
        heads_trained=not contrast.heads.lr or bool(contrast.heads.steps),
    )


class _Tally:
    """The sums of one tap over the batches."""

    def __init__(self, contrast: Contrast, k: int) -> None:
        self.contrast = contrast
        self.k = k
        self.tap = contrast.taps[k]
        self.mismatched = False  # in eval mode, the site of a_B holds another tensor, or one side is missing
        self.positions = self.instances = 0
        self.bound = self.ceiling = self.retrieved = 0.0
        #: For each channel, the number of positions with the higher code.
        self.higher = torch.zeros(self.tap.channels, dtype=torch.int64, device="cpu")
        self.bound_of = getattr(contrast.objective, "bound", None)

    def count_codes(self, activation: Tensor, mask: Tensor | None) -> None:
        """Count the codes of a_B, without padding."""
        if not activation.numel():
            return
        layout = self.tap.layouts[BINARY]
        if not self.positions and not is_two_valued(activation, layout):
            self.mismatched = True
        codes = layout.rows(_is_higher(activation))
        if mask is not None and mask.shape == (len(activation), layout.tokens(activation.shape)):
            # Repeat the mask for each attention head, or other entry of a dimension before the tokens.
            codes = codes[mask.repeat(1, len(codes) // max(mask.numel(), 1)).flatten().to(codes.device) != 0]
        self.positions += len(codes)
        self.higher += codes.sum(0).cpu()

    def contrast_rows(self, captured: Pass) -> None:
        """Add the bound and the retrieval of one batch."""
        pair = captured.pairs[self.k]
        if not pair.complete:
            self.mismatched = self.mismatched or any(rows is not None for rows in pair.rows)
            return
        binary, latent = pair.sides
        if pair.unpadded is not None:
            binary, latent = binary[pair.unpadded], latent[pair.unpadded]
        n = len(binary)
        if n < 2:
            return
        z_b, z_f = self.contrast.heads([self.k], [(binary, latent)])
        self.instances += n
        self.ceiling += n * math.log(n)
        self.retrieved += _retrieved(z_b, z_f)
        if self.bound_of is not None:
            (loss,) = self.contrast.objective(z_b[None], z_f[None], temperature=self.contrast.temperature, labels=None)
            self.bound += n * float(self.bound_of(loss, torch.tensor(n - 1, device="cpu")))

    def result(self) -> TapReport:
        """The figures."""

        def mean(total: float) -> float | None:
            return total / self.instances if self.instances else None

        return TapReport(
            self.tap.name,
            self.tap.channels,
            bound=mean(self.bound) if self.bound_of is not None else None,
            ceiling=mean(self.ceiling),
            retrieval=mean(self.retrieved),
            plus=int(self.higher.sum()) / (self.positions * self.tap.channels),
            dead=int((self.higher == 0).sum()),
            saturated=int((self.higher == self.positions).sum()),
        )


def _retrieved(z_b: Tensor, z_f: Tensor) -> float:
    """How many rows of ``z_b`` are nearest to their own row of ``z_f``; ``1 / k`` each if ``k`` are equally near."""
    with torch.autocast(z_b.device.type, enabled=False):
        scores = z_b @ z_f.mT
    own = scores.diagonal()[:, None]
    nearest = (scores <= own + _NOISE).all(1)  # NaN compares false
    equally_near = (scores >= own - _NOISE).sum(1).clamp_min(1)
    return float((nearest / equally_near).sum())


def _is_higher(activation: Tensor) -> Tensor:
    """Which codes are the higher of the two: bool, shaped like the activation.

    The threshold is zero, which fits if each channel or sample has a scale of its own; the middle if all values have
    one sign. A constant tensor has its sign for a code.
    """
    low, high = activation.amin(), activation.amax()
    apart = high - low > 1e-2 * torch.maximum(low.abs(), high.abs())
    one_sign = apart & ((low > 0) | (high <= 0))
    return activation > torch.where(one_sign, low / 2 + high / 2, 0)


def _inputs_of(
    batch: Any, inputs: Callable[[Any], Any] | None, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of the model, on its device."""
    found, what = batch, "the first element of a batch is"
    if inputs is not None:
        found, what = inputs(batch), "inputs= returned"
    elif isinstance(batch, (tuple, list, Mapping)):
        found = next(iter(batch.values() if isinstance(batch, Mapping) else batch), None)
    if not isinstance(found, (Tensor, tuple, list, Mapping)):
        raise CMIMError(
            "The input of the model must be a tensor, a tuple of positional inputs or a dict of keyword inputs; "
            f"{what} a {type(found).__name__}. Pass inputs=, a function from a batch to it."
        )
    return mapped(as_inputs(found), lambda _, value: value.to(device) if isinstance(value, Tensor) else value)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and each module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # a module may override train() to do more
        for module, training in modes.items():
            module.training = training


def _with_nan(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
