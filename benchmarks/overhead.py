"""What does CMIM cost? Time and memory of a training step without it, with it, and with the method written naively.

    python benchmarks/overhead.py
    python benchmarks/overhead.py step --networks irnet-resnet20 --batches 64 --arms none position
    python benchmarks/overhead.py step --device cuda --compile --amp bfloat16

Every arm has some copies of the network; in each round every arm takes one step with one of them, in random order, and
is compared with the bare step of the same round. Cases that are in results/overhead.json already are skipped, so that
an interrupted benchmark is resumed by the same command. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import random
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler tells of its start and end

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from accuracy import RESULTS, commit
from cmim_plugin import CMIM, __version__, find_binary_activations, info_nce
from naive import Naive, naive_info_nce
from nets import (
    BIREAL,
    BODIES,
    IRNET,
    REACTNET,
    ApproxSign,
    Recipe,
    RPReLU,
    full_precision,
    magnitude_aware,
    resnet,
)

T = TypeVar("T")

SCRIPTS = ("benchmarks/overhead.py", "benchmarks/naive.py")
PHASES = ("forward", "loss", "backward", "optimizer")

# NAME:COUNT is an arm on the first COUNT taps only, all of them in every step.
ARMS = {
    "none": "the binary network alone",
    "position": "CMIM's default: one sample is a position",
    "position_all": "the same, but all taps in every step",
    "image": "CMIM, one sample is a whole image",
    "teacher_pass": "no CMIM, but a forward pass of a full-precision teacher: what any method with a teacher pays",
    "teacher": "CMIM against the teacher's activations, one sample is an image",
    "naive_position": "the method written naively, one sample is a position",
    "naive_image": "the same, one sample is an image",
}


# --- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """build: whether binary, or its full-precision twin with the same module names -> network of `classes` outputs
    size: height and width of its images
    batches: that fit into a CPU's time
    """

    build: Callable[[bool], nn.Module]
    size: int
    classes: int
    batches: tuple[int, ...]


def cifar(body: Callable[..., nn.Module], recipe: Recipe, binary: bool) -> nn.Module:
    return body(recipe if binary else full_precision(recipe), 10)


def reactnet_imagenet(binary: bool) -> nn.Module:
    """ReActNet in its ResNet-18 form, with the stem that ResNets have at ImageNet's size."""
    net = BODIES["resnet18"](REACTNET if binary else full_precision(REACTNET), 1000)
    net.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    net.nonlinearity1 = nn.Sequential(RPReLU(64), nn.MaxPool2d(3, 2, 1))
    return net


class MagnitudeAwareLinear(nn.Linear):
    """Binary weights; the module before it binarizes the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, magnitude_aware(self.weight), self.bias)


def binary_vit(binary: bool) -> nn.Module:
    """timm's ViT-Tiny with the linear layers of its blocks binarized as in Bi-Real Net."""
    import timm

    net = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    for name, layer in list(net.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            kind = MagnitudeAwareLinear if binary else nn.Linear
            linear = kind(layer.in_features, layer.out_features, layer.bias is not None)
            steps = OrderedDict(binary=ApproxSign() if binary else nn.Identity(), linear=linear)
            net.blocks.set_submodule(name, nn.Sequential(steps))
    return net


NETWORKS = {
    "irnet-resnet20": Network(partial(cifar, BODIES["resnet20"], IRNET), 32, 10, (16, 64, 256)),
    "bireal-resnet20": Network(partial(cifar, BODIES["resnet20"], BIREAL), 32, 10, (16, 64, 256)),
    "irnet-resnet18": Network(partial(cifar, BODIES["resnet18"], IRNET), 32, 10, (16, 64)),
    "bireal-resnet18": Network(partial(cifar, BODIES["resnet18"], BIREAL), 32, 10, (16, 64)),
    "reactnet-imagenet": Network(reactnet_imagenet, 224, 1000, (16,)),
    "bireal-vit": Network(binary_vit, 224, 1000, (16,)),
    # All of its taps are of one shape, to see what each of them adds.
    "bireal-flat": Network(partial(cifar, partial(resnet, stages=1, units=16, width=32), BIREAL), 32, 10, (64,)),
}
FLAT = "bireal-flat"
FLAT_ARMS = ["none", *(f"{kind}:{taps}" for kind in ("position", "image") for taps in (1, 2, 4, 8, 16))]
DEVICE_BATCHES = (16, 64, 256)  # on a GPU


# --- arms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is measured together. `queue` is the critic's; amp: "", "bfloat16" or "float16"."""

    suite: str
    network: str
    batch: int
    queue: int
    device: str
    threads: int
    compile: bool
    amp: str
    contiguous: bool

    @property
    def label(self) -> str:
        words = [self.network, "compiled" * self.compile, self.amp, "contiguous" * self.contiguous]
        return ", ".join(filter(None, words))


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Arm:
    """One copy of the network and what is trained with it.

    extra: (network) -> a further loss of its last forward pass, or none
    """

    def __init__(self, name: str, case: Case, x: Tensor, y: Tensor):
        torch.manual_seed(0)
        self.name, self.case, self.x, self.y = name, case, x, y
        self.network = network(case)
        self.extra = attach(name, self.network, case, x)
        parameters = [*self.network.parameters(), *(self.extra.parameters() if self.extra else ())]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        self.scaler = torch.amp.GradScaler(case.device, enabled=case.amp == "float16")
        self.model = torch.compile(self.network) if case.compile else self.network

    @classmethod
    def after_a_step(cls, *args: Any) -> Arm:
        """With the gradients and the optimizer's state that all later steps find."""
        arm = cls(*args)
        arm.step()
        return arm

    def mark(self) -> Any:
        """A point in time: on the host's clock, or on the GPU's timeline, where waiting for it would cost time."""
        if self.case.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self) -> list[Any]:
        """One training step; the marks before it and after each of `PHASES`."""
        marks = [self.mark()]
        dtype = getattr(torch, self.case.amp or "bfloat16")
        with torch.autocast(self.case.device, dtype, enabled=bool(self.case.amp)):
            loss = F.cross_entropy(self.model(self.x), self.y)
            marks.append(self.mark())
            if self.extra is not None:
                loss = loss + self.extra(self.model)
        marks.append(self.mark())
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        marks.append(self.mark())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        marks.append(self.mark())
        self.loss = loss.detach()
        return marks

    def seconds(self, steps: int) -> list[float]:
        """Means over some steps: of each of `PHASES`, then of the whole step."""
        sync(self.case.device)
        marks = [self.step() for _ in range(steps)]
        sync(self.case.device)
        phases = [sum(elapsed(m[i], m[i + 1]) for m in marks) / steps for i in range(len(PHASES))]
        return [*phases, elapsed(marks[0][0], marks[-1][-1]) / steps]


def elapsed(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def network(case: Case, binary: bool = True) -> nn.Module:
    memory_format = torch.contiguous_format if case.contiguous else torch.channels_last
    return NETWORKS[case.network].build(binary).to(case.device, memory_format=memory_format)


def attach(name: str, model: nn.Module, case: Case, x: Tensor) -> nn.Module | None:
    """What the arm adds to the loss; its hooks are on the network then."""
    kind, _, count = name.partition(":")
    if kind not in ARMS:
        raise SystemExit(f"There is no arm {kind}; there are {', '.join(ARMS)}.")
    if kind == "none":
        return None
    if kind.startswith("naive"):
        return Naive(model, x, instances=kind.removeprefix("naive_"))
    if kind in ("position", "position_all", "image"):
        settings: dict[str, Any] = {"taps_per_step": None} if count or kind == "position_all" else {}
        if count:
            settings["taps"] = [found.name for found in find_binary_activations(model, x) if found.tapped][: int(count)]
        return CMIM(model, x, instances=kind.removesuffix("_all"), **settings)
    teacher = network(case, binary=False).eval().requires_grad_(False)
    if kind == "teacher":
        return CMIM(model, x, instances="image", teacher=teacher)

    def run_teacher(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            teacher(*inputs)

    model.register_forward_pre_hook(run_teacher)
    return None


# --- measuring -------------------------------------------------------------------------------------------------------


def peak_memory(device: str, build: Callable[[], T], run: Callable[[T], Any]) -> tuple[T, int]:
    """What `build()` returns, and the most bytes in use during `run` of it, of all that was allocated since `build`.

    On the CPU, of the allocations that the profiler reports: tensors and the buffers of torch's operators.
    """
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        built = build()
        torch.cuda.reset_peak_memory_stats()
        run(built)
        return built, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built = build()
        gc.collect()  # what compiling left
        with record_function("measured"):
            run(built)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(trace := f"{folder}/trace.json")
        return built, highest(json.loads(Path(trace).read_text())["traceEvents"])


def highest(events: list[dict[str, Any]]) -> int:
    """The highest running sum of the "[memory]" events during the event "measured", counted from the first event."""
    span = next(event for event in events if event.get("name") == "measured")
    alive: dict[int, int] = {}
    total = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        if event["ts"] > span["ts"] + span["dur"]:
            break
        if event["ts"] >= span["ts"]:
            peak = max(peak, total)
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            alive[address] = size
            total += size
        else:  # what is older than the profile was not counted when it came
            total -= alive.pop(address, 0)
    return max(peak, total)


def interleaved(
    arms: dict[str, Callable[[], list[float]]], rounds: int, warmup: int, limit: float, label: str
) -> dict[str, np.ndarray]:
    """Call every arm once a round, in random order: what each returned, (rounds, ...) without the warm-up rounds.

    Past `limit` seconds no further round starts, once there are five.
    """
    order = random.Random(0)
    values: dict[str, list[list[float]]] = {name: [] for name in arms}
    start = time.monotonic()
    for done in tqdm(range(-warmup, rounds), desc=label, disable=None):
        if done >= 5 and time.monotonic() - start > limit:
            break
        for name in order.sample(list(arms), len(arms)):
            result = arms[name]()
            if done >= 0:
                values[name].append(result)
    return {name: np.array(rows) for name, rows in values.items()}


def in_turn(runs: list[Callable[[], T]]) -> Callable[[], T]:
    """Calls the next of them each time."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def ratio(seconds: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Median of the ratios of the rounds, their quartiles, and the median's 95 % interval (percentile bootstrap)."""
    from scipy import stats

    ratios = seconds / reference
    quartiles = np.quantile(ratios, (0.25, 0.75))
    interval = (math.nan, math.nan)
    if len(ratios) > 1:
        generator = np.random.default_rng(0)
        interval = stats.bootstrap(
            (ratios,), np.median, method="percentile", random_state=generator
        ).confidence_interval
    return {
        "median": digits(np.median(ratios)),
        "quartiles": [digits(q) for q in quartiles],
        "interval": [digits(bound) for bound in interval],
    }


def digits(value: float) -> float | None:
    """Six significant digits; NaN is no JSON."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def measure_step(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All arms of a network."""
    generator = torch.Generator().manual_seed(0)
    size, classes = NETWORKS[case.network].size, NETWORKS[case.network].classes
    memory_format = torch.contiguous_format if case.contiguous else torch.channels_last
    x = torch.randn(case.batch, 3, size, size, generator=generator).to(case.device, memory_format=memory_format)
    y = torch.randint(classes, (case.batch,), generator=generator).to(case.device)

    arms: dict[str, list[Arm]] = {name: [] for name in case_arms(case, args)}
    peaks: dict[str, int] = {}
    for name in arms:
        first, peaks[name] = peak_memory(case.device, partial(Arm.after_a_step, name, case, x, y), Arm.step)
        arms[name].append(first)
    # Where in memory a copy happens to lie makes it a per cent faster or slower in all rounds.
    for _ in range(args.copies - 1):
        for name in arms:
            arms[name].append(Arm.after_a_step(name, case, x, y))
    seconds = interleaved(
        {name: in_turn([partial(arm.seconds, args.steps) for arm in copies]) for name, copies in arms.items()},
        args.rounds,
        args.warmup,
        args.case_seconds,
        f"{case.label}, batch {case.batch}",
    )
    for arm in itertools.chain(*arms.values()):
        if not arm.loss.isfinite():
            raise SystemExit(f"{case}: the loss of arm {arm.name} is {arm.loss}; its time may not be that of training.")
    none = seconds["none"]
    records = {}
    for name in arms:
        extra = np.median(seconds[name] - none, 0)
        records[name] = {
            "taps": taps_of(arms[name][0].extra),
            "seconds": digits(np.median(seconds[name][:, -1])),
            "ratio": ratio(seconds[name][:, -1], none[:, -1]),
            # Medians of the differences of a round: of the hooks; of heads and critic; of what both add to backward.
            "extra_seconds": dict(zip((*PHASES, "step"), map(digits, extra), strict=True)),
            "peak_bytes": peaks[name],
            "peak_ratio": digits(peaks[name] / peaks["none"]),
            "step_seconds": [digits(s) for s in seconds[name][:, -1]],
        }
    record = {"arms": records, "rounds": len(none), "steps": args.steps, "copies": args.copies}
    if case.suite == "step":
        record["attach"] = measure_attach(case, x)
    return record


def taps_of(extra: nn.Module | None) -> int:
    if isinstance(extra, CMIM):
        return len(extra.taps)
    return len(extra.heads) if isinstance(extra, Naive) else 0


def measure_attach(case: Case, x: Tensor) -> dict[str, float]:
    """Seconds of a forward pass in training mode and of building a CMIM, in turn; medians of five."""
    model = network(case)
    forwards, attachings = [], []
    for measured in [False, *[True] * 5]:
        sync(case.device)
        start = time.perf_counter()
        model(x)
        sync(case.device)
        middle = time.perf_counter()
        cmim = CMIM(model, x)
        sync(case.device)
        end = time.perf_counter()
        cmim.remove()
        if measured:
            forwards.append(middle - start)
            attachings.append(end - middle)
    return {"seconds": digits(median(attachings)), "forward_seconds": digits(median(forwards))}


def measure_critic(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of `info_nce` and of the naive one on embeddings of width 128."""
    generator = torch.Generator().manual_seed(0)

    def embeddings(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, 128, generator=generator), dim=1).to(case.device)

    def embed() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z_b, z_f = (embeddings(case.batch).requires_grad_() for _ in range(2))
        return z_b, z_f, {f"queue_{side}": embeddings(case.queue) for side in "bf"} if case.queue else {}

    def run(objective: Callable[..., Tensor], given: tuple[Tensor, Tensor, dict[str, Tensor]]) -> list[float]:
        z_b, z_f, queues = given
        z_b.grad = z_f.grad = None
        sync(case.device)
        start = time.perf_counter()
        objective(z_b, z_f, **queues).backward()
        sync(case.device)
        return [time.perf_counter() - start]

    arms, peaks = {}, {}
    for name, objective in (("naive", naive_info_nce), ("info_nce", info_nce)):
        given, peaks[name] = peak_memory(case.device, embed, partial(run, objective))
        arms[name] = partial(run, objective, given)
    label = f"critic, batch {case.batch}, queue {case.queue}"
    seconds = interleaved(arms, args.rounds, args.warmup, args.case_seconds, label)
    records = {
        name: {
            "seconds": digits(np.median(seconds[name])),
            "ratio": ratio(seconds[name][:, 0], seconds["naive"][:, 0]),
            "peak_bytes": peaks[name],
        }
        for name in arms
    }
    return {"arms": records, "rounds": len(seconds["naive"])}


# --- cases and results -----------------------------------------------------------------------------------------------


def case_arms(case: Case, args: argparse.Namespace) -> list[str]:
    """The first is what the others are compared with."""
    if case.suite == "critic":
        return ["naive", "info_nce"]
    return FLAT_ARMS if case.suite == "taps" else ["none", *(arm for arm in args.arms if arm != "none")]


def cases(args: argparse.Namespace) -> list[Case]:
    setting = {"device": args.device, "threads": args.threads}
    training = {**setting, "queue": 0, "compile": args.compile, "amp": args.amp, "contiguous": args.contiguous}
    plain = {**setting, "compile": False, "amp": "", "contiguous": False}
    result = []
    for name in args.networks if "step" in args.suites else ():
        fitting = NETWORKS[name].batches if args.device == "cpu" else DEVICE_BATCHES
        result += [Case("step", name, batch, **training) for batch in args.batches or fitting]
    if "taps" in args.suites:
        result += [Case("taps", FLAT, batch, **training) for batch in args.batches or NETWORKS[FLAT].batches]
    if "critic" in args.suites:
        result += [Case("critic", "", b, queue=q, **plain) for q in args.queues for b in args.critic_batches]
    return result


def read_results(path: Path) -> dict[Case, dict[str, Any]]:
    records = json.loads(path.read_text()) if path.exists() else []
    return {Case(**record["case"]): record for record in records}


def write_results(path: Path, records: dict[Case, dict[str, Any]]) -> None:
    """At once or not at all: an interruption leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(record) for record in records.values()) + "\n]\n"  # a case a line
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(text)
    partial_path.replace(path)


def about(case: Case) -> dict[str, Any]:
    versions = {"cmim_plugin": __version__, "torch": torch.__version__, "python": platform.python_version()}
    name = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, {case.threads} threads"
    return {
        "case": asdict(case),
        "device": torch.cuda.get_device_name() if case.device == "cuda" else name,
        "versions": versions,
        "commit": commit(*SCRIPTS),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# --- command line ----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    suites = ("step", "taps", "critic")
    parser.add_argument("suites", nargs="*", help="step: networks; taps: 1 to 16 of one shape; critic: info_nce alone")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[name for name in NETWORKS if name != FLAT])
    parser.add_argument("--batches", type=int, nargs="+", help="for all networks; else what fits each")
    parser.add_argument("--arms", nargs="+", help=f"of {', '.join(ARMS)}; NAME:COUNT for some taps")
    parser.add_argument("--critic-batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--queues", type=int, nargs="+", default=[0, 4096, 65_536])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--copies", type=int, default=4, help="of each arm, a round takes the next")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those")
    parser.add_argument("--steps", type=int, help="of an arm in a round; 1, on a GPU 10")
    parser.add_argument("--case-seconds", type=float, default=180, help="no further round then, once there are five")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="the network, by torch.compile")
    parser.add_argument("--amp", choices=("", "bfloat16", "float16"), default="")
    parser.add_argument("--contiguous", action="store_true", help="networks and images not in channels_last")
    parser.add_argument("--again", action="store_true", help="measure what the file has already, too")
    parser.add_argument("--results", type=Path, default=RESULTS / "overhead.json")
    args = parser.parse_args(arguments)
    args.suites = args.suites or suites
    if unknown := set(args.suites) - set(suites):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(suites)}")
    # Its graph breaks, and what torch then gives up to compile as a whole is code that all arms share.
    uncompiled = {"teacher"} if args.compile else set()
    if args.arms and uncompiled & set(args.arms):
        parser.error("the teacher arm does not compile in one graph: leave it out of --arms")
    args.arms = args.arms or [arm for arm in ARMS if arm not in uncompiled]
    args.steps = args.steps or (10 if args.device == "cuda" else 1)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    commit(*SCRIPTS)  # as it is now, not after hours
    if args.compile:
        # The arms share their code: without these, all would run what was compiled for the first, without its hooks.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.config.recompile_limit = 64
    for case in cases(args):
        done = read_results(args.results)
        if case in done and set(case_arms(case, args)) <= done[case]["arms"].keys() and not args.again:
            continue
        start = time.monotonic()
        measured = (measure_critic if case.suite == "critic" else measure_step)(case, args)
        done[case] = {**about(case), **measured, "took_seconds": round(time.monotonic() - start, 1)}
        write_results(args.results, done)
        reference = case_arms(case, args)[0]
        ratios = [f"{n} {m['ratio']['median']:.3f}" for n, m in measured["arms"].items() if n != reference]
        print(f"{case.suite} {case.label}, batch {case.batch}, queue {case.queue}: {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
