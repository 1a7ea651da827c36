"""Tables and plot of what overhead.py measured; tables.py asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from overhead import ARMS, Case

TARGET = 1.05  # of the bare step

Records = list[dict[str, Any]]
Rows = list[list[str]]


# --- tables: the header, then a row for each case --------------------------------------------------------------------


def table(records: Records, kind: str, device: str, arms: list[str] | None = None) -> str:
    """Markdown of one of `TABLES`, of the cases of one device ("cpu" or "cuda"), and what they have in common."""
    suite, make, explanation = TABLES[kind]
    shown = of(records, suite, device)
    if not shown:
        return "No results yet."
    present = dict.fromkeys(arm for record in shown for arm in record["arms"] if arm != "none")
    rows = make(shown, [arm for arm in present if not arms or arm in arms])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n\n" + f"{explanation} {caption(shown)}"


def of(records: Records, suite: str, device: str) -> Records:
    return [r for r in records if r["case"]["suite"] == suite and r["case"]["device"] == device]


def caption(records: Records) -> str:
    def ends(values: list[Any]) -> str:
        return " to ".join(dict.fromkeys(str(value) for value in (min(values), max(values))))

    def together(values: list[str]) -> str:
        return ", ".join(sorted(set(values)))

    return (
        f"{ends([r['rounds'] for r in records])} rounds, {together([r['device'] for r in records])}, "
        f"torch {together([r['versions']['torch'] for r in records])}, {ends([r['date'][:10] for r in records])}, "
        f"commit {together([r['commit'] for r in records])}."
    )


def setting(record: dict[str, Any]) -> list[str]:
    case = Case(**record["case"])
    return [case.label, f"{case.batch}"]


def with_interval(ratio: dict[str, Any]) -> str:
    low, high = ratio["interval"]
    return f"{ratio['median']:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def step_table(records: Records, arms: list[str]) -> Rows:
    rows = [["network", "batch", "bare step, ms", *(f"`{arm}`" for arm in arms)]]
    for record in records:
        measured = record["arms"]
        ratios = [with_interval(measured[arm]["ratio"]) if arm in measured else "" for arm in arms]
        rows.append([*setting(record), f"{1e3 * measured['none']['seconds']:.1f}", *ratios])
    return rows


def memory_table(records: Records, arms: list[str]) -> Rows:
    rows = [["network", "batch", "bare step's peak, MiB", *(f"`{arm}`" for arm in arms)]]
    for record in records:
        measured = record["arms"]
        ratios = [f"{measured[arm]['peak_ratio']:.3f}" if arm in measured else "" for arm in arms]
        rows.append([*setting(record), mib(measured["none"]["peak_bytes"]), *ratios])
    return rows


def split_table(records: Records, arms: list[str]) -> Rows:
    """What each phase of the step adds, in % of the bare step."""
    rows = [["network", "batch", "arm", "forward: taps", "loss: heads, critic", "backward", "optimizer", "all"]]
    for record in records:
        none = record["arms"]["none"]["seconds"]
        for arm in arms:
            if measured := record["arms"].get(arm):
                shares = [f"{100 * seconds / none:+.1f} %" for seconds in measured["extra_seconds"].values()]
                rows.append([*setting(record), f"`{arm}`", *shares])
    return rows


def attach_table(records: Records, arms: list[str]) -> Rows:
    rows = [["network", "batch", "forward pass, s", "attaching, s", "minus two passes, s"]]
    for record in records:
        seconds, forward = record["attach"]["seconds"], record["attach"]["forward_seconds"]
        rows.append([*setting(record), f"{forward:.3f}", f"{seconds:.3f}", f"{seconds - 2 * forward:+.3f}"])
    return rows


def taps_table(records: Records, arms: list[str]) -> Rows:
    rows = [["network", "batch", "arm", "taps", "added, ms", "straight line, ms"]]
    for record in records:
        for kind, (taps, added) in tap_series(record).items():
            slope, intercept, explained = line(taps, added)
            fit = f"{intercept:.2f} + {slope:.3f} a tap (R² = {explained:.3f})"
            each = ", ".join(f"{milliseconds:.2f}" for milliseconds in added)
            rows.append([*setting(record), f"`{kind}`", ", ".join(map(str, taps)), each, fit])
    return rows


def tap_series(record: dict[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """Of each kind of instance the numbers of taps, and the milliseconds that they add to the step."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for arm, measured in record["arms"].items():
        if arm != "none":
            taps, added = series.setdefault(arm.partition(":")[0], ([], []))
            taps.append(measured["taps"])
            added.append(1e3 * measured["extra_seconds"]["step"])
    return series


def line(x: list[int], y: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of the straight line through the points."""
    from scipy import stats

    fit = stats.linregress(x, y)
    return fit.slope, fit.intercept, fit.rvalue**2


def critic_table(records: Records, arms: list[str]) -> Rows:
    rows = [["rows", "queue", "naive, ms", "`info_nce`, ms", "ratio", "naive peak, MiB", "`info_nce` peak, MiB"]]
    for record in records:
        naive, own = record["arms"]["naive"], record["arms"]["info_nce"]
        times = [f"{1e3 * arm['seconds']:.2f}" for arm in (naive, own)]
        peaks = [mib(arm["peak_bytes"]) for arm in (naive, own)]
        case = record["case"]
        rows.append([f"{case['batch']}", f"{case['queue']}", *times, with_interval(own["ratio"]), *peaks])
    return rows


# Name: (suite, how its records become rows, what they are)
TABLES: dict[str, tuple[str, Callable[[Records, list[str]], Rows], str]] = {
    "step": (
        "step",
        step_table,
        "Time of a training step, as a ratio to the bare step of the same round: median and its 95 % interval "
        "(bootstrap).",
    ),
    "memory": (
        "step",
        memory_table,
        "Peak memory of a training step, with parameters, gradients and the optimizer's state, as a ratio to the bare "
        "step's.",
    ),
    "split": (
        "step",
        split_table,
        "What each phase of the step takes longer than in the bare step of the same round, in % of all of that step: "
        "medians.",
    ),
    "attach": ("step", attach_table, "Building a CMIM, and a forward pass in training mode: medians of five, in turn."),
    "taps": (
        "taps",
        taps_table,
        "What the first taps of a network whose taps are all of one shape add to its step, with all in every step.",
    ),
    "critic": (
        "critic",
        critic_table,
        "Forward and backward of the critic alone on embeddings of width 128: medians, and the 95 % interval "
        "(bootstrap) of the ratio to the naive one.",
    ),
}


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(records: Records, device: str, path: Path) -> None:
    """A column a network: ratio to the bare step, and milliseconds added, over the batch. Right: by taps; the critic.

    Bars are quartiles; the dashed line is the target.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = sorted(of(records, "step", device), key=lambda record: record["case"]["batch"])
    labels = sorted({setting(record)[0] for record in steps})
    figure, axes = plt.subplots(2, len(labels) + 1, figsize=(3.2 * (len(labels) + 1), 6), squeeze=False)
    for (above, below), label in zip(axes.T, labels, strict=False):
        mine = [record for record in steps if setting(record)[0] == label]
        for color, arm in enumerate(ARMS):
            measured = {r["case"]["batch"]: r["arms"][arm] for r in mine if arm in r["arms"] and arm != "none"}
            if not measured:
                continue
            middle = np.array([m["ratio"]["median"] for m in measured.values()])
            low, high = np.array([m["ratio"]["quartiles"] for m in measured.values()]).T
            style = {"marker": "o", "color": f"C{color}", "label": arm}
            above.errorbar(list(measured), middle, (middle - low, high - middle), capsize=2, **style)
            added = [1e3 * m["extra_seconds"]["step"] for m in measured.values()]
            below.plot(list(measured), added, **style)
        above.axhline(TARGET, color="gray", linestyle="--")
        above.set(title=label, ylabel="ratio to the bare step")
        below.set(ylabel="added, ms")
        for ax in (above, below):
            ax.set(xlabel="batch", xscale="log")
            ax.set_xticks([], minor=True)
            batches = sorted({record["case"]["batch"] for record in mine})
            ax.set_xticks(batches, [f"{batch}" for batch in batches])

    by_taps, critic = axes[:, -1]
    by_taps.set(title="taps of one shape", xlabel="taps", ylabel="added, ms")
    for record in of(records, "taps", device):
        for kind, (taps, added) in tap_series(record).items():
            by_taps.plot(taps, added, marker="o", label=", ".join([kind, *setting(record)[1:]]))
    critic.set(title="critic, forward and backward", xlabel="rows", ylabel="ms", xscale="log", yscale="log")
    critics = sorted(of(records, "critic", device), key=lambda record: record["case"]["batch"])
    for queue in sorted({record["case"]["queue"] for record in critics}):
        mine = [record for record in critics if record["case"]["queue"] == queue]
        milliseconds = [1e3 * record["arms"]["info_nce"]["seconds"] for record in mine]
        rows = [record["case"]["batch"] for record in mine]
        critic.set_xticks([], minor=True)
        critic.set_xticks(rows, [f"{row}" for row in rows])
        critic.plot(rows, milliseconds, marker="o", label=f"queue {queue}")
    for ax in (axes[0, 0], by_taps, critic):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
