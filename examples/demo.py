"""IR-Net and Bi-Real Net on scikit-learn's digits, without and with CMIM.

    python examples/demo.py            some minutes on two CPU cores
    python examples/demo.py --quick    fewer seeds and epochs: shows that it runs, compares little

Prints the comparison and saves demo.png.
"""

from __future__ import annotations

import argparse
from functools import partial

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from training import Data, History, compare, load_data, report

from bireal import BIREAL
from bodies import BODIES
from irnet import IRNET, anneal

METHODS = {"IR-Net": (IRNET, anneal), "Bi-Real Net": (BIREAL, None)}


def plot_bounds(axes: Axes, runs: list[History]) -> None:
    """The bound of each layer over training: mean over seeds, and a band from the lowest to the highest."""
    for i, tap in enumerate(runs[0].bounds):
        bounds = np.array([history.bounds[tap] for history in runs])  # seeds x epochs
        epochs = np.arange(1, bounds.shape[1] + 1)
        color = matplotlib.colormaps["viridis"](i / len(runs[0].bounds))
        axes.plot(epochs, bounds.mean(0), label=tap, color=color)
        axes.fill_between(epochs, bounds.min(0), bounds.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel="bound on I(binary; latent), nats", ylim=(0, None))
    axes.legend(fontsize=8, loc="lower right", ncols=2)


def plot_digits(row: np.ndarray, data: Data, history: History) -> None:
    """Test images with the predicted class: green where right, red where wrong."""
    for i, axes in enumerate(row):
        right = history.predictions[i] == data.y_test[i]
        axes.imshow(data.x_test[i, 0].cpu(), cmap="gray")
        axes.set_title(int(history.predictions[i]), color="tab:green" if right else "tab:red")
        axes.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 seeds of 6 epochs")
    parser.add_argument("--cmim-weight", type=float, default=0.1)
    parser.add_argument("--output", default="demo.png")
    args = parser.parse_args()
    seeds, epochs = (range(3), 6) if args.quick else (range(5), 30)

    torch.set_num_threads(1)  # so little work a step that sharing it between threads only costs time
    data = load_data("digits")
    print(f"handwritten digits, 8 x 8 pixels: {len(data.x_train)} to train, {len(data.x_test)} to test")
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subfigures(2, len(METHODS), height_ratios=(5, 1))
    for (title, (recipe, on_epoch)), (upper, lower) in zip(METHODS.items(), panels.T, strict=True):
        build = partial(BODIES["resnet8"], recipe, data.num_classes, data.in_channels)
        runs = compare(build, data, seeds, args.cmim_weight, title, epochs=epochs, on_epoch=on_epoch)
        print(f"\n{title}, {len(seeds)} seeds of {epochs} epochs\n{report(runs)}", flush=True)
        upper.suptitle(f"{title} with CMIM")
        plot_bounds(upper.subplots(), runs["with CMIM"])
        plot_digits(lower.subplots(1, 10), data, runs["with CMIM"][0])
    note = "bands: lowest to highest of the seeds; titles of the digits: predicted class, green where right"
    figure.supxlabel(note, fontsize=9)
    figure.savefig(args.output, dpi=120)
    print(f"\n{args.output}: the bound of each layer over training, and predictions on test images")
    print("A small network on small images: this shows CMIM at work, not what it is worth.")


if __name__ == "__main__":
    main()
