"""What CMIM changes inside a network: a table from the records' `inside` block.

    python benchmarks/why.py overfit-sgd
    python benchmarks/why.py overfit-sgd --arms none default shuffled entropy balance

A row a method and arm, means over seeds and layers: accuracy, share of dead channels, bit entropy, correlation of two
channels, and how unevenly the task's gradient reaches the layers (the largest layer's norm, relative to its weight's,
divided by the smallest's). Beside each, the difference to the bare network of the same seed, with its 95 % interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from accuracy import RESULTS, beside, read_results
from tables import interval, paired_difference, rank

COLUMNS = {
    "accuracy (%)": lambda record: record["accuracy"],
    "dead channels (%)": lambda record: 100 * mean_of(record, "dead"),
    "bit entropy (bits)": lambda record: mean_of(record, "entropy"),
    "correlation": lambda record: mean_of(record, "correlation"),
    "log10 gradient spread": lambda record: spread(record),
}


def mean_of(record: dict[str, Any], name: str) -> float:
    """Mean over layers; a layer with fewer than two live channels has no correlation."""
    values = [code[name] for code in record["inside"]["codes"].values() if code[name] is not None]
    return float(np.mean(values)) if values else float("nan")


def spread(record: dict[str, Any]) -> float:
    norms = [norm for norm in record["inside"]["gradient_norms"].values() if norm]
    return float(np.log10(max(norms) / min(norms))) if norms else float("nan")


def looked_into(records: list[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The records with an `inside` block, by method, arm and seed."""
    return {(r["method"], r["arm"], r["seed"]): r for r in records if r["inside"]["codes"]}


def cell(name: str, own: list[dict[str, Any]], bare: list[dict[str, Any] | None], digits: int) -> str:
    """The mean of a column over some records, and its difference to the bare network's of the same runs, if any."""
    value = COLUMNS[name]
    pairs = [(value(b), value(o)) for b, o in zip(bare, own, strict=True) if b is not None and b is not o]
    difference = f", {interval(*paired_difference(*zip(*pairs, strict=True)), digits=digits)}" if pairs else ""
    return f"{np.mean(list(map(value, own))):.3g}{difference}"


def table(records: list[dict[str, Any]], arms: list[str]) -> str:
    """Markdown."""
    by_run = looked_into(records)
    lines = [f"| method | arm | seeds | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for method, arm in sorted({key[:2] for key in by_run}, key=lambda key: (key[0], rank(key[1]))):
        if not arms or arm in arms:
            seeds = sorted(seed for m, a, seed in by_run if (m, a) == (method, arm))
            own = [by_run[method, arm, seed] for seed in seeds]
            bare = [by_run.get((method, beside(arm, "none"), seed)) for seed in seeds]
            cells = [cell(name, own, bare, digits=3) for name in COLUMNS]
            lines.append(f"| {method} | `{arm}` | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pooled(records: list[dict[str, Any]], arms: list[str]) -> str:
    """Markdown: a row an arm, over the pairs of all methods; its mean, and its difference to the bare network's."""
    by_run = looked_into(records)
    shown = [name for name in COLUMNS if name != "log10 gradient spread"]
    lines = [f"| arm | pairs | {' | '.join(shown)} |", "|---" * (2 + len(shown)) + "|"]
    for arm in sorted({key[1] for key in by_run}, key=rank):
        runs = [(m, s) for m, a, s in sorted(by_run) if a == arm and (m, beside(arm, "none"), s) in by_run]
        if (not arms or arm in arms) and len(runs) > 1:
            own, bare = ([by_run[m, which, s] for m, s in runs] for which in (arm, beside(arm, "none")))
            cells = [cell(name, own, bare, digits=2 if "%" in name else 3) for name in shown]
            lines.append(f"| `{arm}` | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layers(records: list[dict[str, Any]], arms: list[str]) -> str:
    """Markdown: bit entropy, dead channels and gradient norm by layer, means over seeds."""
    lines = ["| method | arm | layer | dead (%) | entropy | correlation | gradient norm |", "|---" * 7 + "|"]
    for method, arm in sorted({(r["method"], r["arm"]) for r in records}, key=lambda key: (key[0], rank(key[1]))):
        runs = [r["inside"] for r in records if (r["method"], r["arm"]) == (method, arm) and r["inside"]["codes"]]
        if not runs or (arms and arm not in arms):
            continue
        pairs = zip(runs[0]["codes"], runs[0]["gradient_norms"], strict=True)
        for code, conv in pairs:
            means = []
            for name in ("dead", "entropy", "correlation"):
                values = [run["codes"][code][name] for run in runs if run["codes"][code][name] is not None]
                means.append(f"{(100 if name == 'dead' else 1) * np.mean(values):.3g}" if values else "")
            norm = np.mean([run["gradient_norms"][conv] for run in runs])
            lines.append(f"| {method} | `{arm}` | {conv} | {' | '.join(means)} | {norm:.3g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the results file")
    parser.add_argument("--arms", nargs="+", default=[])
    parser.add_argument("--layers", action="store_true", help="by layer, without differences")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    records = list(read_results(args.results / f"{args.name}.jsonl").values())
    print((layers if args.layers else table)(records, args.arms))


if __name__ == "__main__":
    main()
