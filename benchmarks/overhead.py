"""What does CMIM cost? Time and memory of a training step without it, with it, and with the method written naively.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --networks bireal-resnet20 --batches 64 --arms position
    python benchmarks/overhead.py --device cuda --compile default --amp bfloat16

The arms take their steps in turn, round by round, and each step is compared with the bare network's of the same round.
Every arm appends one JSON line to results/overhead.jsonl as soon as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler announces its start and end

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from cmim_plugin import CMIM, __version__
from large import binary_vit, reactnet_a
from loop import Recorded, stream
from naive import Naive
from nets import BODIES, METHODS
from records import commit

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

BARE = "none"
ARMS: dict[str, Callable[[nn.Module, Tensor], nn.Module | None]] = {
    BARE: lambda model, x: None,
    "position": CMIM,  # the default: some taps a step, one sample is a position
    "all_taps": partial(CMIM, taps_per_step=None),
    "image": partial(CMIM, instances="image", taps_per_step=None),
    "naive_position": partial(Naive, instances="position"),
    "naive_image": partial(Naive, instances="image"),
}

COMPILERS: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "aot_eager": {"backend": "aot_eager"},  # traced, not compiled: to try it out
}
RECORDED = "cuda-graph"  # the eager step, recorded in a CUDA graph: what it takes where the host is no limit


# --- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """build: -> network; size: height and width of its images; classes: its outputs; batches: that suit a CPU."""

    build: Callable[[], nn.Module]
    size: int
    classes: int
    batches: tuple[int, ...]


def cifar(method: str, body: str, **settings: Any) -> nn.Module:
    return BODIES[body](METHODS[method].recipe, 10, **settings)


NETWORKS = {
    "irnet-resnet20": Network(partial(cifar, "irnet", "resnet20"), 32, 10, (64, 256)),
    "bireal-resnet20": Network(partial(cifar, "bireal", "resnet20"), 32, 10, (64, 256)),
    "bireal-resnet18": Network(partial(cifar, "bireal", "resnet18"), 32, 10, (64,)),
    "reactnet-a": Network(reactnet_a, 224, 1000, (16,)),
    "vit-tiny": Network(partial(binary_vit, "vit_tiny_patch16_224"), 224, 1000, (16,)),
    "vit": Network(partial(binary_vit, "vit_small_patch16_224"), 224, 1000, (16,)),
    # For tests.
    "tiny": Network(partial(cifar, "bireal", "resnet8", width=4), 16, 10, (4,)),
}


# --- one arm ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What the arms that are compared have in common.

    compile: "" for eager, one of `COMPILERS`, or `RECORDED`; amp: "", "bfloat16" or "float16"
    """

    network: str
    batch: int
    device: str = "cpu"
    threads: int = 1
    compile: str = ""
    amp: str = ""
    channels_last: bool = True

    @property
    def label(self) -> str:
        how = f"compiled ({self.compile})" if self.compile in COMPILERS else self.compile
        words = [f"{self.network}, batch {self.batch}", how, self.amp]
        return ", ".join(filter(None, words))


class Trainee:
    """One copy of the network, and what is trained with it."""

    def __init__(self, arm: str, config: Config, network: Network | None = None) -> None:
        torch.manual_seed(0)
        self.config = config
        network = network or NETWORKS[config.network]
        where = {
            "device": config.device,
            "memory_format": torch.channels_last if config.channels_last else torch.contiguous_format,
        }
        self.x = torch.randn(config.batch, 3, network.size, network.size).to(**where)
        self.y = torch.randint(network.classes, (config.batch,)).to(config.device)
        self.model = network.build().to(**where)
        self.extra = ARMS[arm](self.model, self.x)
        parameters = [*self.model.parameters(), *(self.extra.parameters() if self.extra is not None else ())]
        lr = torch.tensor(1e-3, device=config.device) if config.compile == RECORDED else 1e-3
        self.optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)
        self.scaler = torch.amp.GradScaler(config.device, enabled=config.amp == "float16")
        # One graph of forward, loss and plug-in; a naive loop is compiled as far as it can be.
        compiler = COMPILERS.get(config.compile)
        self.loss_of = self.forward if compiler is None else torch.compile(self.forward, **compiler)
        self.loss = torch.zeros((), device=config.device)
        self.recorded = None
        if config.compile == RECORDED:
            nothing = torch.empty(0, device=config.device)
            self.recorded = Recorded(lambda _: self.own_step(), nothing, [])
            with stream():
                for _ in range(Recorded.WARMUP + 1):
                    self.recorded(nothing)
        self.step()

    @property
    def taps(self) -> int:
        return len(self.extra.taps if isinstance(self.extra, CMIM) else getattr(self.extra, "heads", ()))

    def forward(self) -> Tensor:
        loss = F.cross_entropy(self.model(self.x), self.y)
        return loss if self.extra is None else loss + self.extra(self.model)

    def step(self) -> None:
        """One training step; nothing waits for it."""
        if self.recorded is None or self.recorded.graph is None:
            self.own_step()
        else:
            self.recorded.graph.replay()

    def own_step(self) -> None:
        if self.config.compile in COMPILERS:
            torch.compiler.cudagraph_mark_step_begin()
        dtype = getattr(torch, self.config.amp or "bfloat16")
        with torch.autocast(self.config.device, dtype, enabled=bool(self.config.amp)):
            loss = self.loss_of()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss = loss.detach().clone()  # what a CUDA graph returns is overwritten in its next replay

    def mark(self) -> Any:
        """A point in time: on the host's clock, or on the GPU's, which is read later."""
        if self.config.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, steps: int) -> float:
        """Of one step, the mean of some."""
        start = self.mark()
        for _ in range(steps):
            self.step()
        end = self.mark()
        if self.config.device == "cuda":
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3 / steps
        return (end - start) / steps


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    config: Config,
    arms: list[str],
    *,
    rounds: int,
    steps: int = 1,
    copies: int = 1,
    warmup: int = 2,
    limit: float = 180,
    network: Network | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure the arms side by side: one record an arm, that of the bare network first.

    Args:
        rounds: in each of them every arm takes some `steps`.
        copies: of the network an arm has; a round takes the next. Where in memory a copy lies makes it a percent faster
            or slower in all its steps.
        warmup: rounds before those.
        limit: seconds after which no further round starts, once there are five.
    """
    arms = [BARE, *(arm for arm in arms if arm != BARE)]
    trainees: dict[str, list[Trainee]] = {arm: [] for arm in arms}
    peaks: dict[str, int] = {}
    with compiled_apart(config.compile in COMPILERS):
        for arm in arms:
            build = partial(Trainee, arm, config, network)
            first, peaks[arm] = peak_memory(config.device, build, Trainee.step)
            trainees[arm] = [first, *(build() for _ in range(copies - 1))]
        seconds = interleaved(
            {arm: [partial(one.seconds, steps) for one in of_arm] for arm, of_arm in trainees.items()},
            rounds,
            warmup,
            limit,
        )
    for arm in arms:
        if not all(one.loss.isfinite() for one in trainees[arm]):
            raise SystemExit(f"{config.label}: the loss of arm {arm} is not finite.")
        yield {
            "config": asdict(config),
            "arm": arm,
            "taps": trainees[arm][0].taps,
            "seconds": significant(torch.tensor(seconds[arm]).median().item()),
            **ratio(seconds[arm], seconds[BARE]),
            "peak_bytes": peaks[arm],
            "peak_ratio": significant(peaks[arm] / peaks[BARE]),
            "rounds": len(seconds[arm]),
            "steps": steps,
            "copies": copies,
            **about(config),
        }


@contextlib.contextmanager
def compiled_apart(compiled: bool) -> Iterator[None]:
    """The arms share their code. Without this, all would run what was compiled for the first, without its hooks."""
    if not compiled:
        yield
        return
    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=64):
        yield


def interleaved(
    arms: dict[str, list[Callable[[], float]]], rounds: int, warmup: int, limit: float
) -> dict[str, list[float]]:
    """What the copies of each arm returned, round by round: A B C, B C A, C A B, ..."""
    turns = {name: itertools.cycle(copies) for name, copies in arms.items()}
    found: dict[str, list[float]] = {name: [] for name in arms}
    start = time.monotonic()
    for done in range(-warmup, rounds):
        if done >= 5 and time.monotonic() - start > limit:
            break
        first = done % len(arms)
        for name in [*arms][first:] + [*arms][:first]:
            value = next(turns[name])()
            if done >= 0:
                found[name].append(value)
    return found


def ratio(seconds: list[float], reference: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios, and its 95 % interval (percentile bootstrap)."""
    ratios = torch.tensor(seconds, dtype=torch.float64) / torch.tensor(reference, dtype=torch.float64)
    draws = torch.randint(len(ratios), (2000, len(ratios)), generator=torch.Generator().manual_seed(0))
    medians = ratios[draws].quantile(0.5, dim=1)
    interval = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {
        "ratio": significant(ratios.quantile(0.5).item()),
        "interval": [significant(bound) for bound in interval.tolist()],
    }


def significant(value: float) -> float:
    return float(f"{value:.5g}")


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


# --- records ---------------------------------------------------------------------------------------------------------


def about(config: Config) -> dict[str, Any]:
    """Where, when and with what a record was made."""
    cpu = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, {config.threads} threads"
    return {
        "device": torch.cuda.get_device_name() if config.device == "cuda" else cpu,
        "versions": {"cmim_plugin": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit("benchmarks/*.py"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The newest record of each configuration and arm, in the order of their first."""
    newest: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        if "arm" in record:  # gpu.py notes more than measurements
            newest[json.dumps([record["config"], record["arm"]], sort_keys=True)] = record
    return list(newest.values())


def table(records: list[dict[str, Any]], value: str, device: str, arms: Sequence[str] = ()) -> str:
    """A Markdown table, a row a configuration and a column an arm.

    value: "step", the time of a step as a multiple of the bare network's, or "memory", the same for its peak memory
    """
    records = [r for r in records if r["config"]["device"] == device and (not arms or r["arm"] in (BARE, *arms))]
    if value == "memory":  # a replay allocates nothing
        records = [r for r in records if r["config"]["compile"] != RECORDED]
    if not records:
        return "No results yet."
    columns = [arm for arm in ARMS if arm != BARE and any(r["arm"] == arm for r in records)]
    unit = "ms a step" if value == "step" else "MiB"
    lines = [f"| network | bare, {unit} | " + " | ".join(f"`{arm}`" for arm in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for config, group in itertools.groupby(records, lambda r: Config(**r["config"])):
        row = {record["arm"]: record for record in group}
        if BARE not in row:
            continue
        bare = row[BARE]["seconds"] * 1e3 if value == "step" else row[BARE]["peak_bytes"] / 2**20
        cells = [config.label, f"{bare:.1f}"]
        for arm in columns:
            found = row.get(arm)
            if found is None:
                cells.append("")
            elif value == "memory":
                cells.append(f"{found['peak_ratio']:.3f}")
            else:
                cells.append("{:.3f} ({:.3f} to {:.3f})".format(found["ratio"], *found["interval"]))
        lines.append(f"| {' | '.join(cells)} |")
    last = records[-1]
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    note = f"{last['device']}, torch {last['versions']['torch']}, {last['date'][:10]}, commit {commits}."
    return "\n".join([*lines, "", note])


def described(record: dict[str, Any]) -> str:
    """One line to look at."""
    label = Config(**record["config"]).label
    low, high = record["interval"]
    step = f"step {record['ratio']:.3f} ({low:.3f} to {high:.3f}, {record['seconds'] * 1e3:.2f} ms)"
    return f"{label}: {record['arm']}: {step}, memory {record['peak_ratio']:.3f}"


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name for name in NETWORKS if name not in ("vit", "tiny")]
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=names)
    parser.add_argument("--batches", type=int, nargs="+", help="for all networks; else what suits each")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps", type=int, help="of an arm in a round; 1, on a GPU 10")
    parser.add_argument("--copies", type=int, default=2, help="of each arm's network, in turn")
    parser.add_argument("--seconds", type=float, default=180, help="a configuration, once it has five rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", choices=("", *COMPILERS, RECORDED), default="")
    parser.add_argument("--amp", choices=("", "bfloat16", "float16"), default="")
    parser.add_argument("--contiguous", action="store_true", help="not in channels_last")
    parser.add_argument("--results", type=Path, default=RESULTS / "overhead.jsonl")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    shared = (args.device, args.threads, args.compile, args.amp, not args.contiguous)
    for name in args.networks:
        for batch in args.batches or NETWORKS[name].batches:
            config = Config(name, batch, *shared)
            steps = args.steps or (10 if args.device == "cuda" else 1)
            for record in measure(
                config, args.arms, rounds=args.rounds, steps=steps, copies=args.copies, limit=args.seconds
            ):
                append(args.results, record)
                memory = f"memory {record['peak_ratio']:.3f}"
                print(
                    f"{config.label}: {record['arm']} {record['ratio']:.3f} {record['interval']}, {memory}", flush=True
                )


if __name__ == "__main__":
    main()
