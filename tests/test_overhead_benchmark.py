"""The cost benchmark's own machinery: the naive implementation, its statistics, its memory count, a tiny run."""

import inspect
import json
import math
from functools import partial

import numpy as np
import overhead_report
import pytest
import torch
from torch.testing import assert_close

import overhead
import tables
from cmim_plugin import CMIM, info_nce
from naive import Naive, naive_info_nce
from nets import BIREAL, IRNET, resnet
from overhead import Network

RECIPES = {"irnet": IRNET, "bireal": BIREAL}
tiny = partial(resnet, stages=2, units=2, width=4)


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overhead.NETWORKS, "tiny", Network(partial(overhead.cifar, tiny, BIREAL), 8, 10, (4,)))


# --- the naive implementation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("instances", ["image", "position"])
@pytest.mark.parametrize("method", RECIPES)
def test_naive_loss_and_its_gradients_are_those_of_cmim_with_the_same_heads(method: str, instances: str) -> None:
    """All 6 x 64 positions at most, so that both draw all of them."""
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    settings = {"instances": instances, "num_positions": 384, "embed_dim": 16, "temperature": 0.2, "weight": 0.7}
    losses, gradients = [], []
    own = tiny(RECIPES[method], 10).double()
    cmim = CMIM(own, x, **settings).double()
    other = tiny(RECIPES[method], 10).double()
    other.load_state_dict(own.state_dict())
    naive = Naive(other, x, **settings).double()
    with torch.no_grad():
        for k, heads in enumerate(naive.heads):
            for head, (weight, bias) in zip((heads["binary"], heads["latent"]), cmim.heads.of(k), strict=True):
                head.weight.copy_(weight)
                head.bias.copy_(bias)
    for model, extra in ((own, cmim), (other, naive)):
        model(x)
        losses.append(extra(model))
        losses[-1].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    of_heads = [p.grad for p in cmim.parameters()]
    gradients[0] += [part for k in range(len(naive.heads)) for head in cmim.heads.of(k, of_heads) for part in head]
    gradients[1] += [p.grad for p in naive.heads.parameters()]
    assert_close(*losses, rtol=1e-9, atol=1e-12)
    assert len(gradients[0]) == len(gradients[1]) > 20
    for mine, naives in zip(*gradients, strict=True):
        assert_close(mine, naives, rtol=1e-9, atol=1e-12)


def test_naive_has_the_defaults_of_cmim() -> None:
    naive, own = (inspect.signature(kind).parameters for kind in (Naive, CMIM))
    defaults = {name: p.default for name, p in naive.items() if p.default is not p.empty}
    assert defaults == {name: own[name].default for name in ("num_positions", "embed_dim", "temperature", "weight")}


def test_naive_positions_are_drawn_anew_in_each_step() -> None:
    model = tiny(BIREAL, 10)
    x = torch.randn(4, 3, 8, 8)
    naive = Naive(model, x, "position", num_positions=20)
    losses = set()
    for _ in range(3):
        model(x)
        losses.add(naive(model).item())
    assert len(losses) == 3


def test_naive_critic_with_queues_is_info_nce() -> None:
    z_b, z_f = torch.randn(2, 7, 5, dtype=torch.float64)
    queues = {"queue_b": torch.randn(9, 5).double(), "queue_f": torch.randn(9, 5).double()}
    assert_close(naive_info_nce(z_b, z_f), info_nce(z_b, z_f), rtol=1e-9, atol=0)
    assert_close(naive_info_nce(z_b, z_f, **queues), info_nce(z_b, z_f, **queues), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["binary_vit", "reactnet_imagenet"])
def test_every_binarization_of_the_large_networks_is_a_tap_and_has_its_teacher(kind: str) -> None:
    build = getattr(overhead, kind)
    size = 224 if kind == "binary_vit" else 64
    model, teacher = build(True), build(False).eval()
    x = torch.randn(2, 3, size, size)
    cmim = CMIM(model, x, instances="image", teacher=teacher)
    assert len(cmim.taps) == len(Naive(model, x, "image").heads) == {"binary_vit": 48, "reactnet_imagenet": 16}[kind]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_ratio_is_paired_and_its_spread_is_that_of_plain_loops() -> None:
    generator = np.random.default_rng(1)
    n = 21
    reference, seconds = generator.uniform(1, 2, (2, n))
    found = overhead.ratio(seconds, reference)
    ratios = sorted(s / r for s, r in zip(seconds, reference, strict=True))
    assert found["median"] == pytest.approx(ratios[10], rel=1e-5)
    assert found["quartiles"] == pytest.approx([ratios[5], ratios[15]], rel=1e-5)
    # The median of a resample is at most ratios[k - 1] when at least 11 of its 21 draws are: its exact distribution.
    chances = []
    for k in range(1, n + 1):
        draws = range(11, n + 1)
        chances.append(sum(math.comb(n, j) * (k / n) ** j * (1 - k / n) ** (n - j) for j in draws))
    low = next(r for r, chance in zip(ratios, chances, strict=True) if chance > 0.025)
    high = next(r for r, chance in zip(ratios, chances, strict=True) if chance >= 0.975)
    assert found["interval"] == pytest.approx([low, high], rel=1e-5)


def test_one_round_has_no_interval() -> None:
    found = overhead.ratio(np.array([3.0]), np.array([2.0]))
    assert found == {"median": 1.5, "quartiles": [1.5, 1.5], "interval": [None, None]}


def test_rounds_call_every_arm_once_in_changing_order_and_leave_the_warmup_out() -> None:
    calls = []
    arms = {name: (lambda name=name: calls.append(name) or [float(len(calls))]) for name in "abc"}
    values = overhead.interleaved(arms, rounds=8, warmup=2, limit=math.inf, label="")
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 10 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    for name in "abc":
        assert values[name][:, 0].tolist() == [1 + i for i, called in enumerate(calls) if called == name][2:]


def test_rounds_end_early_past_the_limit_once_there_are_five() -> None:
    assert len(overhead.interleaved({"a": lambda: [0.0]}, rounds=50, warmup=1, limit=0, label="")["a"]) == 5


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    older = torch.empty(1 << 20)

    def build() -> list[torch.Tensor]:
        torch.empty(1 << 22)  # gone before the run
        return [older, torch.empty(1 << 18)]  # bytes: 4 each

    def run(kept: list[torch.Tensor]) -> None:
        for _ in range(3):
            temporary = torch.empty(1 << 19)
            del temporary
        kept.append(torch.empty(1 << 17))
        kept.clear()

    kept, peak = overhead.peak_memory("cpu", build, run)
    assert not kept
    assert peak == 4 * ((1 << 18) + (1 << 19))


def test_peak_memory_of_a_peak_that_comes_last() -> None:
    _, peak = overhead.peak_memory("cpu", lambda: torch.empty(1 << 18), lambda kept: torch.empty(1 << 18) + kept)
    assert peak == 4 * 3 * (1 << 18)


# --- a tiny run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("results") / "overhead.json"


@pytest.fixture
def arguments(results, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(overhead, "FLAT", "tiny")
    monkeypatch.setattr(overhead, "FLAT_ARMS", ["none", "position:1", "image:3"])
    setting = (
        "--networks tiny --batches 4 --critic-batches 8 --queues 0 32 --rounds 3 --warmup 1 --device cpu --threads 1"
    )
    return [*setting.split(), "--results", str(results)]


def test_a_tiny_run_measures_every_suite_and_resumes(arguments: list[str], results) -> None:
    overhead.main(arguments)
    records = {(case.suite, case.batch, case.queue): r for case, r in overhead.read_results(results).items()}
    assert list(records) == [("step", 4, 0), ("taps", 4, 0), ("critic", 8, 0), ("critic", 8, 32)]
    step = records["step", 4, 0]
    assert list(step["arms"]) == list(overhead.ARMS) and step["versions"]["torch"] == torch.__version__
    assert {arm: m["taps"] for arm, m in step["arms"].items()} == {
        "none": 0,
        "position": 4,
        "position_all": 4,
        "image": 4,
        "teacher_pass": 0,
        "teacher": 4,
        "naive_position": 4,
        "naive_image": 4,
    }
    assert [m["taps"] for m in records["taps", 4, 0]["arms"].values()] == [0, 1, 3]
    for record in records.values():
        assert record["rounds"] == 3 and record["commit"] and record["device"]
        assert all(m["seconds"] > 0 and m["peak_bytes"] > 0 for m in record["arms"].values())
    none = step["arms"]["none"]
    assert none["ratio"]["interval"] == [1, 1] and none["peak_ratio"] == 1
    assert none["seconds"] == pytest.approx(np.median(none["step_seconds"]))
    assert set(none["extra_seconds"].values()) == {0.0}
    assert step["arms"]["naive_image"]["peak_ratio"] > 1

    before = results.read_text()
    overhead.main(arguments)
    assert results.read_text() == before
    overhead.main(["step", *arguments, "--again", "--arms", "none", "image", "position:2"])
    again = next(iter(overhead.read_results(results).values()))
    assert list(again["arms"]) == ["none", "image", "position:2"] and again["arms"]["position:2"]["taps"] == 2
    assert results.read_text().splitlines()[2:] == before.splitlines()[2:]


def test_another_setting_is_a_case_of_its_own(arguments: list[str], tmp_path) -> None:
    path = tmp_path / "overhead.json"
    arguments = ["step", *arguments, "--rounds", "1", "--results", str(path), "--arms", "position", "naive_position"]
    overhead.main([*arguments, "--amp", "bfloat16"])
    overhead.main([*arguments, "--contiguous", "--steps", "2"])
    cases = overhead.read_results(path)
    assert [(case.amp, case.contiguous, r["steps"]) for case, r in cases.items()] == [
        ("bfloat16", False, 1),
        ("", True, 2),
    ]
    assert all(r["arms"]["position"]["ratio"]["median"] > 0 for r in cases.values())


def test_unknown_names_and_what_cannot_be_compiled_are_refused(arguments: list[str], tmp_path) -> None:
    with pytest.raises(SystemExit, match="no arm nonsense"):
        overhead.main(["step", *arguments, "--arms", "nonsense", "--results", str(tmp_path / "none.json")])
    for wrong in (["nonsense"], ["--compile", "--arms", "teacher"]):
        with pytest.raises(SystemExit):
            overhead.parse(wrong)
    assert "teacher" in overhead.parse([]).arms and "teacher" not in overhead.parse(["--compile"]).arms


def example_records() -> list[dict]:
    def arm(seconds: float, taps: int = 0) -> dict:
        middle = seconds / 0.1
        ratio = {"median": middle, "quartiles": [middle] * 2, "interval": [middle - 0.01, middle + 0.01]}
        extra = {**dict.fromkeys(overhead.PHASES, 0.001), "step": seconds - 0.1}
        about = {"peak_bytes": 3 << 20, "peak_ratio": 1.02, "taps": taps}
        return {"seconds": seconds, "ratio": ratio, "extra_seconds": extra, **about}

    def record(suite: str, arms: dict, batch: int = 64, device: str = "cpu", **about) -> dict:
        case = overhead.Case(suite, "net", batch, 0, device, 2, False, "bfloat16", False)
        common = {"rounds": 9, "device": device.upper(), "versions": {"torch": "9.9"}, "commit": "abc"}
        return {"case": vars(case), "arms": arms, "date": "2020-01-01T00:00:00", **common, **about}

    attach = {"attach": {"seconds": 0.5, "forward_seconds": 0.1}}
    line = {"none": arm(0.1), **{f"image:{taps}": arm(0.101 + 0.002 * taps, taps) for taps in (1, 2, 4)}}
    return [
        record("step", {"none": arm(0.1), "position": arm(0.104), "image": arm(0.11)}, **attach),
        record("step", {"none": arm(0.1), "image": arm(0.12)}, batch=128, **attach),
        record("step", {"none": arm(0.1), "position": arm(0.5)}, device="cuda", **attach),
        record("taps", line),
        record("critic", {"naive": arm(0.1), "info_nce": arm(0.05)}),
    ]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("step", "| net, bfloat16 | 64 | 100.0 | 1.040 (1.030 to 1.050) | 1.100 (1.090 to 1.110) |"),
        ("step", "| net, bfloat16 | 128 | 100.0 |  | 1.200 (1.190 to 1.210) |"),
        ("memory", "| net, bfloat16 | 64 | 3.0 | 1.020 | 1.020 |"),
        ("split", "| net, bfloat16 | 64 | `image` | +1.0 % | +1.0 % | +1.0 % | +1.0 % | +10.0 % |"),
        ("attach", "| net, bfloat16 | 64 | 0.100 | 0.500 | +0.300 |"),
        ("taps", "| net, bfloat16 | 64 | `image` | 1, 2, 4 | 3.00, 5.00, 9.00 | 1.00 + 2.000 a tap (R² = 1.000) |"),
        ("critic", "| 64 | 0 | 100.00 | 50.00 | 0.500 (0.490 to 0.510) | 3.0 | 3.0 |"),
    ],
)
def test_tables_in_a_document(kind: str, line: str, tmp_path) -> None:
    (tmp_path / "overhead.json").write_text(json.dumps(example_records()))
    text = f"a\n<!-- overhead: {kind} cpu -->\nstale\n<!-- end -->\nb\n"
    filled = tables.fill(text, tmp_path)
    assert line in filled.splitlines() and "stale" not in filled and "CUDA" not in filled
    assert "9 rounds, CPU, torch 9.9, 2020-01-01, commit abc." in filled
    assert tables.fill(filled, tmp_path) == filled


def test_table_of_chosen_arms_and_of_a_device_without_results(tmp_path) -> None:
    (tmp_path / "overhead.json").write_text(json.dumps(example_records()[:2]))
    chosen = tables.fill("<!-- overhead: step cpu image -->\n<!-- end -->\n", tmp_path)
    assert "`image`" in chosen and "`position`" not in chosen
    assert "No results yet." in tables.fill("<!-- overhead: step cuda -->\n<!-- end -->\n", tmp_path)


def test_plot_shows_each_network_the_taps_and_the_critic(tmp_path) -> None:
    overhead_report.plot(example_records(), "cpu", tmp_path / "overhead-cpu.png")
    assert (tmp_path / "overhead-cpu.png").read_bytes().startswith(b"\x89PNG")
