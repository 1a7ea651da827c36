"""The benchmark's own machinery: its queue, its budget, its pairing, its intervals and its tables."""

import json
import math

import pytest
import torch

import accuracy
import tables
from accuracy import Run
from cmim_plugin import info_nce
from training import paired_difference


def test_interval_is_the_textbook_one() -> None:
    none, arm = [40.0, 41.0, 42.0, 43.0, 44.0], [41.0, 41.5, 44.0, 43.5, 46.0]  # differences 1, .5, 2, .5, 2
    variance = sum((d - 1.2) ** 2 for d in (1, 0.5, 2, 0.5, 2)) / 4
    mean, half = paired_difference(none, arm)
    assert mean == pytest.approx(1.2)
    assert half == pytest.approx(2.776445 * math.sqrt(variance / 5), rel=1e-5)  # t, 4 degrees of freedom, 97.5 %


def test_queue_finishes_all_arms_of_a_seed_first_and_trains_teachers_before_their_arms() -> None:
    queue = accuracy.make_queue(["irnet", "bireal"], ["none", "distill"], [0, 1])
    assert [run.seed for run in queue] == [0] * 6 + [1] * 6
    assert [run.arm for run in queue[:3]] == ["full_precision", "none", "distill"]
    assert accuracy.make_queue(["irnet"], ["none", "image"], [3]) == [Run("irnet", "none", 3), Run("irnet", "image", 3)]


def test_plan_keeps_what_fits_and_names_the_rest() -> None:
    queue = [Run("irnet", arm, seed) for seed in (1, 2) for arm in ("none", "image", "position")]
    seconds = {Run("irnet", "none", 0): 10.0, Run("irnet", "image", 0): 20.0}  # position: as the slowest, 20
    assert accuracy.plan(queue, seconds, left=50, jobs=1) == (queue[:3], queue[3:])
    assert accuracy.plan(queue, seconds, left=50, jobs=2) == (queue, [])
    assert accuracy.plan(queue, {}, left=1, jobs=1) == (queue, [])  # nothing is measured yet


def test_arm_variants() -> None:
    changed = {**accuracy.ARMS["position"], "weight": 1, "layer_decay": 0.5}
    assert accuracy.arm_options("position+weight=1,layer_decay=0.5") == changed
    with pytest.raises(SystemExit, match="no arm nonsense"):
        accuracy.arm_options("nonsense+weight=1")


def test_shuffled_pairs_cost_more_than_right_ones() -> None:
    z = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    assert accuracy.shuffled(z, z, temperature=0.1) > info_nce(z, z) + 1


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory):
    """The arguments of a run of seconds, which ran once."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["digits", "--train-size", "100", "--epochs", "2", "--seeds", "0", "--methods", "bireal"]
    arguments += ["--arms", "none", "position", "position_shuffled", "distill_teacher", "position+weight=1e-30"]
    arguments += ["--results", str(folder), "--cache", str(folder / "teachers")]
    accuracy.main(arguments)
    return arguments, folder / "digits.jsonl"


def test_every_run_leaves_a_record(smoke) -> None:
    _, path = smoke
    done = accuracy.read_results(path)
    arms = ["full_precision", "none", "position", "position_shuffled", "distill_teacher"]
    assert [run.arm for run in done] == [*arms, "position+weight=1e-30"]
    record = done[Run("bireal", "position", 0)]
    assert len(record["curves"]["bounds"]) == 6 and len(record["curves"]["train_loss"]) == 2
    assert record["commit"] and record["versions"]["torch"] == torch.__version__
    assert not done[Run("bireal", "position_shuffled", 0)]["curves"]["bounds"]
    assert list(done[Run("bireal", "distill_teacher", 0)]["curves"]["bounds"]) == ["layer3.1.binary"]


def test_arms_are_paired(smoke) -> None:
    """CMIM of no weight changes nothing: initial weights, batches and augmentation are those of `none`."""
    done = accuracy.read_results(smoke[1])
    none, weightless = (done[Run("bireal", arm, 0)] for arm in ("none", "position+weight=1e-30"))
    assert weightless["curves"]["train_loss"] == none["curves"]["train_loss"]
    assert weightless["accuracy"] == none["accuracy"]


def test_resuming_does_only_what_is_missing_and_repeats_exactly(smoke) -> None:
    arguments, path = smoke
    before = path.read_text()
    accuracy.main(arguments)
    assert path.read_text() == before
    lines = [line for line in before.splitlines() if json.loads(line)["arm"] != "position"]
    path.write_text("\n".join(lines) + "\n")
    accuracy.main(arguments)
    old = json.loads(before.splitlines()[2])
    new = accuracy.read_results(path)[Run("bireal", "position", 0)]
    assert new["arm"] == old["arm"] and new["curves"] == old["curves"]


def test_another_configuration_is_refused(smoke) -> None:
    arguments, _ = smoke
    with pytest.raises(SystemExit, match="Choose another --name"):
        accuracy.main([*arguments, "--epochs", "3"])


def test_validation_tests_on_training_images_that_are_not_trained_on() -> None:
    options = ["digits", "--train-size", "100", "--held-out", "50"]
    test = accuracy.load(accuracy.parse(options).config, None)
    val = accuracy.load(accuracy.parse([*options, "--split", "val"]).config, None)
    assert torch.equal(val.x_train, test.x_train) and len(val.x_test) == 50
    everything = accuracy.load(accuracy.parse(["digits"]).config, None).x_train
    assert all((everything == image).flatten(1).all(1).any() for image in val.x_test)


def test_dense_results_get_their_own_table(tmp_path) -> None:
    config = {"data": "camvid", "task": "segmentation", "split": "test", "size": [4, 6], "width": 8, "epochs": 2}
    about = {"config": config | {"batch_size": 1}, "date": "2020-01-01T00:00:00", "device": "cpu", "commit": "abc"}
    runs = [{"method": "irnet", "arm": arm, "seed": 0} for arm in ("none", "image", "position")]
    metrics = {"miou": 0.25, "pixel_accuracy": 0.75}
    (tmp_path / "roads.jsonl").write_text(
        "".join(json.dumps(run | about | {"metrics": metrics}) + "\n" for run in runs)
    )
    filled = tables.fill("<!-- dense: roads none image -->\n<!-- end -->\n", tmp_path)
    assert "| irnet | `image` | 1 | 25.00 | +0.00 (one seed) | 75.00 | +0.00 (one seed) |" in filled
    assert "position" not in filled and "camvid, images of 4 x 6 pixels" in filled and "2 runs, 2020-01-01" in filled
    filled = tables.fill("<!-- dense: roads image -->\n<!-- end -->\n", tmp_path)
    assert "| irnet | `image` | 1 | 25.00 | +0.00 (one seed)" in filled and "| `none` |" not in filled
    assert "No results yet" in tables.fill("<!-- dense: roads paper -->\n<!-- end -->\n", tmp_path)


def test_table_from_two_results_files(tmp_path) -> None:
    def record(arm: str, seed: int, value: float) -> dict:
        common = {"method": "bireal", "train_accuracy": 60.0, "best_epoch_accuracy": value + 1}
        config = accuracy.parse(["overfit"]).config
        about = {"date": "2020-01-01T00:00:00", "device": "cpu", "commit": "abc"}
        return {**common, **about, "arm": arm, "seed": seed, "accuracy": value, "config": vars(config)}

    gains = [record("none", s, 40.0) for s in range(3)] + [record("image", s, 41.0 + 0.1 * s) for s in range(4)]
    mixed = [record("none", s, 40.0 + s) for s in range(3)] + [record("image", s, 41.0) for s in range(3)]
    for name, records in {"gains": gains, "mixed": mixed}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = "a\n<!-- table: gains image -->\nstale\n<!-- end -->\nb\n<!-- table: mixed -->\n<!-- end -->\nc\n"
    filled = tables.fill(text, tmp_path)
    assert "stale" not in filled and filled.startswith("a\n") and filled.endswith("\nc\n")
    # Seed 3 has no partner: differences 1.0, 1.1, 1.2; 4.302653 is t for 2 degrees of freedom.
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert f"**+1.10 ({1.1 - half:+.2f} to {1.1 + half:+.2f})**" in filled
    assert "| +0.00 (-2.48 to +2.48) |" in filled
    assert "`none`" not in filled.partition("\nb\n")[0].split("|---|", 1)[1] and "2020-01-01, cpu, commit abc" in filled
    assert tables.fill(filled, tmp_path) == filled
