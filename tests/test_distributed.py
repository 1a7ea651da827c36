"""Ranks that share a batch train what one process trains on the whole of it: the same losses, gradients and weights.

DistributedDataParallel and FSDP2 over gloo on the CPU, started by torchrun.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed import cases

WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]
SHARDED = [f"sharded {name}" for name in cases.SHARDED]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    """What each rank left of each case."""
    out = tmp_path_factory.mktemp("ranks")
    here = Path(cases.__file__)
    root = here.parent.parent.parent
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}", here, out],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(out / f"{request.param}-{rank}.pt", weights_only=True) for rank in range(request.param)]


def reference(name):
    name = {"attached before the group": "images"}.get(name, name.removeprefix("sharded "))
    return cases.train(name, *cases.attached(name))


def close(found, expected):
    return all(torch.allclose(f, e, rtol=0, atol=1e-9) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [*cases.CASES, *SHARDED, "attached before the group"])
def test_ranks_train_what_one_process_trains(ranks, name):
    expected = reference(name)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected["gradients"])
    for found in (rank[name] for rank in ranks):
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-9)
        assert found["bounds"] == pytest.approx(expected["bounds"], abs=1e-6)
        assert found["scheduled"] == expected["scheduled"]
        assert torch.equal(found["draws"], expected["draws"])
        for what in ("gradients", "weights"):
            assert close(found[what], expected[what]), what
        for key, value in expected["state"].items():  # of the heads, their moments, and the queue
            torch.testing.assert_close(found["state"][key], value, rtol=0, atol=1e-6, equal_nan=True, msg=key)


def test_network_and_plug_in_may_be_wrapped_together(ranks):
    expected = cases.train_wrapped_together()
    assert all(close(rank["wrapped together"], expected) for rank in ranks)


def test_the_published_variant_trains_what_one_process_trains(ranks):
    expected = cases.train_published()
    for rank in ranks:
        assert rank["published"] == pytest.approx(expected, rel=1e-9)


def test_ranks_that_trained_alone_agree_from_the_second_step_together(ranks):
    """The pass of the first one was captured before they heard of each other."""
    first, *others = (rank["trained before the group"] for rank in ranks)
    assert all(0 < loss < 100 for loss in first["losses"])
    for other in others:
        assert other["scheduled"][1:] == first["scheduled"][1:]
        assert other["losses"][1:] == first["losses"][1:]
        assert all(torch.equal(w, v) for w, v in zip(other["weights"], first["weights"], strict=True))


def test_a_state_that_some_ranks_did_not_load_is_refused_on_all_of_them(ranks):
    for rank in ranks:
        said = rank["loaded on the first"]
        assert "load cmim's state_dict on every rank" in said
        assert str([1] + [0] * (len(ranks) - 1)) in said


def test_two_backward_passes_are_refused_where_the_second_one_would_not_be_averaged(ranks):
    for rank in ranks:
        said = rank["two backward passes"]
        for order in ("synchronized", "the other way round"):
            assert "Add the losses: (loss + cmim(model)).backward()" in said[order], order
        assert said["within no_sync"] == ""


@pytest.mark.parametrize("name", ["other ways", "other ways, one tap a step"])
def test_a_tap_that_some_ranks_do_not_reach_counts_for_those_that_do(name, ranks):
    first, *others = (rank[name] for rank in ranks)
    assert first["taps"] == 2
    assert [loss == 0 for _, loss in first["losses"]] == [nobody for nobody, _ in first["losses"]]
    for other in others:
        assert other["taps"] == 2
        assert other["losses"] == first["losses"]
        assert torch.equal(other["heads"], first["heads"])
