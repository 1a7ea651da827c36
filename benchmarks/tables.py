"""Write what is in results/ into the marked sections of README.md and of the documents here.

    python benchmarks/tables.py

A section `<!-- table: NAME -->` ... `<!-- end -->` gets the table of results/NAME.jsonl, and
`<!-- table: NAME none image -->` those arms of it only; `<!-- pooled: NAME -->` gets one row an arm, its differences to
`none` over the pairs of all methods; `<!-- dense: NAME -->` what examples/dense.py makes of it;
`<!-- overhead: KIND DEVICE -->` (all likewise with arms) gets one of the tables of overhead_report.py from
results/overhead.json, which is also drawn into results/overhead-DEVICE.png.
A document without such a section stays as it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import overhead_report
from accuracy import ARMS, RESULTS, ROOT, arm_options, read_results
from overhead import read_results as read_overhead
from training import paired_difference  # accuracy.py makes the examples importable

DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "FINDINGS.md"]
SECTION = re.compile(r"(<!-- (table|pooled|dense|overhead): (\S+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

PAIRED = (
    "Differences are paired by seed, over the seeds that both arms have, in points, with their 95 % interval "
    "(Student's t), bold where it excludes zero."
)

Records = list[dict[str, Any]]


def difference(arm: dict[int, float], reference: dict[int, float]) -> str:
    """Mean of the differences over the seeds that both have, and its 95 % interval; bold where that excludes zero."""
    seeds = sorted(arm.keys() & reference.keys())
    if not seeds:
        return ""
    mean, half = paired_difference([reference[s] for s in seeds], [arm[s] for s in seeds])
    if np.isnan(half):
        return f"{mean:+.2f} (one seed)"
    text = f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
    return f"**{text}**" if abs(mean) > half else text


def control_of(arm: str) -> str | None:
    """The arm that this one has to beat for the gain to be CMIM's, each with its usual settings."""
    options = arm_options(arm)
    for control in ("distill", "smoothing"):
        if options.get(control):
            return control if arm != control else None
    return "position_shuffled" if arm.partition("+")[0] == "position" else None


def table(records: Records, arms: list[str] | None = None) -> str:
    """Markdown: a row for each method and arm, and what the runs have in common."""
    accuracy: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    rows: dict[tuple[str, str], Records] = defaultdict(list)
    for record in records:
        accuracy[record["method"], record["arm"]][record["seed"]] = record["accuracy"]
        rows[record["method"], record["arm"]].append(record)

    order = list(ARMS)
    listed = {arm for _, arm in rows if not arms or arm in arms}
    controlled = any(control_of(arm) in listed for arm in listed)
    # Where the only other test was one halfway, the best is the last.
    peaked = any(r["best_epoch_accuracy"] != r["accuracy"] for r in records if r["arm"] in listed)
    columns = ["method", "arm", "seeds", "test accuracy", "training accuracy", "minus `none`"]
    columns += ["best epoch"] * peaked + ["minus its control"] * controlled
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    shown: Records = []
    for method, arm in sorted(rows, key=lambda row: (row[0], order.index(row[1].partition("+")[0]), row[1])):
        compared = {a for m, a in rows if m == method and a in listed} - {"none"}
        if arm not in listed or not compared:
            continue
        runs = rows[method, arm]
        shown += runs
        values = accuracy[method, arm]
        spread = f" ± {np.std(list(values.values()), ddof=1):.2f}" if len(values) > 1 else ""
        to_none = difference(values, accuracy.get((method, "none"), {})) if arm != "none" else ""
        control = control_of(arm)
        to_control = difference(values, accuracy.get((method, control), {})) if control in listed else ""
        to_control = to_control and f"`{control}`: {to_control}"
        trained = np.mean([run["train_accuracy"] for run in runs])
        best = np.mean([run["best_epoch_accuracy"] for run in runs])
        lines.append(
            f"| {method} | `{arm}` | {len(runs)} | {np.mean(list(values.values())):.2f}{spread} | {trained:.1f} "
            f"| {to_none} |" + f" {best:.2f} |" * peaked + f" {to_control} |" * controlled
        )
    return "\n".join(lines) + "\n\n" + caption(shown, peaked) if shown else "No results yet."


def pooled(records: Records, arms: list[str] | None = None) -> str:
    """Markdown: a row for each arm, over the pairs of all methods. With `minus:ARM` among the arms: to that."""
    arms = arms or []
    reference = next((arm.removeprefix("minus:") for arm in arms if arm.startswith("minus:")), "none")
    arms = [arm for arm in arms if not arm.startswith("minus:")]
    accuracy = {(r["method"], r["seed"], r["arm"]): r["accuracy"] for r in records}
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (method, seed, arm), value in accuracy.items():
        base = accuracy.get((method, seed, reference))
        if arm not in ("none", reference) and base is not None and (not arms or arm in arms):
            pairs[arm][method].append(value - base)
    methods = sorted({method for of_arm in pairs.values() for method in of_arm})
    lines = [f"| arm | pairs | minus `{reference}` | {' | '.join(methods)} |", "|---" * (3 + len(methods)) + "|"]
    for arm in sorted(pairs):
        together = dict(enumerate(d for of_method in pairs[arm].values() for d in of_method))
        means = (f"{np.mean(pairs[arm][m]):+.2f}" if pairs[arm][m] else "" for m in methods)
        difference_to_zero = difference(together, dict.fromkeys(together, 0.0))
        lines.append(f"| `{arm}` | {len(together)} | {difference_to_zero} | {' | '.join(means)} |")
    note = "The pairs of one seed with several methods count as independent. "
    return "\n".join(lines) + "\n\n" + note + caption(records, best_epoch=False) if pairs else "No results yet."


def dense_table(records: Records, arms: list[str] | None = None) -> str:
    """Markdown: a row for each method and arm of the dense prediction."""
    import dense  # not above: it imports this module

    return dense.table(records, arms)


def caption(records: Records, best_epoch: bool = True) -> str:
    config = records[0]["config"]
    tested = "the test set" if config["split"] == "test" else f"{config['held_out']} held-out training images"
    return (
        f"{config['data']}, {config['train_size'] or 'all'} training images, {config['epochs']} epochs, "
        f"{config['model']} of width {config['width']}, batches of {config['batch_size']}; accuracy (%) on {tested} "
        "after the last epoch, mean ± standard deviation; training accuracy as counted during the last epoch. "
        + PAIRED
        + " "
        + "The best of the epochs tested is chosen with hindsight. " * best_epoch
        + origin(records)
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


def fill(text: str, results: Path) -> str:
    """The document with its marked sections rewritten."""
    overhead_records = list(read_overhead(results / "overhead.json").values())

    def section(match: re.Match[str]) -> str:
        begin, source, name, arms, end = match.groups()
        if source == "overhead":
            content = overhead_report.table(overhead_records, name, *arms.split()[:1], arms.split()[1:])
        else:
            write = {"table": table, "pooled": pooled, "dense": dense_table}[source]
            content = write(list(read_results(results / f"{name}.jsonl").values()), arms.split())
        return f"{begin}\n{content}\n\n{end}"

    return SECTION.sub(section, text)


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        filled = fill(text, RESULTS)
        if filled != text:
            document.write_text(filled, encoding="utf-8")
        print(f"{document.relative_to(ROOT)}: {len(SECTION.findall(text))} tables")
    records = list(read_overhead(RESULTS / "overhead.json").values())
    for device in sorted({record["case"]["device"] for record in records}):
        overhead_report.plot(records, device, RESULTS / f"overhead-{device}.png")


if __name__ == "__main__":
    main()
