"""Everything that has to be checked and measured on a GPU, in a few minutes and by one command.

    PYTHONPATH=. python benchmarks/gpu.py
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --quick    # to try it out

First the checks of tests/gpu_checks.py, then what a training step costs: the most important settings first, and none
that the time left would not suffice for. Each result is a JSON line in results/gpu.jsonl as soon as it is there.
Needs torch, torchvision and timm; neither pytest nor a network.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import gpu_checks  # noqa: E402
from overhead import BARE, RECORDED, RESULTS, Config, Trainee, about, append, described, measure  # noqa: E402

EAGER = ["position", "all_taps", "image", "naive_position"]
# Compiled and recorded, the default contrasts all taps. To compile an arm takes most of a minute.
COMPILED = ["all_taps"]
RECORD = ["all_taps", "image"]

# (network, batch, amp, compile, steps of an arm in a round, seconds that it takes)
SETTINGS = [
    ("bireal-resnet18", 256, "bfloat16", RECORDED, 10, 10),
    ("reactnet-a", 128, "bfloat16", RECORDED, 5, 12),
    ("vit", 128, "bfloat16", RECORDED, 5, 12),
    ("bireal-resnet20", 128, "", RECORDED, 10, 10),
    ("bireal-resnet18", 256, "bfloat16", "", 5, 15),
    ("bireal-resnet20", 128, "", "", 5, 15),
    ("reactnet-a", 128, "bfloat16", "", 2, 18),
    ("vit", 128, "bfloat16", "", 2, 18),
    ("irnet-resnet20", 128, "", "", 5, 15),
    ("bireal-resnet20", 512, "bfloat16", "default", 10, 70),
    ("bireal-resnet20", 512, "bfloat16", "", 5, 15),
    ("bireal-resnet18", 256, "", "", 3, 15),
    ("vit", 64, "", "", 2, 15),
    ("reactnet-a", 64, "", "", 2, 15),
    ("bireal-resnet18", 128, "bfloat16", "", 5, 15),
    ("bireal-resnet18", 256, "bfloat16", "default", 5, 70),
    ("bireal-resnet20", 512, "bfloat16", "reduce-overhead", 10, 70),
]
QUICK = [
    ("tiny", 4, "", "", 1, 1),
    ("tiny", 4, "", RECORDED, 1, 1),
    ("tiny", 4, "bfloat16", "", 1, 1),
    ("tiny", 4, "bfloat16", "aot_eager", 1, 1),
]


class Clock:
    """seconds: of all that is done."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def check(device: str, path: Path, config: Config) -> int:
    """Run all checks, one record each. Returns how many failed."""
    failed = 0
    for function in gpu_checks.EVERYWHERE + (gpu_checks.GPU_ONLY if device == "cuda" else []):
        start, error = time.monotonic(), None
        try:
            function(device)
        except Exception:
            error = traceback.format_exc(limit=-6)
            failed += 1
        seconds = round(time.monotonic() - start, 2)
        append(path, {"check": function.__name__, "error": error, "seconds": seconds, **about(config)})
        print(f"{'FAILED' if error else 'passed'} {function.__name__}, {seconds} s", flush=True)
        if error:
            print(error, flush=True)
    return failed


def launches(config: Config, arm: str) -> int:
    """Kernels that the host launches in a step."""
    trainee = Trainee(arm, config)
    for _ in range(3):
        trainee.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        trainee.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if "LaunchKernel" in event.key)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=220, help="for everything")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.jsonl")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --quick tries everything out on the CPU")
    clock = Clock(args.seconds)
    base = Config("tiny", 4, args.device, torch.get_num_threads())
    failed = 0 if args.no_checks else check(args.device, args.results, base)

    if args.device == "cuda":
        for name in ("bireal-resnet20", "irnet-resnet20"):
            counts = {arm: launches(replace(base, network=name, batch=128), arm) for arm in (BARE, "position")}
            append(args.results, {"launches": counts, "network": name, **about(base)})
            print(f"{name}: kernels launched a step: {counts}", flush=True)

    for network, batch, amp, compiler, steps, needs in QUICK if args.quick else SETTINGS:
        config = replace(base, network=network, batch=batch, amp=amp, compile=compiler)
        if clock.left < needs:
            print(f"{config.label}: left out, {clock.left:.0f} s are left", flush=True)
            continue
        rounds: dict[str, Any] = {"rounds": 2, "warmup": 1} if args.quick else {"rounds": 30, "limit": 7}
        try:
            arms = RECORD if compiler == RECORDED else COMPILED if compiler else EAGER
            for record in measure(config, arms, steps=steps, **rounds):
                append(args.results, record)
                print(described(record), flush=True)
        except Exception:  # the next setting may still be measured
            failed += 1
            append(args.results, {"failed": config.label, "error": traceback.format_exc(limit=-6), **about(config)})
            print(f"FAILED {config.label}\n{traceback.format_exc(limit=-6)}", flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
