"""What CMIM does to a binary network, in one picture: IR-Net and Bi-Real Net on digits, without and with it.

    python examples/demo.py            two to three minutes on two CPU cores; nothing is downloaded
    python examples/demo.py --quick    about one: shorter training

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
WIDTH = 8  # channels of the first layers: so few bits have something to lose
CANDIDATES = 256  # positions among which a code has to tell its own latent


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
    optimizer = torch.optim.Adam(model.parameters(), 3e-3) if adam else torch.optim.SGD(model.parameters(), 0.1, 0.9)
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
    cmim = CMIM(model, EXAMPLE, num_positions=CANDIDATES)
    for batch in torch.randint(len(x), (steps, 100)):
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
    model = METHODS[method](units=2, in_channels=1, width=WIDTH)
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
    layers = "".join(f"  layer {i + 1}" for i in range(kept["without"].shape[1]))
    print(f"\n{method:12}{layers}  dead channels  accuracy (95 % interval)")
    for arm in ARMS:
        dead = np.mean([seen.dead for seen in runs[arm]])
        layers = "".join(f"{value:9.2f}" for value in kept[arm].mean(0))
        mean, low, high = interval(accuracy[arm])
        print(f"  {arm:10}{layers}  {dead:11.1f} %  {mean:.1f} % ({max(low, 0):.1f} to {min(high, 100):.1f})")
    layers = "".join(f"{value:+9.2f}" for value in (kept["with CMIM"] - kept["without"]).mean(0))
    mean, low, high = interval(accuracy["with CMIM"] - accuracy["without"])
    print(f"  {'difference':10}{layers}                 {mean:+.1f} points ({low:+.1f} to {high:+.1f})", flush=True)


def draw(runs: dict[str, dict[str, list[Seen]]], path: str) -> None:
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    grid = figure.subplots(len(METHODS), 3, width_ratios=(2.6, 2.2, 1.2), sharex="col", sharey="col")
    most_dead = max(max(seen.dead) for arms in runs.values() for several in arms.values() for seen in several)
    for (first, second, third), (method, arms) in zip(grid, runs.items(), strict=True):
        first.set_ylabel(method, fontsize=13, fontweight="bold")
        for shift, (arm, color) in zip((-0.1, 0.1), ARMS.items(), strict=True):
            kept, dead = (np.array([getattr(seen, name) for seen in arms[arm]]) for name in ("kept", "dead"))
            for axes, values in ((first, kept), (second, dead)):
                places = np.arange(1, values.shape[1] + 1) + shift
                axes.plot(places, values.mean(0), "-o", color=color, label=arm, linewidth=2)
                axes.plot(np.tile(places, (len(values), 1)), values, ".", color=color, markersize=4, alpha=0.6)
            values = np.array([seen.accuracy for seen in arms[arm]])
            mean, low, high = interval(values)
            third.errorbar(shift, mean, [[mean - low], [high - mean]], fmt="o", color=color, capsize=6)
            third.plot(np.full(len(values), shift + 0.03), values, ".", color=color, markersize=5, alpha=0.6)
        first.axhline(arms["without"][0].ceiling, color="black", linestyle=":")
        second.set_ylim(-2, max(30, 1.1 * most_dead))
        third.set(xlim=(-0.25, 0.25), xticks=[-0.1, 0.1], xticklabels=["without", "with"])
        for axes in (first, second, third):
            axes.grid(axis="y", alpha=0.3)
    grid[0, 0].set_title("what a code keeps of its latent\n(nats, at least; dotted: the most it could)")
    grid[0, 1].set_title("dead channels (%)\nalways +1 or always -1")
    grid[0, 2].set_title("accuracy (%)\n95 % interval")
    grid[0, 0].legend(loc="lower right")
    for axes in grid[-1, :2]:
        axes.set_xlabel("binary layer, from input to output")
    figure.suptitle("Binary networks trained without and with CMIM, on held-out digits; small points: one seed each")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half of the epochs")
    parser.add_argument("--seed", type=int, default=0, help="the first of three")
    parser.add_argument("--output", default="demo.png")
    args = parser.parse_args()
    seeds, epochs, steps = range(args.seed, args.seed + 3), *((10, 120) if args.quick else (20, 300))

    x, _, held_out, _ = digits()
    print(f"Handwritten digits: {len(x)} to train on, {len(held_out)} held out. ResNet-8, 3 seeds of {epochs} epochs.")
    print("What each layer's binary code keeps of its latent on held-out images, in nats, at least:")
    jobs = [(method, arm, seed) for method in METHODS for seed in seeds for arm in ARMS]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runs: dict[str, dict[str, list[Seen]]] = {method: {arm: [] for arm in ARMS} for method in METHODS}
    with ProcessPoolExecutor(min(len(jobs), cores), mp_context=get_context("spawn")) as pool:
        for (method, arm, seed), seen in zip(
            jobs, pool.map(partial(run, epochs=epochs, steps=steps), jobs), strict=True
        ):
            runs[method][arm].append(seen)
            if (arm, seed) == (list(ARMS)[-1], seeds[-1]):
                tell(method, runs[method])
    draw(runs, args.output)
    print(f"\nThe same as a picture: {args.output}. A code could keep {seen.ceiling:.2f} at most, log of {CANDIDATES}.")
    print("Small networks on easy images: whether CMIM helps, your own data say. On CIFAR-10, with and without:")
    print("  python examples/irnet.py        python examples/irnet.py --cmim-weight 0")


if __name__ == "__main__":
    main()
