"""Write what is in results/ into the marked sections of README.md and of the documents here, and draw the gains.

    python benchmarks/tables.py

A section `<!-- KIND: NAMES -->` ... `<!-- end -->` is rewritten. NAMES may end in `/ ARM ARM ...`: only those arms.

    gains: NAME NAME ...     gain over the bare network, by setting (results/NAME.jsonl) and method
    summary: NAME NAME ...   gain over the bare network, a row for each setting and arm, over the pairs of all methods
    table: NAME              all arms of one file
    pooled: NAME minus:ARM   a row an arm, its differences to ARM (`none` if not given) over the pairs of all methods
    dense: NAME              dense prediction
    inside: NAME             what an arm changes inside the network, over the pairs of all methods (why.py)
    overhead: KIND DEVICE    what a training step takes: KIND is `step` (time) or `memory`, from results/overhead.jsonl
                             for a CPU and results/gpu.jsonl for a GPU (`cuda`)

A number within a sentence stands between `<!-- number: KIND ... -->` and `<!-- end -->`:

    gain NAME ARM [REFERENCE]    the mean of ARM minus REFERENCE (`none`), its interval and the number of pairs
    fit NAME ARM [REFERENCE]     the same of the accuracy on the training images, as counted during the last epoch
    between NAME OTHER ARM       the mean of ARM in file NAME minus ARM in file OTHER, over the runs that both have
    mean NAME ARM [OTHER]        mean test accuracy of an arm, by method; of the seeds that OTHER has as well
    cost DEVICE ARM              the lowest and the highest ratio of a training step to the bare step
    cases DEVICE                 how many settings that is of
    card                         the GPU of results/gpu.jsonl and its torch
    checks                       how many of tests/gpu_checks.py passed there
    launches NETWORK             kernels that a step launched there, bare and with CMIM
    best NAME                    of each method, the best arm with CMIM and the best bare network: arms and accuracies
    inside NAME ARM FIGURE       of the codes of an arm: `dead`, `entropy` or `correlation`, the mean over all its runs
    sweep FILE                   how many of timm's families passed `make test-timm`, and with which version of timm

`<!-- picture: NAMES / ARMS -->` (or the first `gains` section) says what docs/gains-light.svg and docs/gains-dark.svg
show. A document without any of these stays as it is. Results that do not exist yet have no rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import overhead
from accuracy import ARMS, RESULTS, ROOT, arm_options, beside, read_results

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "FINDINGS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PICTURES = {"light": ROOT / "docs" / "gains-light.svg", "dark": ROOT / "docs" / "gains-dark.svg"}
KINDS = "gains|summary|table|pooled|dense|inside|overhead"
SECTION = re.compile(rf"(<!-- ({KINDS}): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"(<!-- number: (.*?) -->).*?(<!-- end -->)", re.DOTALL)
PICTURED = re.compile(r"<!-- (?:gains|picture): (.*?) -->")

METHOD_NAMES = {"irnet": "IR-Net", "bireal": "Bi-Real Net", "reactnet": "ReActNet"}
CONTROLS = ("shuffled", "entropy", "balance")
SHOWN = ("default", *CONTROLS)  # by `gains`, where no arms are given
DENSE_COLUMNS = {"miou": "mIoU (%)", "pixel_accuracy": "pixel accuracy (%)"}

PAIRED = (
    "Differences are paired by seed, over the seeds that both arms have, in points, with their 95 % interval "
    "(Student's t), bold where it excludes zero."
)

Records = list[dict[str, Any]]


# --- differences -----------------------------------------------------------------------------------------------------


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of b - a and the half width of its 95 % interval (Student's t), NaN for a single pair."""
    from scipy import stats

    differences = np.subtract(b, a)
    if len(differences) < 2:
        return float(differences.mean()), float("nan")
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return float(differences.mean()), float(half)


def interval(mean: float, half: float, digits: int = 2) -> str:
    """Bold where it excludes zero."""
    if np.isnan(half):
        return f"{mean:+.{digits}f} (one seed)"
    text = f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"
    return f"**{text}**" if abs(mean) > half else text


def difference(arm: dict[int, float], reference: dict[int, float]) -> str:
    """Mean of the differences over the seeds that both have, and its 95 % interval."""
    seeds = sorted(arm.keys() & reference.keys())
    return interval(*paired_difference([reference[s] for s in seeds], [arm[s] for s in seeds])) if seeds else ""


def by_seed(records: Records, figure: str = "accuracy") -> dict[tuple[str, str], dict[int, float]]:
    """(method, arm) -> seed -> accuracy."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for record in records:
        found[record["method"], record["arm"]][record["seed"]] = record[figure]
    return found


def rank(arm: str) -> tuple[int, str]:
    return list(ARMS).index(arm.partition("+")[0]), arm


def control_of(arm: str) -> str | None:
    """The arm that this one has to beat for the gain to be CMIM's, each with its usual settings."""
    options = arm_options(arm)
    for control in ("distill", "smoothing", "two_step"):
        if options.get(control):
            return beside(arm, control) if arm.partition("+")[0] != control else None
    return beside(arm, "shuffled") if arm.partition("+")[0] == "default" else None


# --- gains: the table and the picture --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """Of one arm over the bare network that was trained by the same optimizer."""

    setting: str
    method: str
    arm: str
    pairs: int
    bare: float
    accuracy: float
    mean: float
    half: float  # of the 95 % interval; NaN for one pair
    gap: float  # full precision minus bare network; NaN where the former was not trained

    @property
    def is_control(self) -> bool:
        return self.arm.partition("+")[0] in CONTROLS


def setting_of(record: dict[str, Any], name: str) -> str:
    config = record["config"]
    data = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "fashion_mnist": "Fashion-MNIST"}.get(
        config["data"], config["data"]
    )
    model = {"vgg_small": "VGG-Small", "resnet8": "ResNet-8", "resnet20": "ResNet-20", "resnet18": "ResNet-18"}[
        config["model"]
    ]
    images = f"{config['train_size']:,}" if config["train_size"] else "all"
    # Records of before the plug-in trained its heads name no optimizer.
    usual = "one Adam, version 0.1"
    optimizer = {"sgd": "SGD", "adam": "Adam", "own": "each method's optimizer"}.get(config.get("optimizer"), usual)
    held_out = ", held-out images" if config["split"] == "val" else ""
    return f"{data}, {images} images, {model}, {config['epochs']} epochs, {optimizer}{held_out}"


def gains(names: list[str], arms: list[str], results: Path) -> list[Gain]:
    found = []
    for name in names:
        records = list(read_results(results / f"{name}.jsonl").values())
        accuracy = by_seed(records)
        for method, arm in sorted(accuracy, key=lambda key: (list(METHOD_NAMES).index(key[0]), rank(key[1]))):
            bare = accuracy.get((method, beside(arm, "none")), {})
            seeds = sorted(accuracy[method, arm].keys() & bare.keys())
            if arm not in (arms or SHOWN) or not seeds:
                continue
            with_arm, without = ([of[s] for s in seeds] for of in (accuracy[method, arm], bare))
            full = list(accuracy.get((method, "full_precision"), {}).values())
            gap = float(np.mean(full) - np.mean(without)) if full else float("nan")
            mean, half = paired_difference(without, with_arm)
            setting = setting_of(records[0], name)
            bare_mean, arm_mean = float(np.mean(without)), float(np.mean(with_arm))
            found.append(Gain(setting, method, arm, len(seeds), bare_mean, arm_mean, mean, half, gap))
    return found


def gains_table(found: list[Gain]) -> str:
    """Markdown: a row for each setting, method and arm."""
    if not found:
        return "No results yet."
    with_gap = any(not np.isnan(gain.gap) for gain in found)
    columns = ["setting", "method", "arm", "pairs", "bare network", "with", "gain (95 % interval)"]
    columns += ["share of the gap"] * with_gap
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    last = None
    for gain in found:
        cells = [gain.setting if gain.setting != last else "", METHOD_NAMES[gain.method], f"`{gain.arm}`"]
        cells += [f"{gain.pairs}", f"{gain.bare:.2f}", f"{gain.accuracy:.2f}", interval(gain.mean, gain.half)]
        cells += ["" if np.isnan(gain.gap) else f"{100 * gain.mean / gain.gap:.0f} %"] * with_gap
        lines.append(f"| {' | '.join(cells)} |")
        last = gain.setting
    note = (
        "Test accuracy (%) after the last epoch. The gain is paired by seed, in points, with its 95 % interval "
        "(Student's t), bold where it excludes zero."
    )
    note += " Share of the gap: of what full precision gains over the bare network." * with_gap
    return "\n".join(lines) + "\n\n" + note


def digest(found: list[Gain]) -> str:
    """Of what the picture shows, which is written into it."""
    return hashlib.sha256(json.dumps([astuple(gain) for gain in found]).encode()).hexdigest()[:16]


# Surface, text, muted text, grid, control, and the colours of up to four arms.
THEMES = {
    "light": ("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#9198a1", ("#0a66c2", "#c2410c", "#0f766e", "#7c3aed")),
    "dark": ("#0d1117", "#f0f6fc", "#9198a1", "#30363d", "#656c76", ("#4493f8", "#f0883e", "#2dd4bf", "#b392f0")),
}


def draw(found: list[Gain], theme: str, path: Path) -> None:
    """Gain and interval of each arm, a row each, by setting and method; controls in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    surface, text, muted, grid, grey, colours = THEMES[theme]
    arms = sorted({gain.arm for gain in found if not gain.is_control}, key=rank)
    colour = {arm: colours[i % len(colours)] for i, arm in enumerate(arms)}
    controls = sorted({gain.arm for gain in found if gain.is_control}, key=rank)
    marker = dict(zip(controls, "sD^v", strict=False))

    rows: list[tuple[float, Gain]] = []
    titles: list[tuple[float, str]] = []
    labels: list[tuple[float, str]] = []
    y, setting, method = 0.0, "", ""
    for gain in found:
        if gain.setting != setting:
            y += 1.2 if setting else 0.0
            titles.append((y, gain.setting))
            y, setting, method = y + 1.1, gain.setting, ""
        elif gain.method != method:
            y += 0.45
        if gain.method != method:
            labels.append((y, METHOD_NAMES[gain.method]))
            method = gain.method
        rows.append((y, gain))
        y += 0.75

    style = {
        "svg.hashsalt": "gains",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 7,
        "text.color": text,
        "axes.edgecolor": grid,
    }
    with matplotlib.rc_context(style):
        legend_rows = -(-(len(arms) + len(controls)) // 2)
        height = 0.45 + 0.15 * legend_rows + 0.17 * y
        figure, axes = plt.subplots(figsize=(4.5, height), facecolor=surface)
        axes.set_facecolor(surface)
        axes.axvline(0, color=muted, linewidth=0.8, zorder=1)
        for at, gain in rows:
            shade = grey if gain.is_control else colour[gain.arm]
            half = 0.0 if np.isnan(gain.half) else gain.half
            axes.plot([gain.mean - half, gain.mean + half], [at, at], color=shade, linewidth=1.6, zorder=2)
            shape = marker.get(gain.arm, "o")
            axes.plot([gain.mean], [at], shape, color=shade, markersize=4, markeredgewidth=0, zorder=3)
            note = f"{round(gain.mean, 1) + 0.0:+.1f}"  # no "-0.0"
            axes.annotate(
                note,
                (gain.mean + half, at),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color=muted if gain.is_control else text,
            )
        left = axes.get_xlim()[0]
        side = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        for at, title in titles:
            axes.annotate(title, (0, at), (-58, 0), va="center", ha="left", fontsize=7, **side)
        for at, name in labels:
            axes.annotate(name, (0, at), (-4, 0), va="center", ha="right", color=muted, **side)
        axes.set_xlim(left, axes.get_xlim()[1] * 1.05)
        axes.set_ylim(y, -0.6)
        axes.set_yticks([])
        axes.grid(axis="x", color=grid, linewidth=0.5)
        axes.set_axisbelow(True)
        for edge in ("top", "left", "right"):
            axes.spines[edge].set_visible(False)
        axes.tick_params(axis="x", colors=muted, length=0)
        axes.set_xlabel("gain in test accuracy over the bare network, points (95 % interval)", color=muted)
        handles = [
            axes.plot([], [], "-o", color=colour[arm], markersize=4, linewidth=1.6, label=words(arm))[0] for arm in arms
        ]
        handles += [
            axes.plot(
                [], [], f"-{marker[arm]}", color=grey, markersize=4, linewidth=1.6, label=f"control: {words(arm)}"
            )[0]
            for arm in controls
        ]
        figure.legend(handles=handles, loc="upper center", ncols=2, frameon=False, fontsize=7, labelcolor=text)
        figure.subplots_adjust(
            left=0.19, right=0.97, top=1 - (0.15 + 0.15 * legend_rows) / height, bottom=0.36 / height
        )
        metadata = {"Date": None, "Creator": None, "Title": "Gain over the bare network", "Description": digest(found)}
        figure.savefig(path, metadata=metadata if path.suffix == ".svg" else None, facecolor=surface)
        plt.close(figure)


def words(arm: str) -> str:
    name, _, variant = arm.partition("+")
    known = {
        "default": "CMIM",
        "shuffled": "shuffled pairs",
        "entropy": "code against itself",
        "balance": "balance and decorrelation",
    }
    return f"{known.get(name, name)}{', ' * bool(variant)}{variant.replace('=', ' ').replace(',', ', ')}"


# --- tables ----------------------------------------------------------------------------------------------------------


def table(records: Records, arms: list[str]) -> str:
    """Markdown: a row for each method and arm, and what the runs have in common."""
    accuracy = by_seed(records)
    listed = {arm for _, arm in accuracy if not arms or arm in arms}
    controlled = any(control_of(arm) in listed for arm in listed)
    columns = ["method", "arm", "seeds", "test accuracy", "training accuracy", "minus `none`"]
    columns += ["minus its control"] * controlled
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    shown: Records = []
    for method, arm in sorted(accuracy, key=lambda key: (key[0], rank(key[1]))):
        if arm not in listed:
            continue
        runs = [r for r in records if (r["method"], r["arm"]) == (method, arm)]
        shown += runs
        values = accuracy[method, arm]
        none, control = beside(arm, "none"), control_of(arm)
        to_none = difference(values, accuracy.get((method, none), {})) if arm != none else ""
        to_control = difference(values, accuracy.get((method, control), {})) if control in listed else ""
        to_control = to_control and f"`{control}`: {to_control}"
        trained = np.mean([run["train_accuracy"] for run in runs])
        spread = f" ± {np.std(list(values.values()), ddof=1):.2f}" if len(values) > 1 else ""
        lines.append(
            f"| {method} | `{arm}` | {len(runs)} | {np.mean(list(values.values())):.2f}{spread} | {trained:.1f} "
            f"| {to_none} |" + f" {to_control} |" * controlled
        )
    return "\n".join(lines) + "\n\n" + caption(shown) if shown else "No results yet."


def pooled(records: Records, arms: list[str]) -> str:
    """Markdown: a row for each arm, over the pairs of all methods. With `minus:ARM` among the arms: to that."""
    reference = next((arm.removeprefix("minus:") for arm in arms if arm.startswith("minus:")), "none")
    arms = [arm for arm in arms if not arm.startswith("minus:")]
    accuracy = by_seed(records)
    named = arms or [
        a for a in dict.fromkeys(a for _, a in accuracy) if a not in (beside(a, "none"), beside(a, reference))
    ]
    pairs = {arm: differences(accuracy, arm, reference) for arm in named}
    pairs = {arm: of_method for arm, of_method in pairs.items() if any(of_method.values())}
    methods = sorted({method for of_arm in pairs.values() for method in of_arm})
    lines = [f"| arm | pairs | minus `{reference}` | {' | '.join(methods)} |", "|---" * (3 + len(methods)) + "|"]
    for arm in sorted(pairs, key=rank):
        together = [d for of_method in pairs[arm].values() for d in of_method]
        means = (f"{np.mean(pairs[arm][m]):+.2f}" if pairs[arm].get(m) else "" for m in methods)
        difference_to_zero = interval(*paired_difference(np.zeros(len(together)), together))
        lines.append(f"| `{arm}` | {len(together)} | {difference_to_zero} | {' | '.join(means)} |")
    note = "The pairs of one seed with several methods count as independent. "
    return "\n".join(lines) + "\n\n" + note + caption(records) if pairs else "No results yet."


def differences(accuracy: dict[tuple[str, str], dict[int, float]], arm: str, reference: str) -> dict[str, list[float]]:
    """Method -> arm minus reference, over the seeds that both have. A reference without settings gets the arm's
    optimizer."""
    found = {}
    for (method, own), values in accuracy.items():
        base = accuracy.get((method, reference if "+" in reference else beside(arm, reference)), {})
        if own == arm:
            found[method] = [value - base[seed] for seed, value in values.items() if seed in base]
    return found


def summary(names: list[str], arms: list[str], results: Path) -> str:
    """Markdown: a row for each setting and arm, the gain over the bare network of all methods and of each."""
    lines = [f"| setting | arm | pairs | gain, all methods | {' | '.join(METHOD_NAMES.values())} |"]
    lines.append("|---" * (4 + len(METHOD_NAMES)) + "|")
    for name in names:
        records = list(read_results(results / f"{name}.jsonl").values())
        accuracy = by_seed(records)
        setting = setting_of(records[0], name) if records else ""
        for arm in arms:
            pairs = differences(accuracy, arm, "none")
            together = [d for of_method in pairs.values() for d in of_method]
            if together:
                means = (f"{np.mean(pairs[m]):+.2f}" if pairs.get(m) else "" for m in METHOD_NAMES)
                gain = interval(*paired_difference(np.zeros(len(together)), together))
                lines.append(f"| {setting} | `{arm}` | {len(together)} | {gain} | {' | '.join(means)} |")
                setting = ""
    if len(lines) == 2:
        return "No results yet."
    return "\n".join(lines) + (
        "\n\nPoints of test accuracy after the last epoch, minus the bare network of the same seed; 95 % interval in "
        "brackets, bold where it excludes zero."
    )


def overhead_of(results: Path, device: str) -> Records:
    """The newest records of a device."""
    return overhead.read_results(results / ("gpu.jsonl" if device == "cuda" else "overhead.jsonl"))


def on_the_gpu(results: Path, key: str) -> dict[str, dict[str, Any]]:
    """The records of gpu.jsonl that have this key: of each check, or network, the newest."""
    path = results / "gpu.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {r.get("network") or r[key]: r for r in records if key in r}


def number(wanted: list[str], results: Path) -> str:
    """One number within a sentence."""
    kind, *rest = wanted
    name = rest.pop(0) if rest else ""
    if kind in ("gain", "fit"):
        figure = "accuracy" if kind == "gain" else "train_accuracy"
        accuracy = by_seed(list(read_results(results / f"{name}.jsonl").values()), figure)
        pairs = differences(accuracy, rest[0], rest[1] if len(rest) > 1 else "none")
        together = [d for of_method in pairs.values() for d in of_method]
        return in_words(together)
    if kind == "between":
        here, there = (by_seed(list(read_results(results / f"{n}.jsonl").values())) for n in (name, rest[0]))
        keys = [(m, rest[1]) for m in METHOD_NAMES]
        return in_words([here[k][s] - there[k][s] for k in keys for s in here[k].keys() & there[k].keys()])
    if kind in ("cost", "cases"):
        shown = overhead_of(results, name)
        if kind == "cases":
            return f"{len({json.dumps(r['config']) for r in shown})}"
        ratios = [r["ratio"] for r in shown if r["arm"] == rest[0]]
        return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not measured yet"
    if kind == "checks":
        checks = on_the_gpu(results, "check").values()
        return f"{sum(r['error'] is None for r in checks)} of {len(checks)}"
    if kind == "launches":
        found = on_the_gpu(results, "launches")
        return "{none} bare, {position} with CMIM".format(**found[name]["launches"]) if found else "not measured yet"
    if kind == "card":
        records = overhead_of(results, "cuda")
        return f"{records[-1]['device']}, torch {records[-1]['versions']['torch']}" if records else "not measured yet"
    if kind == "mean":
        accuracy = by_seed(list(read_results(results / f"{name}.jsonl").values()))
        own, other = ({m: accuracy.get((m, arm), {}) for m in METHOD_NAMES} for arm in (rest[0], rest[-1]))
        shared = {m: [value for seed, value in own[m].items() if seed in other[m]] for m in METHOD_NAMES}
        means = {m: np.mean(values) for m, values in shared.items() if values}
        return ", ".join(f"{METHOD_NAMES[method]} {mean:.1f} %" for method, mean in means.items()) or "not measured yet"
    if kind == "best":
        return best_of(by_seed(list(read_results(results / f"{name}.jsonl").values())))
    if kind == "inside":
        from why import mean_of  # here, for why.py imports this file

        records = read_results(results / f"{name}.jsonl").values()
        return f"{np.mean([mean_of(r, rest[1]) for r in records if r['arm'] == rest[0]]):.3g}"
    if kind == "sweep":
        record = json.loads((results / name).read_text())
        passed, every = record["passed"], len(record["families"])
        counts = " and ".join(f"{len(families)} of {every} ({method})" for method, families in passed.items())
        return f"{counts}, timm {record['versions']['timm']}"
    raise SystemExit(f"No such number: {' '.join(wanted)}")


def in_words(differences: Sequence[float]) -> str:
    if len(differences) < 2:
        return "not measured yet"
    mean, half = paired_difference(np.zeros(len(differences)), differences)
    return f"{mean:+.2f} points (95 % CI {mean - half:+.2f} to {mean + half:+.2f}, {len(differences)} pairs)"


def best_of(accuracy: dict[tuple[str, str], dict[int, float]]) -> str:
    """In words: for each method, the arm with the highest mean over two seeds or more, with CMIM and without."""
    found = []
    for method in METHOD_NAMES:
        of_method = {arm: list(by.values()) for (m, arm), by in accuracy.items() if m == method and len(by) > 1}
        means = {arm: float(np.mean(values)) for arm, values in of_method.items()}
        if means:
            bare = max((arm for arm in means if arm.startswith("none")), key=means.__getitem__)
            best = max((arm for arm in means if not arm.startswith("none")), key=means.__getitem__)
            found.append(
                f"{METHOD_NAMES[method]} {means[best]:.1f} % (`{best}`) against {means[bare]:.1f} % (`{bare}`)"
            )
    return "; ".join(found)


def dense_table(records: Records, arms: list[str]) -> str:
    """Markdown: a row for each method and arm of the dense prediction."""
    shown = [r for r in records if not arms or r["arm"] in arms]
    if not shown:
        return "No results yet."
    names = [name for name in DENSE_COLUMNS if name in shown[0]["metrics"]]
    columns = ["method", "arm", "seeds", *(c for name in names for c in (DENSE_COLUMNS[name], "minus `none`"))]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    values: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for r in shown:
        for name in names:
            values[r["method"], r["arm"], name][r["seed"]] = 100 * r["metrics"][name]
    for method, arm in dict.fromkeys((r["method"], r["arm"]) for r in shown):
        cells = [method, f"`{arm}`", str(len(values[method, arm, names[0]]))]
        for name in names:
            seeds = values[method, arm, name]
            spread = f" ± {np.std(list(seeds.values()), ddof=1):.2f}" if len(seeds) > 1 else ""
            to_none = difference(seeds, values[method, "none", name]) if arm != "none" else ""
            cells += [f"{np.mean(list(seeds.values())):.2f}{spread}", to_none]
        lines.append(f"| {' | '.join(cells)} |")
    config = shown[0]["config"]
    return (
        "\n".join(lines)
        + "\n\n"
        + (
            f"{config['data']}, images of {' x '.join(map(str, config['size']))} pixels, an encoder-decoder of width "
            f"{config['width']}, {config['epochs']} epochs, batches of {config['batch_size']}; "
            f"{config['split']} images, after the last epoch, mean ± standard deviation. {PAIRED} {origin(shown)}"
        )
    )


def caption(records: Records) -> str:
    config = records[0]["config"]
    tested = "the test set" if config["split"] == "test" else f"{config['held_out']} held-out training images"
    trained = f", optimizer {config['optimizer']}" if "optimizer" in config else ""
    return (
        f"{config['data']}, {config['train_size'] or 'all'} training images, {config['epochs']} epochs, "
        f"{config['model']} of width {config['width']}, batches of {config['batch_size']}{trained}; accuracy (%) on "
        f"{tested} after the last epoch, mean ± standard deviation; training accuracy as counted during the last "
        f"epoch. {PAIRED} {origin(records)}"
    )


def origin(records: Records) -> str:
    """How many runs, when, on what and by which code."""
    dates = sorted({record["date"][:10] for record in records})
    return (
        f"{len(records)} runs, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, "
        f"{together(records, 'device')}, commit {together(records, 'commit')}."
    )


def together(records: Records, key: str) -> str:
    return ", ".join(sorted({record[key] for record in records}))


# --- documents -------------------------------------------------------------------------------------------------------


def split_names(text: str) -> tuple[list[str], list[str]]:
    """`a b / c d` -> [a, b], [c, d]."""
    names, _, arms = text.partition("/")
    return names.split(), arms.split()


def fill(text: str, results: Path) -> str:
    """The document with its marked sections rewritten."""

    def section(match: re.Match[str]) -> str:
        begin, kind, wanted, end = match.groups()
        names, arms = split_names(wanted)
        if kind == "overhead":
            what, on, *shown = names
            if what not in ("step", "memory"):
                return match[0]  # a measurement that is made no more
            content = overhead.table(overhead_of(results, on), what, on, tuple(shown))
        elif kind == "gains":
            content = gains_table(gains(names, arms, results))
        elif kind == "summary":
            content = summary(names, arms or list(SHOWN), results)
        else:
            from why import pooled as pooled_inside  # here, for why.py imports this file

            write = {"table": table, "pooled": pooled, "dense": dense_table, "inside": pooled_inside}[kind]
            content = write(list(read_results(results / f"{names[0]}.jsonl").values()), names[1:] + arms)
        return f"{begin}\n{content}\n\n{end}"

    def inline(match: re.Match[str]) -> str:
        begin, wanted, end = match.groups()
        return f"{begin}{number(wanted.split(), results)}{end}"

    return NUMBER.sub(inline, SECTION.sub(section, text))


def pictured(text: str, results: Path) -> list[Gain]:
    """What the picture shows: by the document's first marker that says so."""
    match = PICTURED.search(text)
    return gains(*split_names(match[1]), results) if match else []


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        filled = fill(text, RESULTS)
        if filled != text:
            document.write_text(filled, encoding="utf-8")
        if SECTION.search(text) or NUMBER.search(text):
            sections, numbers = len(SECTION.findall(text)), len(NUMBER.findall(text))
            print(f"{document.relative_to(ROOT)}: tables: {sections}, numbers: {numbers}")
    found = pictured(DOCUMENTS[0].read_text(encoding="utf-8"), RESULTS)
    for theme, path in PICTURES.items():
        if found:
            draw(found, theme, path)


if __name__ == "__main__":
    main()
