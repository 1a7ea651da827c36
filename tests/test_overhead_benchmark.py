"""The cost benchmark's own machinery: naive implementation, statistics, counts of memory and kernels, tiny runs."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

import gpu
import kernel_count
import overhead
from cmim_plugin import CMIM
from naive import Naive
from nets import METHODS, resnet


@pytest.mark.parametrize("method, instances", [("irnet", "position"), ("bireal", "image")])
def test_naive_loss_and_its_gradients_are_those_of_cmim_with_the_same_heads(method, instances):
    """All 6 x 64 positions at most, so that both draw all of them."""
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    settings = {"instances": instances, "num_positions": 384, "embed_dim": 16, "temperature": 0.2, "weight": 0.7}
    own, other = (resnet(METHODS[method].recipe, 10, stages=2, units=2, width=4).double() for _ in range(2))
    other.load_state_dict(own.state_dict())
    cmim, naive = CMIM(own, x, **settings).double(), Naive(other, x, **settings).double()
    with torch.no_grad():
        for k, heads in enumerate(naive.heads):
            for head, weight in zip((heads["binary"], heads["latent"]), cmim.heads.weights_of(k), strict=True):
                head.weight.copy_(weight.T)
    losses = []
    for model, extra in ((own, cmim), (other, naive)):
        model(x)
        losses.append(extra(model))
        losses[-1].backward()
    assert_close(*losses, rtol=1e-9, atol=1e-12)
    for mine, naives in zip(own.parameters(), other.parameters(), strict=True):
        assert_close(mine.grad, naives.grad, rtol=1e-9, atol=1e-12)
    for k, heads in enumerate(naive.heads):
        for head, grad in zip(
            (heads["binary"], heads["latent"]), cmim.heads.weights_of(k, cmim.heads.weights.grad), strict=True
        ):
            assert_close(head.weight.grad, grad.T, rtol=1e-9, atol=1e-12)


def test_the_ratio_is_paired_and_its_interval_is_that_of_the_median():
    generator = torch.Generator().manual_seed(1)
    n = 21
    reference, seconds = (torch.rand(2, n, generator=generator, dtype=torch.float64) + 1).tolist()
    found = overhead.ratio(seconds, reference)
    ratios = sorted(s / r for s, r in zip(seconds, reference, strict=True))
    assert found["ratio"] == pytest.approx(ratios[10], rel=1e-4)
    # The median of a resample is at most ratios[k - 1] when at least 11 of its 21 draws are: its exact distribution.
    chances = []
    for k in range(1, n + 1):
        chances.append(sum(math.comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in range(11, n + 1)))
    low = next(r for r, chance in zip(ratios, chances, strict=True) if chance > 0.025)
    high = next(r for r, chance in zip(ratios, chances, strict=True) if chance >= 0.975)
    assert found["interval"] == pytest.approx([low, high], rel=1e-4)


def test_rounds_call_each_arm_once_in_turn_and_leave_the_warmup_out():
    calls = []
    arms = {name: [lambda name=name: calls.append(name) or float(len(calls))] for name in "abc"}
    found = overhead.interleaved(arms, rounds=8, warmup=2, limit=math.inf)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 10 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {tuple(names) for names in rounds} == {("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")}
    for name in "abc":
        assert found[name] == [1 + i for i, called in enumerate(calls) if called == name][2:]


def test_the_copies_of_an_arm_take_turns():
    found = overhead.interleaved({"a": [lambda: 1.0, lambda: 2.0]}, rounds=4, warmup=0, limit=math.inf)
    assert found == {"a": [1, 2, 1, 2]}


def test_rounds_end_early_past_the_limit_once_there_are_five():
    assert len(overhead.interleaved({"a": [lambda: 0.0]}, rounds=50, warmup=1, limit=0)["a"]) == 5


def test_peak_memory_counts_what_is_alive_at_once():
    older = torch.empty(1 << 20)

    def build():
        torch.empty(1 << 22)  # gone before the run
        return [older, torch.empty(1 << 18)]  # bytes: 4 each

    def run(kept):
        for _ in range(3):
            temporary = torch.empty(1 << 19)
            del temporary
        kept.append(torch.empty(1 << 17))
        kept.clear()

    kept, peak = overhead.peak_memory("cpu", build, run)
    assert not kept
    assert peak == 4 * ((1 << 18) + (1 << 19))


def test_peak_memory_of_a_peak_that_comes_last():
    _, peak = overhead.peak_memory("cpu", lambda: torch.empty(1 << 18), lambda kept: torch.empty(1 << 18) + kept)
    assert peak == 4 * 3 * (1 << 18)


def test_kernels_are_counted_by_stage_without_views_and_allocations():
    model = torch.nn.Linear(3, 3, bias=False)
    counts = kernel_count.step_kernels(model, None, torch.randn(2, 3))
    assert counts["forward", "mm"] == 1 and counts["backward", "mm"] == 1
    assert not {name for _, name in counts} & {"t", "detach", "view", "empty", "new_empty"}
    assert {stage for stage, _ in counts} == {"forward", "loss", "backward", "optimizer"}


def test_rms_norm_counts_as_one_kernel_each_way_and_is_torchs():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    unit = torch.full((4,), 0.5, dtype=torch.float64)
    wanted = torch.nn.functional.rms_norm(x, (4,), unit, eps=0.01)
    with kernel_count.OneRMSNorm(), kernel_count.Kernels() as kernels:
        found = torch.nn.functional.rms_norm(x, (4,), unit, eps=0.01)
        (own,) = torch.autograd.grad(found, x, torch.arange(12.0, dtype=torch.float64).view(3, 4))
    assert [counts for (_, name), counts in kernels.counts.items() if "rms_norm" in name] == [1, 1]
    assert_close((found, own), (wanted, *torch.autograd.grad(wanted, x, torch.arange(12.0).double().view(3, 4))))


def test_a_step_with_cmim_launches_few_more_kernels():
    _, added = kernel_count.added_kernels("bireal", "resnet20")
    assert added.total() <= 110, "\n".join(map(str, sorted(added.items())))


@pytest.mark.slow
def test_a_tiny_run_writes_a_record_of_each_arm_and_tables_show_the_newest(tmp_path, capsys):
    path = tmp_path / "overhead.jsonl"
    arguments = ["--networks", "tiny", "--rounds", "2", "--copies", "1", "--device", "cpu", "--results", str(path)]
    overhead.main(arguments)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["arm"]: record["taps"] for record in records} == {**dict.fromkeys(overhead.ARMS, 6), "none": 0}
    for record in records:
        assert record["seconds"] > 0 and record["peak_bytes"] > 0 and record["rounds"] == 2
        assert record["commit"] and record["versions"]["torch"] == torch.__version__
    assert records[0]["ratio"] == 1 and records[0]["interval"] == [1, 1]
    overhead.main([*arguments, "--amp", "bfloat16", "--arms", "image"])
    overhead.main([*arguments, "--arms", "position"])
    assert capsys.readouterr().out.count("tiny, batch 4") == 6 + 2 + 2
    newest = overhead.read_results(path)
    assert len(newest) == 6 + 2
    table = overhead.table(newest, "step", "cpu").splitlines()
    assert table[0].startswith("| network | bare, ms a step | `position` |") and len(table) == 2 + 2 + 2
    assert "tiny, batch 4, bfloat16" in table[3] and table[-1].startswith(records[0]["device"])
    assert "`image`" not in overhead.table(newest, "memory", "cpu", ["position"])
    assert overhead.table(newest, "step", "cuda") == "No results yet."


@pytest.mark.slow
def test_the_gpu_benchmark_measures_within_its_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "QUICK", gpu.QUICK[:1])
    path = tmp_path / "gpu.jsonl"
    arguments = ["--device", "cpu", "--quick", "--no-checks", "--results", str(path)]
    assert gpu.main([*arguments, "--seconds", "0"]) == 0
    assert "left out" in capsys.readouterr().out and not path.exists()
    assert gpu.main([*arguments, "--seconds", "1000"]) == 0
    assert [r["arm"] for r in overhead.read_results(path)] == ["none", *gpu.EAGER]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_as_a_whole_on_the_cpu(tmp_path):
    path = tmp_path / "gpu.jsonl"
    assert gpu.main(["--device", "cpu", "--quick", "--seconds", "1000", "--results", str(path)]) == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("check" in record for record in records) == len(gpu.gpu_checks.EVERYWHERE)
    assert {r["config"]["compile"] for r in records if "config" in r} == {"", overhead.RECORDED, "aot_eager"}
