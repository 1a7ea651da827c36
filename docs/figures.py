"""Draw the figures of docs/inside.md: a minute on one CPU core, nothing to download (`make figures`).

    bound-light.svg, bound-dark.svg    the bound of each tap of an IR-Net in a healthy run, and with heads that do not
                                       learn
    report.png                         the report of the same run, after the fifth and after the last epoch

An IR-Net ResNet-8 on scikit-learn's digits, fixed seeds, SGD for the network, the plug-in's defaults.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "benchmarks")]

from cmim_plugin import CMIM, Report  # noqa: E402
from data import Data, load_data  # noqa: E402
from nets import BODIES, METHODS  # noqa: E402
from tables import THEMES  # noqa: E402

EPOCHS, EARLY, BATCH = 40, 5, 64
Curves = dict[str, list[tuple[int, float]]]


def train(data: Data, **settings: float) -> tuple[Curves, list[Report]]:
    """Tap -> (step, bound) over the training; and the reports after `EARLY` epochs and after all."""
    torch.manual_seed(0)
    method = METHODS["irnet"]
    model = BODIES["resnet8"](method.recipe, data.num_classes, data.in_channels)
    cmim = CMIM(model, torch.zeros(2, 1, 8, 8), **settings)
    steps = len(data.x_train) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    generator = torch.Generator().manual_seed(0)
    held_out = [(x,) for x in data.normalise(data.x_test).split(BATCH)]
    curves: Curves = {tap.name: [] for tap in cmim.taps}
    reports: list[Report] = []
    for epoch in range(EPOCHS):
        method.on_epoch(model, epoch, EPOCHS)
        model.train()
        for step, index in enumerate(torch.randperm(len(data.x_train), generator=generator).split(BATCH)[:steps]):
            x = data.normalise(data.augmented(index, generator))
            loss = F.cross_entropy(model(x), data.y_train[index])
            loss += cmim(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            for name, figures in cmim.metrics.items():
                curves[name].append((epoch * steps + step, float(figures["bound"])))
        if epoch + 1 in (EARLY, EPOCHS):
            reports.append(cmim.report(model, held_out))
    return curves, reports


def smooth(curve: list[tuple[int, float]], over: int = 15) -> tuple[list[int], list[float]]:
    """Means over so many steps each, the first steps one by one."""
    groups = [curve[i : i + 1] for i in range(over)] + [curve[i : i + over] for i in range(over, len(curve), over)]
    return [g[len(g) // 2][0] + 1 for g in groups], [sum(b for _, b in g) / len(g) for g in groups]


def draw(healthy: Curves, still: Curves, theme: str, path: Path) -> None:
    """The bound of each tap over the steps; in grey with heads that do not learn."""
    surface, text, muted, grid, grey, _ = THEMES[theme]
    style = {"svg.hashsalt": "bound", "font.size": 8, "text.color": text, "axes.edgecolor": grid}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.5, 3), facecolor=surface, layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(surface)
        most = torch.tensor(64.0).log().item()
        axes.axhline(most, color=muted, linewidth=0.8, linestyle="--")
        axes.annotate("log 64: the most that 64 positions can prove", (0, most), (4, 3), textcoords="offset points")
        for name, curve in still.items():
            label = "heads_lr=0: the heads do not learn" if name == next(iter(still)) else None
            axes.plot(*smooth(curve), color=grey, linewidth=1, label=label)
        palette = matplotlib.colormaps["viridis" if theme == "light" else "plasma"]
        for i, (name, curve) in enumerate(healthy.items()):
            share = i / max(1, len(healthy) - 1)
            axes.plot(*smooth(curve), color=palette(0.9 * share if theme == "light" else 0.3 + 0.7 * share), label=name)
        axes.set_xlabel("step", color=muted)
        axes.set_ylabel("bound, nats", color=muted)
        axes.set_ylim(-1.5, 4.7)
        axes.tick_params(colors=muted, length=0)
        axes.grid(color=grid, linewidth=0.5)
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
        axes.legend(frameon=False, labelcolor=text, ncols=2, fontsize=7)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor=surface)


def narrower(figure: Figure, path: Path) -> None:
    """The figure of a report as wide as a page, so that its text can be read there."""
    first, *_ = figure.axes
    handles, labels = first.get_legend_handles_labels()
    figure.legends.clear()
    names = {"before": f"after epoch {EARLY}", "now": f"after epoch {EPOCHS}", "at most": "at most"}
    figure.legend(handles, [names[label] for label in labels], loc="outside lower center", ncols=3, frameon=False)
    for axes in figure.axes:
        axes.set_title(
            axes.get_title().replace(", at least", ",\nat least").replace("retrieved", "\nretrieved"), fontsize=9
        )
    figure.suptitle("")
    figure.set_size_inches(11, 3.2)
    figure.savefig(path, dpi=130)


def main() -> None:
    torch.set_num_threads(1)
    data = load_data("digits")
    healthy, (early, late) = train(data)
    still, _ = train(data, heads_lr=0.0)
    for theme in ("light", "dark"):
        draw(healthy, still, theme, DOCS / f"bound-{theme}.svg")
    narrower(late.plot(DOCS / "report.png", before=early), DOCS / "report.png")
    print(late)


if __name__ == "__main__":
    main()
