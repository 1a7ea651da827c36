"""Does CMIM help? Train every arm of every seed, and leave one JSON line a run in results/NAME.jsonl.

    python benchmarks/accuracy.py overfit --root DIR
    python benchmarks/accuracy.py overfit --split val --arms none position position+weight=1,temperature=0.3

All arms of a seed start from the same weights and see the same batches and augmentation. Runs that are in the file
already are skipped, so that an interrupted benchmark is resumed by the same command. See README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import cmim_plugin  # noqa: E402
import training  # noqa: E402
from bireal import BIREAL  # noqa: E402
from bodies import BODIES, full_precision  # noqa: E402
from irnet import IRNET, anneal  # noqa: E402
from reactnet import REACTNET  # noqa: E402

# Name: (recipe, what to call before each epoch)
METHODS = {"irnet": (IRNET, anneal), "bireal": (BIREAL, None), "reactnet": (REACTNET, None)}

# What differs from plain training. The keys that `arm_arguments` does not consume are CMIM's arguments.
PAPER = {"weight": 0.03, "instances": "image", "layer_decay": 0.8, "nce": True, "taps_per_step": None}  # CMIM.paper
IMAGE = {"weight": 0.1, "instances": "image"}
POSITION = {"weight": 0.1, "instances": "position", "num_positions": 64}
TEACHER = {"weight": 0.5, "instances": "image", "last": 1, "teacher": True}
DISTILL = {"distill": 1.0}
SMOOTHING = {"smoothing": 0.1}
ARMS: dict[str, dict[str, Any]] = {
    "full_precision": {"full_precision": True},  # no binary network: the teacher of the same method and seed
    "none": {},
    "image": IMAGE,  # whole images, all layers, no labels, else as the default
    "paper": PAPER,
    "image_labels": {**IMAGE, "labels": True},  # images of the same class are not contrasted
    "position": POSITION,
    "position_labels": {**POSITION, "labels": True},
    "position_shuffled": {**POSITION, "shuffled": True},  # control: the same loss on pairs that do not belong together
    "teacher": TEACHER,
    "teacher_labels": {**TEACHER, "labels": True},
    "distill": DISTILL,  # control: what the same teacher gives without any contrast
    "distill_cmim": {**DISTILL, **POSITION},
    "distill_teacher": {**DISTILL, **TEACHER},
    "smoothing": SMOOTHING,  # control: another regulariser of the same loop
    "smoothing_cmim": {**SMOOTHING, **POSITION},
}

# Few images, many epochs: the network fits its training set. Many images, few epochs: it does not.
SMALL = {"data": "cifar10", "model": "vgg_small", "width": 16, "batch_size": 50}
REGIMES: dict[str, dict[str, Any]] = {
    "overfit": {**SMALL, "train_size": 500, "epochs": 50},
    "underfit": {**SMALL, "train_size": 10_000, "epochs": 3},
    "fashion": {**SMALL, "data": "fashion_mnist", "train_size": 1000, "epochs": 30},
    "resnet20": {**SMALL, "model": "resnet20", "train_size": 2500, "epochs": 20},
    "full": {"data": "cifar10", "model": "resnet20", "width": 16, "train_size": None, "epochs": 100},
    "digits": {"data": "digits", "model": "resnet8", "width": 8, "train_size": None, "epochs": 15},
}


@dataclass(frozen=True)
class Config:
    """What all runs of one results file share."""

    data: str
    train_size: int | None
    split: str  # test, or val: tested on `held_out` images of the training set that are not trained on
    held_out: int
    model: str
    width: int
    epochs: int
    batch_size: int
    lr: float
    eval_every: int


@dataclass(frozen=True)
class Run:
    """One training; `arm` is a name of ARMS, or NAME+KEY=VALUE,... for a variant."""

    method: str
    arm: str
    seed: int


def arm_options(arm: str) -> dict[str, Any]:
    """The options of an arm: `position+weight=1,last=2` is `position` with two of them changed."""
    name, _, changes = arm.partition("+")
    if name not in ARMS:
        raise SystemExit(f"There is no arm {name}; there are {', '.join(ARMS)}.")
    options = dict(ARMS[name])
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def needs_teacher(options: dict[str, Any]) -> bool:
    return bool(options.get("teacher") or options.get("distill"))


# --- one run ---------------------------------------------------------------------------------------------------------


def shuffled(z_b: Tensor, z_f: Tensor, **options: Any) -> Tensor:
    """InfoNCE between each row and another image's: half the batch away, for neighbouring rows can share an image."""
    return cmim_plugin.info_nce(z_b, z_f.roll(z_f.shape[-2] // 2, -2), **options)


def distillation(teacher: nn.Module, weight: float, temperature: float = 4.0):
    """Hinton et al., arXiv 1503.02531: cross-entropy plus T^2 KL(teacher || student) of the softened outputs."""

    def loss(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.softmax(teacher(x) / temperature, 1)
        divergence = F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="batchmean")
        return F.cross_entropy(logits, y) + weight * temperature**2 * divergence

    return loss


def arm_arguments(options: dict[str, Any], model: nn.Module, example: Tensor, teacher: nn.Module | None, samples: int):
    """An arm's options as arguments of `training.train`; `samples`: images in the training set."""
    cmim = {key: value for key, value in options.items() if key != "full_precision"}
    arguments = {"cmim_weight": cmim.pop("weight", 0.0), "cmim_labels": cmim.pop("labels", False)}
    if distill := cmim.pop("distill", 0.0):
        arguments["loss_fn"] = distillation(teacher, distill)
    if smoothing := cmim.pop("smoothing", 0.0):
        if distill:
            raise SystemExit("Logit distillation with label smoothing is not there: each is a loss of its own.")
        # Szegedy et al., arXiv 1512.00567
        arguments["loss_fn"] = partial(training.cross_entropy, label_smoothing=smoothing)
    if cmim.pop("teacher", False):
        cmim["teacher"] = teacher
    if cmim.pop("nce", False):
        cmim["objective"] = partial(cmim_plugin.nce, num_samples=samples)
    if cmim.pop("shuffled", False):
        cmim["objective"] = shuffled
    if last := cmim.pop("last", 0):
        cmim["taps"] = [found.name for found in cmim_plugin.find_binary_activations(model, example)][-last:]
    return {**arguments, "cmim_options": cmim}


@cache  # a worker process trains many runs on the same data
def load(config: Config, root: str | None) -> training.Data:
    if config.split == "test":
        return training.load_data(config.data, root, config.train_size)
    # In random order, and with the training images of the test split first.
    size = (config.train_size or sys.maxsize - config.held_out) + config.held_out
    data = training.load_data(config.data, root, size)
    x, y, held_out = data.x_train, data.y_train, config.held_out
    return training.Data(x[:-held_out], y[:-held_out], x[-held_out:], y[-held_out:], data.shift, data.flip)


def execute(run: Run, config: Config, root: str | None, weights: Path | None) -> dict[str, Any]:
    """Train, and return the record of the run. `weights`: where the teacher's are, or go to."""
    start = time.perf_counter()
    options = arm_options(run.arm)
    data = load(config, root)
    recipe, on_epoch = METHODS[run.method]
    is_teacher = options.get("full_precision", False)

    def build(binary: bool) -> nn.Module:
        body = BODIES[config.model](
            recipe if binary else full_precision(recipe), data.num_classes, data.in_channels, width=config.width
        )
        return body.to(training.device(), memory_format=torch.channels_last)  # faster

    teacher = None
    if needs_teacher(options):
        teacher = build(binary=False).eval().requires_grad_(False)
        teacher.load_state_dict(torch.load(weights, map_location=training.device(), weights_only=True))

    torch.manual_seed(run.seed)
    model = build(binary=not is_teacher)
    example = data.normalise(data.x_train[:16])
    history = training.train(
        model,
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=run.seed,
        on_epoch=on_epoch,
        eval_every=config.eval_every,
        **arm_arguments(options, model, example, teacher, len(data.x_train)),
    )
    if is_teacher and weights:
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)
    return {
        **asdict(run),
        "accuracy": history.test_accuracy[-1],  # after the last epoch
        "best_epoch_accuracy": max(a for a in history.test_accuracy if not math.isnan(a)),  # chosen with hindsight
        "train_accuracy": history.train_accuracy[-1],
        "options": options,
        "config": asdict(config),
        "curves": {
            "train_loss": rounded(history.train_loss),
            "train_accuracy": rounded(history.train_accuracy),
            "test_accuracy": rounded(history.test_accuracy),  # null in epochs without a test
            "bounds": {tap: rounded(values) for tap, values in history.bounds.items()},  # nats
        },
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": {
            "cmim_plugin": cmim_plugin.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": commit("benchmarks/accuracy.py"),
    }


def rounded(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 3) for value in values]


def device_name() -> str:
    device = training.device()
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {platform.machine()}"


@cache
def commit(*scripts: str) -> str:
    """What is checked out, `-dirty` where the code that a run of these scripts depends on differs from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "cmim_plugin", "examples", *scripts)
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("-dirty" if changed else "")


# --- results and queue -----------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[Run, dict[str, Any]]:
    """The records of a results file; of a run done twice, the later one."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Run(r["method"], r["arm"], r["seed"]): r for r in records}


def check_same(done: dict[Run, dict[str, Any]], config: Config, path: Path) -> None:
    """Refuse to mix configurations in one file."""
    for run, record in done.items():
        for what, found, wanted in (
            ("the configuration", record["config"], asdict(config)),
            (f"arm {run.arm}", record["options"], arm_options(run.arm)),
        ):
            if found != wanted:
                raise SystemExit(f"{path} has results with {what}\n  {found}\nnot\n  {wanted}\nChoose another --name.")


def make_queue(methods: list[str], arms: list[str], seeds: list[int]) -> list[Run]:
    """All arms of one seed, then of the next: what has run when time is up is paired. Teachers before their arms."""
    if any(needs_teacher(arm_options(arm)) for arm in arms):
        arms = ["full_precision", *(arm for arm in arms if arm != "full_precision")]
    return [Run(method, arm, seed) for seed in seeds for method in methods for arm in arms]


def plan(queue: list[Run], seconds: dict[Run, float], left: float, jobs: int) -> tuple[list[Run], list[Run]]:
    """Split the queue into the runs that fit into `left` seconds and the rest.

    seconds: what finished runs took. A run counts as the mean of those of its method and arm, else of the slowest.
    """
    measured = defaultdict(list)
    for run, value in seconds.items():
        measured[run.method, run.arm].append(value)
    means = {key: sum(values) / len(values) for key, values in measured.items()}
    needed = 0.0
    for position, run in enumerate(queue):
        needed += means.get((run.method, run.arm), max(means.values(), default=0.0)) / jobs
        if needed > left:
            return queue[:position], queue[position:]
    return queue, []


def work(queue: list[Run], done: dict[Run, dict[str, Any]], path: Path, args: argparse.Namespace) -> None:
    """Run the queue in `args.jobs` processes and append each record as it comes."""
    deadline = time.monotonic() + 60 * args.budget_minutes
    seconds = {run: record["seconds"] for run, record in done.items()}
    total, finished = len(queue), 0
    fits, left_out = plan(queue, seconds, deadline - time.monotonic(), args.jobs)
    print(f"{path.stem}: {len(done)} runs are there, {total} to do, {len(fits)} of them planned", flush=True)

    def weights(run: Run) -> Path:
        return args.cache / path.stem / f"{run.method}-{run.seed}.pt"

    running: dict[Future, Run] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    context = get_context("spawn")  # CUDA cannot be used in a forked process
    with ProcessPoolExecutor(args.jobs, context, torch.set_num_threads, (threads,)) as pool, path.open("a") as file:
        while True:
            fits, left_out = plan(queue, seconds, deadline - time.monotonic(), args.jobs)
            while fits and len(running) < args.jobs:
                run = next((r for r in fits if teacher_is_there(r, weights(r), running)), None)
                if run is None:
                    break
                fits.remove(run)
                queue = [other for other in queue if other != run]
                running[pool.submit(execute, run, args.config, args.root, weights(run))] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, record = running.pop(future), future.result()
                seconds[run] = record["seconds"]
                finished += 1
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(
                    f"{finished}/{total}  {run.method} {run.arm}, seed {run.seed}: "
                    f"{record['accuracy']:.2f} %, {record['seconds']:.0f} s",
                    flush=True,
                )
    if left_out:
        print(f"Left out, for they do not fit into {args.budget_minutes:g} minutes: {len(left_out)} runs")
        for run in left_out:
            print(f"  {run.method} {run.arm}, seed {run.seed}")


def teacher_is_there(run: Run, weights: Path, running: dict[Future, Run]) -> bool:
    """Whether a run can start: its teacher, queued before it, is not still being trained."""
    training_now = Run(run.method, "full_precision", run.seed) in running.values()
    return not needs_teacher(arm_options(run.arm)) or (weights.exists() and not training_now)


# --- command line ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("regime", nargs="?", choices=REGIMES, default="overfit", help="default of the options below")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"of {', '.join(ARMS)}; NAME+KEY=VALUE,...")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose hyper-parameters")
    parser.add_argument("--held-out", type=int, default=5000, help="training images that --split val tests on")
    parser.add_argument("--root", help="folder with NAME.npz, or where torchvision keeps its downloads")
    parser.add_argument("--name", help="of the results file; the regime's, with -val for that split")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--budget-minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "teachers", help="of the teachers' weights")
    parser.add_argument("--data", choices=training.DATASETS)
    parser.add_argument("--train-size", type=int, help="train on that many images only")
    parser.add_argument("--model", choices=BODIES)
    parser.add_argument("--width", type=int, help="channels of the first layer")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, help="128")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--eval-every", type=int, help="epochs from test to test; half of all")
    args = parser.parse_args(arguments)

    options = {"batch_size": 128, **REGIMES[args.regime], **{k: v for k, v in vars(args).items() if v is not None}}
    options["eval_every"] = args.eval_every or max(1, options["epochs"] // 2)
    args.config = Config(**{key: options[key] for key in Config.__dataclass_fields__})
    args.name = args.name or args.regime + ("-val" if args.split == "val" else "")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    path = args.results / f"{args.name}.jsonl"
    done = read_results(path)
    check_same(done, args.config, path)

    def missing(run: Run) -> bool:
        lost = run.arm == "full_precision" and not (args.cache / path.stem / f"{run.method}-{run.seed}.pt").exists()
        return run not in done or lost

    queue = make_queue(args.methods, args.arms, args.seeds)
    work([run for run in queue if missing(run)], done, path, args)


if __name__ == "__main__":
    main()
