"""What CMIM does to a binary network, in one picture: IR-Net and Bi-Real Net on digits, without and with it.

    python examples/demo.py            some three minutes on two CPU cores; nothing is downloaded
    python examples/demo.py --quick    less than one: fewer seeds, shorter training

Every network is trained, then frozen. To see what its binary codes keep of their latents, heads are trained on the
frozen network, the same way whether it was trained with CMIM or not, and `cmim.report` looks at held-out images.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

import bireal
import irnet
from cmim_plugin import CMIM

METHODS = {"IR-Net": irnet.ResNet, "Bi-Real Net": bireal.ResNet}
ARMS = {"without": "tab:gray", "with CMIM": "tab:blue"}
EXAMPLE = torch.zeros(2, 1, 8, 8)


@dataclass
class Seen:
    """One network: of each layer, and of the whole, on held-out images."""

    kept: list[float]  # nats, at least
    ceiling: float  # nats, at most
    dead: list[float]  # channels of one code, in %
    accuracy: float  # in %


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels, to train on and held out."""
    train, test = irnet.load("digits", Path())
    pixels = train.images.float()
    mean, std = pixels.mean(), pixels.std()
    return (pixels - mean) / std, train.labels, (test.images - mean) / std, test.labels


def train(model: nn.Module, method: str, x: Tensor, y: Tensor, epochs: int, cmim: CMIM | None) -> None:
    adam = method == "Bi-Real Net"
    optimizer = torch.optim.Adam(model.parameters(), 1e-3) if adam else torch.optim.SGD(model.parameters(), 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        if method == "IR-Net":
            irnet.anneal(model, epoch, epochs)
        for batch in torch.randperm(len(x), generator=generator).split(50):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = F.cross_entropy(model(x[batch].roll(shift, (2, 3))), y[batch])
            if cmim:
                loss += cmim(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def look(model: nn.Module, x: Tensor, held_out: list[Tensor], steps: int) -> tuple[list[float], float, list[float]]:
    """Train fresh heads on the frozen network, then report: what is kept, what could be, channels of one code."""
    model.eval()  # normalizes as in the report
    torch.manual_seed(0)  # the same heads for every network
    cmim = CMIM(model, EXAMPLE)
    for batch in torch.randint(len(x), (steps, 50)):
        model(x[batch])
        cmim(model).backward()  # the heads take their step; the network has no optimizer
    report = cmim.report(model, held_out)
    cmim.remove()
    dead = [100 * (tap.dead + tap.saturated) / tap.channels for tap in report.taps]
    return [tap.bound for tap in report.taps], max(tap.ceiling for tap in report.taps), dead


def run(job: tuple[str, str, int], epochs: int, steps: int) -> Seen:
    method, arm, seed = job
    torch.set_num_threads(1)  # a process a core
    x, y, x_test, y_test = digits()
    torch.manual_seed(seed)  # both arms start from the same weights and see the same batches
    model = METHODS[method](units=2, in_channels=1)
    cmim = CMIM(model, EXAMPLE) if arm == "with CMIM" else None
    train(model, method, x, y, epochs, cmim)
    if cmim:
        cmim.remove()
    seen = look(model, x, list(x_test.split(100)), steps)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    return Seen(*seen, accuracy=100 * accuracy)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over the seeds, and its 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return values.mean(), values.mean() - half, values.mean() + half


def tell(method: str, runs: dict[str, list[Seen]]) -> None:
    kept = {arm: np.array([seen.kept for seen in runs[arm]]) for arm in ARMS}  # seeds x layers
    accuracy = {arm: np.array([seen.accuracy for seen in runs[arm]]) for arm in ARMS}
    print(f"\n{method:12}{'kept by layer (nats)':^{8 * kept['without'].shape[1]}}dead  accuracy (95 % interval)")
    for arm in ARMS:
        dead = np.mean([seen.dead for seen in runs[arm]])
        layers = "".join(f"{value:8.2f}" for value in kept[arm].mean(0))
        mean, low, high = interval(accuracy[arm])
        print(f"  {arm:10}{layers}  {dead:4.1f} %  {mean:.1f} % ({low:.1f} to {high:.1f})")
    differences = kept["with CMIM"] - kept["without"]
    mean, low, high = interval(accuracy["with CMIM"] - accuracy["without"])
    layers = "".join(f"{value:+8.2f}" for value in differences.mean(0))
    print(f"  {'difference':10}{layers}          {mean:+.1f} points ({low:+.1f} to {high:+.1f})", flush=True)


def draw(runs: dict[str, dict[str, list[Seen]]], path: str) -> None:
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(len(METHODS), 3, width_ratios=(2.4, 2.4, 1), sharex="col", sharey="col")
    for (first, second, third), (method, arms) in zip(grid, runs.items(), strict=True):
        first.set_ylabel(method, fontsize=13, fontweight="bold")
        for shift, (arm, color) in zip((-0.2, 0.2), ARMS.items(), strict=True):
            for axes, values in (
                (first, np.array([seen.kept for seen in arms[arm]])),
                (second, np.array([seen.dead for seen in arms[arm]])),
                (third, np.array([[seen.accuracy] for seen in arms[arm]])),
            ):
                places = np.arange(1, values.shape[1] + 1) + shift
                if axes is third:
                    mean, low, high = interval(values[:, 0])
                    axes.errorbar(places, mean, [[mean - low], [high - mean]], fmt="o", color=color, capsize=5)
                else:
                    axes.bar(places, values.mean(0), 0.38, color=color, label=arm)
                axes.plot(np.tile(places, (len(values), 1)), values, ".", color="black", markersize=4, alpha=0.5)
        first.axhline(arms["without"][0].ceiling, color="black", linestyle=":")
        second.set_ylim(bottom=0)
        third.set(xlim=(0.4, 1.6), xticks=[0.8, 1.2], xticklabels=list(ARMS))
    grid[0, 0].set_title("what a code keeps of its latent\n(nats, at least; dotted: at most)")
    grid[0, 1].set_title("channels that are always\n+1 or always -1 (%)")
    grid[0, 2].set_title("test accuracy (%)\nand 95 % interval")
    grid[0, 0].legend(loc="lower left", framealpha=1)
    for axes in grid[-1, :2]:
        axes.set_xlabel("binary layer, from the input to the output")
    figure.supxlabel("held-out digits; bars: mean over the seeds; points: one seed each", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 seeds instead of 4, a third of the epochs")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--output", default="demo.png")
    args = parser.parse_args()
    count, epochs, steps = (2, 8, 150) if args.quick else (4, 25, 400)

    jobs = [(m, arm, seed) for m in METHODS for seed in range(args.seed, args.seed + count) for arm in ARMS]
    x, _, x_test, _ = digits()
    print(
        f"Handwritten digits, {len(x)} to train on, {len(x_test)} held out. ResNet-8, {count} seeds, {epochs} epochs."
    )
    print("How much of its latent does each layer's binary code keep on held-out images? At least, in nats:")
    workers = min(len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    runs: dict[str, dict[str, list[Seen]]] = {method: {arm: [] for arm in ARMS} for method in METHODS}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for (method, arm, _), seen in zip(jobs, pool.map(partial(run, epochs=epochs, steps=steps), jobs), strict=True):
            runs[method][arm].append(seen)
            if sum(map(len, runs[method].values())) == 2 * count:
                tell(method, runs[method])
    draw(runs, args.output)
    print(f"\n{args.output} shows the same. A code could keep {seen.ceiling:.2f} nats at most (log of 64 candidates).")
    print("This network is small and its images are easy: what CMIM is worth shows on your own. On CIFAR-10:")
    print("  python examples/irnet.py --cmim-weight 0.1    and again with --cmim-weight 0")


if __name__ == "__main__":
    main()
