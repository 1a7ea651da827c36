"""Does CMIM help? Train every arm of every seed, and leave one JSON line a run in results/NAME.jsonl.

    python benchmarks/accuracy.py overfit --root DIR
    python benchmarks/accuracy.py overfit --split val --optimizer sgd --arms none default default+weight=0.3
    python benchmarks/accuracy.py cifar10 --root DIR --fast --methods irnet bireal --arms none default shuffled
    python benchmarks/accuracy.py cifar10 --root DIR --fast graph --jobs 12    # on a GPU

All arms of a seed start from the same weights and see the same batches and augmentation. Runs that are in the file
already are skipped, so that an interrupted benchmark is resumed by the same command. See README.md.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cmim_plugin  # noqa: E402
import loop  # noqa: E402
from auxiliaries import OBJECTIVES, Balance, Contrast, Together, distillation, smoothed  # noqa: E402
from data import DATASETS, Data, device, load_data  # noqa: E402
from inside import look  # noqa: E402
from nets import BODIES, METHODS, binarize_weights, full_precision, fuse  # noqa: E402
from records import commit  # noqa: E402

# What differs from plain training. Keys that are neither in TRAINING nor in OWN are arguments of CMIM; `default` has
# none, so that it follows the plug-in's defaults (each record has the resolved settings).
DEFAULT: dict[str, Any] = {"cmim": True}
ARMS: dict[str, dict[str, Any]] = {
    "full_precision": {"full_precision": True},  # no binary network: the teacher of the same method and seed
    "none": {},
    "default": DEFAULT,
    "image": {**DEFAULT, "instances": "image"},  # an instance is an image, pooled over space
    # The paper's reading: whole images, all layers, its objective, weights that grow towards the output.
    "paper": {
        **DEFAULT,
        "weight": 0.03,
        "instances": "image",
        "layer_decay": 0.8,
        "taps_per_step": None,
        "objective": "nce",
    },
    "published": {"published": True, "teacher": True},  # the variant of the authors' code
    "shuffled": {**DEFAULT, "objective": "shuffled"},  # control: pairs that do not belong together
    "entropy": {**DEFAULT, "objective": "entropy"},  # control: the code against itself, no latent
    "balance": {"balance": 1.0},  # control: bit balance and decorrelation, no contrast
    "distill": {"distill": 1.0},  # control: what the same teacher gives without any contrast
    "distill_default": {"distill": 1.0, **DEFAULT},
    "smoothing": {"smoothing": 0.1},  # control: another regulariser of the same loop
    "smoothing_default": {"smoothing": 0.1, **DEFAULT},
    # ReActNet's two steps, half of the epochs each: binary activations with real weights, then both binary.
    "two_step": {"two_step": True},
    "two_step_first": {"two_step": True, **DEFAULT, "steps": "first"},
    "two_step_second": {"two_step": True, **DEFAULT, "steps": "second"},
    "two_step_both": {"two_step": True, **DEFAULT},
}
# The weight that the README advises, by the network's optimizer: of arms with `weight=advised`.
ADVISED = {"sgd": 1.0, "adam": 0.1}
TRAINING = {"optimizer", "lr", "weight_decay"}  # an arm's own, in place of the regime's
OWN = {
    "cmim",
    "full_precision",
    "published",
    "balance",
    "distill",
    "smoothing",
    "two_step",
    "steps",
    "labels",
    "user_heads",
    "weight_schedule",
}

# Few images, many epochs: the network fits its training set. Many images, few epochs: it does not.
SMALL = {"data": "cifar10", "model": "vgg_small", "width": 16, "batch_size": 50, "optimizer": "adam"}
REGIMES: dict[str, dict[str, Any]] = {
    "overfit": {**SMALL, "train_size": 500, "epochs": 50},
    "underfit": {**SMALL, "train_size": 10_000, "epochs": 3},
    "fashion": {**SMALL, "data": "fashion_mnist", "train_size": 1000, "epochs": 30},
    "resnet20": {**SMALL, "model": "resnet20", "train_size": 2500, "epochs": 20},
    "digits": {**SMALL, "data": "digits", "model": "resnet8", "width": 8, "epochs": 15, "batch_size": 128},
    # Whole data sets, each method with the optimizer of its paper.
    "cifar10": {"data": "cifar10", "model": "resnet20", "width": 16, "epochs": 15, "optimizer": "own"},
    "cifar100": {"data": "cifar100", "model": "resnet18", "width": 64, "epochs": 100, "optimizer": "own"},
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
    optimizer: str  # sgd, adam, or own: of the method's paper
    lr: float | None  # None: the optimizer's default of loop.OPTIMIZERS, as is the weight decay
    weight_decay: float | None
    fast: str | None  # None: eager float32
    eval_every: int


@dataclass(frozen=True)
class Run:
    """One training; `arm` is a name of ARMS, or NAME+KEY=VALUE,... for a variant."""

    method: str
    arm: str
    seed: int


def changes(arm: str) -> dict[str, Any]:
    """What an arm's name changes: `default+weight=1,lr=0.03` -> weight 1 and lr 0.03."""
    found = {}
    for change in filter(None, arm.partition("+")[2].split(",")):
        key, _, value = change.partition("=")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def arm_options(arm: str) -> dict[str, Any]:
    """The options of an arm: `default+weight=1` is `default` with that one changed."""
    name = arm.partition("+")[0]
    if name not in ARMS:
        raise SystemExit(f"There is no arm {name}; there are {', '.join(ARMS)}.")
    options = ARMS[name] | changes(arm)
    if not options.get("cmim") and not options.get("published") and (unused := set(options) - TRAINING - OWN):
        raise SystemExit(f"Arm {arm} has no CMIM that {', '.join(sorted(unused))} could be options of.")
    return options


def with_advised_weight(options: dict[str, Any], optimizer: str) -> dict[str, Any]:
    return options | {"weight": ADVISED[optimizer]} if options.get("weight") == "advised" else options


def beside(arm: str, name: str) -> str:
    """The arm `name` trained by the same optimizer: the one that `arm` is compared with."""
    kept = [f"{key}={json.dumps(value).strip(chr(34))}" for key, value in changes(arm).items() if key in TRAINING]
    return f"{name}+{','.join(kept)}" if kept else name


def needs_teacher(options: dict[str, Any]) -> bool:
    return bool(options.get("teacher") or options.get("distill"))


def schedule(options: dict[str, Any], config: Config, method: str) -> loop.Schedule:
    """The regime's, with what the arm changes."""
    chosen = {key: options.get(key, getattr(config, key)) for key in TRAINING}
    if chosen["optimizer"] == "own":
        chosen["optimizer"] = METHODS[method].optimizer
    for key, usual in loop.OPTIMIZERS[chosen["optimizer"]].items():
        chosen[key] = usual if chosen[key] is None else chosen[key]
    epochs = config.epochs // 2 if options.get("two_step") else config.epochs
    return loop.Schedule(epochs, config.batch_size, fast=config.fast, eval_every=config.eval_every, **chosen)


def cmim_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in TRAINING | OWN}


def resolved(run: Run, config: Config) -> dict[str, Any]:
    """All settings of a run, those that the plug-in's defaults decide included."""
    options = arm_options(run.arm)
    chosen = schedule(options, config, run.method)
    options = with_advised_weight(options, chosen.optimizer)
    settings: dict[str, Any] = {"schedule": asdict(chosen)}
    if options.get("cmim") or options.get("published"):
        kind = cmim_plugin.PublishedCMIM if options.get("published") else cmim_plugin.CMIM
        parameters = inspect.signature(kind).parameters.values()
        usual = {p.name: p.default for p in parameters if p.default is not p.empty}
        known = usual | cmim_options(options) | ({"heads_lr": 0} if options.get("user_heads") else {})
        settings["cmim"] = {key: v if plain(v) else type(v).__name__ for key, v in known.items()}
    return settings


def plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


# --- one run ---------------------------------------------------------------------------------------------------------


def make_auxiliary(
    options: dict[str, Any],
    model: nn.Module,
    data: Data,
    example: Tensor,
    teacher: nn.Module | None,
    seed: int,
) -> loop.Auxiliary | None:
    """The loss that an arm adds to the task's."""
    if not options.get("cmim") and not options.get("published"):
        return Balance(model, options["balance"], seed=seed) if options.get("balance") else None
    cmim = cmim_options(options)
    if cmim.pop("teacher", False):
        cmim["teacher"] = teacher
    objective = cmim.pop("objective", None)
    if objective == "nce":
        cmim["objective"] = cmim_plugin.NCE(num_samples=len(data.x_train))
    elif objective:
        cmim["objective"] = OBJECTIVES[objective]
    contrast = Contrast(
        model,
        example,
        labels=options.get("labels", False),
        user_heads=options.get("user_heads", False),
        weight_schedule=options.get("weight_schedule", "constant"),
        published_targets=data.y_train if options.get("published") else None,
        **cmim,
    )
    if not options.get("balance"):
        return contrast
    # Its hooks would collect the codes of CMIM's dry run.
    return Together([contrast, Balance(model, options["balance"], seed=seed)])


@cache  # a worker process trains many runs on the same data
def load(config: Config, root: str | None) -> Data:
    data = load_data(config.data, root, config.train_size, config.held_out if config.split == "val" else 0)
    if device().type == "cuda":
        torch.cuda.synchronize()  # runs on other streams use it
    return data


def execute(*args: Any) -> dict[str, Any]:
    """`steps_of` a run, one after another."""
    return loop.to_the_end(steps_of(*args))


def steps_of(
    run: Run, config: Config, root: str | None, weights: Path | None, about: dict[str, Any]
) -> Generator[None, None, dict[str, Any]]:
    """Train, and return the record of the run. `weights`: where the teacher's are, or go to."""
    start, cpu_start = time.perf_counter(), time.process_time()
    options = arm_options(run.arm)
    if config.fast == loop.GRAPH and "weight_schedule" in options:
        raise SystemExit(f"Arm {run.arm} changes its weight, which a CUDA graph takes for a constant.")
    data = load(config, root)
    method = METHODS[run.method]
    is_teacher = options.get("full_precision", False)

    def build(binary: bool) -> nn.Module:
        recipe = method.recipe if binary else full_precision(method.recipe)
        body = BODIES[config.model](recipe, data.num_classes, data.in_channels, width=config.width)
        return body.to(device(), memory_format=torch.channels_last)

    teacher = None
    if needs_teacher(options):
        teacher = build(binary=False).eval().requires_grad_(False)
        teacher.load_state_dict(torch.load(weights, map_location=device(), weights_only=True))

    torch.manual_seed(run.seed)
    model = build(binary=not is_teacher)
    example = data.normalise(data.x_train[:16])
    criterion = loop.cross_entropy
    if options.get("distill"):
        if options.get("smoothing"):
            raise SystemExit("Logit distillation and label smoothing are each a loss of its own; choose one.")
        criterion = distillation(teacher, options["distill"])
    elif options.get("smoothing"):
        criterion = smoothed(options["smoothing"])

    chosen, histories = schedule(options, config, run.method), []
    options = with_advised_weight(options, chosen.optimizer)
    for step in ("first", "second") if options.get("two_step") else ("only",):
        binarize_weights(model, binary=step != "first")
        contrasted = options.get("steps", step) == step

        def attach(contrasted: bool = contrasted) -> loop.Auxiliary | None:
            torch.manual_seed(run.seed)  # a run beside this one may have set another
            if not contrasted:
                return None
            return make_auxiliary(options, model, data, example, teacher, run.seed)

        histories.append(
            (
                yield from loop.training(
                    model,
                    data,
                    chosen,
                    seed=run.seed + (1_000_000 if step == "second" else 0),
                    attach=attach,
                    criterion=criterion,
                    on_epoch=method.on_epoch,
                )
            )
        )
    if is_teacher and weights:
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)

    def curve(name: str) -> list[float]:
        return [value for history in histories for value in getattr(history, name)]

    seconds = curve("seconds")
    return {
        **asdict(run),
        "accuracy": round(curve("test_accuracy")[-1], 3),  # after the last epoch
        "train_accuracy": round(curve("train_accuracy")[-1], 3),
        "options": arm_options(run.arm),
        "resolved": resolved(run, config),
        "config": asdict(config),
        "curves": {
            "train_loss": rounded(curve("train_loss")),
            "train_accuracy": rounded(curve("train_accuracy")),
            "test_accuracy": rounded(curve("test_accuracy")),  # null in epochs without a test
            # nats; of two steps the first one's, then the second one's
            "bounds": {
                tap: rounded([v for history in histories for v in history.bounds.get(tap, [])])
                for tap in sorted({tap for history in histories for tap in history.bounds})
            },
        },
        "inside": {
            part: {name: round_values(values) for name, values in found.items()}
            for part, found in look(model, data).items()
        },
        "seconds": round(time.perf_counter() - start, 1),
        # What a shared machine cannot distort; of all runs that train side by side.
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "epoch_seconds": round(sorted(seconds)[len(seconds) // 2], 3),  # median: the first epoch compiles
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "cmim_plugin": cmim_plugin.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **about,
    }


def rounded(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 3) for value in values]


def round_values(values: Any) -> Any:
    """To 4 significant digits; NaN becomes null."""
    if isinstance(values, dict):
        return {key: round_values(value) for key, value in values.items()}
    return None if math.isnan(values) else float(f"{values:.4g}")


def device_name() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else f"{device().type}, {platform.machine()}"


SCRIPTS = tuple(f"benchmarks/{name}.py" for name in ("accuracy", "auxiliaries", "data", "inside", "loop", "nets"))


# --- results and queue -----------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[Run, dict[str, Any]]:
    """The records of a results file; of a run done twice, the later one."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Run(r["method"], r["arm"], r["seed"]): r for r in records}


def check_same(done: dict[Run, dict[str, Any]], config: Config, path: Path) -> None:
    """Refuse to mix configurations in one file, defaults of the plug-in that have changed since included."""
    for run, record in done.items():
        for what, found, wanted in (
            ("the configuration", record["config"], asdict(config)),
            (f"arm {run.arm}", record["options"], arm_options(run.arm)),
            (f"arm {run.arm}, resolved:", record.get("resolved"), resolved(run, config)),
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


class Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **options))
        return future


def work(queue: list[Run], done: dict[Run, dict[str, Any]], path: Path, args: argparse.Namespace) -> None:
    """Run the queue in `args.jobs` processes and append each record as it comes."""
    deadline = time.monotonic() + 60 * args.budget_minutes
    seconds = {run: record["seconds"] for run, record in done.items()}
    total, finished = len(queue), 0
    fits, left_out = plan(queue, seconds, deadline - time.monotonic(), args.jobs)
    print(f"{path.stem}: {len(done)} runs are there, {total} to do, {len(fits)} of them planned", flush=True)
    about = {"commit": commit(*SCRIPTS)}  # of the start: a commit made meanwhile is not what runs

    def weights(run: Run) -> Path:
        return args.cache / path.stem / f"{run.method}-{run.seed}.pt"

    running: dict[Future, Run] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    start: Callable[..., Any] = execute
    torch.backends.cudnn.benchmark = bool(args.config.fast)
    if args.config.fast == loop.GRAPH:
        fuse()
        pool: Executor = loop.SideBySide()
        start = steps_of
    elif args.jobs == 1:
        pool = Here()
        torch.set_num_threads(args.threads)
    else:  # spawned: CUDA cannot be used in a forked process
        pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (args.threads,))
    with pool, path.open("a") as file:
        while True:
            fits, left_out = plan(queue, seconds, deadline - time.monotonic(), args.jobs)
            while fits and len(running) < args.jobs:
                run = next((r for r in fits if teacher_is_there(r, weights(r), running)), None)
                if run is None:
                    break
                fits.remove(run)
                queue = [other for other in queue if other != run]
                running[pool.submit(start, run, args.config, args.root, weights(run), about)] = run
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
    parser.add_argument(
        "--arms", nargs="+", default=["none", "default"], help=f"of {', '.join(ARMS)}; NAME+KEY=VALUE,..."
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose hyper-parameters")
    parser.add_argument("--held-out", type=int, default=5000, help="training images that --split val tests on")
    parser.add_argument("--root", help="folder with NAME.npz, or where torchvision keeps its downloads")
    parser.add_argument("--name", help="of the results file; REGIME, with -OPTIMIZER where given, -val for that split")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of a run on the CPU; all cores divided by --jobs")
    parser.add_argument("--budget-minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "teachers", help="of the teachers' weights")
    parser.add_argument("--allow-dirty", action="store_true", help="write to benchmarks/results from changed code")
    parser.add_argument("--data", choices=DATASETS)
    parser.add_argument("--train-size", type=int, help="train on that many images only")
    parser.add_argument("--model", choices=BODIES)
    parser.add_argument("--width", type=int, help="channels of the first layer")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, help="128")
    parser.add_argument("--optimizer", choices=("sgd", "adam", "own"), help="own: the one of the method's paper")
    parser.add_argument("--lr", type=float, help="0.1 for sgd, 3e-3 for adam")
    parser.add_argument("--weight-decay", type=float, help="1e-4 for sgd, 0 for adam")
    parser.add_argument(
        "--fast",
        nargs="?",
        const="default",
        metavar="MODE",
        help="bf16 autocast (compiled on a CPU: float32), and torch.compile in that mode (default: its usual one); or "
        "graph: CUDA graphs, --jobs runs side by side in one process",
    )
    parser.add_argument("--eval-every", type=int, help="epochs from test to test; all: one test, at the end")
    args = parser.parse_args(arguments)

    usual = {"batch_size": 128, "train_size": None, "lr": None, "weight_decay": None, "fast": None}
    options = {**usual, **REGIMES[args.regime], **{k: v for k, v in vars(args).items() if v is not None}}
    options["eval_every"] = args.eval_every or options["epochs"]
    args.config = Config(**{key: options[key] for key in Config.__dataclass_fields__})
    suffixes = [args.optimizer or "", "val" if args.split == "val" else ""]
    args.name = args.name or "-".join([args.regime, *filter(None, suffixes)])
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    path = args.results / f"{args.name}.jsonl"
    if args.results.resolve() == RESULTS and not args.allow_dirty and commit(*SCRIPTS).endswith("-dirty"):
        raise SystemExit(
            f"The code differs from commit {commit(*SCRIPTS).removesuffix('-dirty')}, so a record in {RESULTS} could "
            "not be repeated. Commit first, or write elsewhere with --results DIR, or add --allow-dirty."
        )
    done = read_results(path)
    check_same(done, args.config, path)

    def missing(run: Run) -> bool:
        lost = run.arm == "full_precision" and not (args.cache / path.stem / f"{run.method}-{run.seed}.pt").exists()
        return run not in done or lost

    queue = make_queue(args.methods, args.arms, args.seeds)
    work([run for run in queue if missing(run)], done, path, args)


if __name__ == "__main__":
    main()
