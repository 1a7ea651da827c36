"""The benchmark's own machinery: data, networks, loop, queue, records, tables and picture."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import accuracy
import auxiliaries
import data
import inside
import loop
import nets
import overhead
import tables
import why
from accuracy import Run

# --- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images() -> data.Data:
    y = torch.arange(12) % 3
    x = torch.randint(200, (12, 6, 5, 3), dtype=torch.uint8) + 50 * F.one_hot(y, 3).byte()[:, None, None]
    return data.Data(x, y, x[:6], y[:6], shift=2, flip=True)


def test_an_augmented_image_is_a_shifted_and_perhaps_mirrored_window_of_the_padded_one(images) -> None:
    index = torch.tensor([3, 3, 7, 0, 3, 11])
    found = images.augmented(index, torch.Generator().manual_seed(0))
    seen = set()
    for image, i in zip(found, index, strict=True):
        padded = F.pad(images.x_train[i].permute(2, 0, 1), [2] * 4).permute(1, 2, 0)
        windows = {
            (top, left, mirror): padded[top : top + 6, left : left + 5].flip(1)
            if mirror
            else padded[top : top + 6, left : left + 5]
            for top in range(5)
            for left in range(5)
            for mirror in (False, True)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, image)]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 3  # each image draws its own


def test_normalised_training_images_have_mean_0_and_deviation_1(images) -> None:
    x = images.normalise(images.x_train)
    assert x.shape == (12, 3, 6, 5) and x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_validation_tests_on_training_images_that_are_not_trained_on() -> None:
    options = ["digits", "--train-size", "100", "--held-out", "50"]
    test = accuracy.load(accuracy.parse(options).config, None)
    val = accuracy.load(accuracy.parse([*options, "--split", "val"]).config, None)
    assert torch.equal(val.x_train, test.x_train) and len(val.x_test) == 50
    everything = accuracy.load(accuracy.parse(["digits"]).config, None).x_train
    assert all((everything == image).flatten(1).all(1).any() for image in val.x_test)
    assert not any((val.x_train == image).flatten(1).all(1).any() for image in val.x_test)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["irnet", "bireal"])
def test_a_step_and_all_its_annealing_compile_once(method) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    how = nets.METHODS[method]
    model = nets.resnet(how.recipe, 4, stages=1, units=1, width=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 8, 8)
    for epoch in range(3):
        if how.on_epoch:
            how.on_epoch(model, epoch, 3)
        gradients = []
        for forward in (model, compiled):
            torch.manual_seed(0)
            gradients.append(torch.autograd.grad(forward(x).square().sum(), list(model.parameters())))
        torch.testing.assert_close(*gradients)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_estimator_of_ir_net_has_the_slope_of_k_tanh_tx() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    t, k = torch.tensor(2.0), torch.tensor(1.5)
    (found,) = torch.autograd.grad(nets.DecayingSign.apply(x, t, k).sum(), x)
    (expected,) = torch.autograd.grad((1.5 * torch.tanh(2 * x)).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", nets.METHODS)
def test_real_weights_give_what_the_binary_activations_times_them_give(method) -> None:
    model = nets.resnet(nets.METHODS[method].recipe, 4, stages=1, units=1, width=4)
    x = torch.randn(2, 4, 8, 8)
    conv, unit = model.layer1[0].conv, model.layer1[0]
    nets.binarize_weights(model, False)
    expected = F.conv2d(nets.sign(x), conv.weight, padding=1)
    torch.testing.assert_close(conv(unit.binary(x)), expected)
    nets.binarize_weights(model, True)
    assert not torch.allclose(conv(unit.binary(x)), expected)


# --- what is measured inside, and the controls -----------------------------------------------------------------------


def test_statistics_of_a_code() -> None:
    code = torch.ones(4, 3, 1, 2)
    code[:2, 1] = -1  # half of the time
    code[:2, 2] = -1  # the same bit again
    found = inside.code_statistics(code)
    assert found["dead"] == pytest.approx(1 / 3)
    assert found["entropy"] == pytest.approx(2 / 3)
    assert found["correlation"] == pytest.approx(1)


def test_redundancy_is_zero_for_balanced_independent_bits_and_falls_by_its_gradient() -> None:
    independent = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    assert auxiliaries.code_redundancy(independent).item() == 0
    assert auxiliaries.code_redundancy(independent[:, :1].expand(-1, 2)).item() == 1  # one bit twice
    assert auxiliaries.code_redundancy(torch.ones(4, 2)).item() == 1  # constant


def test_balance_leaves_the_forward_pass_alone_and_reaches_the_weights_before_a_code() -> None:
    model = nets.resnet(nets.BIREAL, 4, stages=1, units=2, width=4)
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    balance = auxiliaries.Balance(model, weight=2.0)
    assert torch.equal(model(x), expected)
    loss = balance.loss(model, torch.arange(4), torch.arange(4))
    (gradient,) = torch.autograd.grad(loss, model.conv1.weight)
    assert gradient.norm() > 0 and not balance.found
    balance.remove()
    model(x)
    assert not balance.found


def test_shuffled_pairs_cost_more_than_right_ones() -> None:
    z = F.normalize(torch.randn(1, 8, 16), dim=2)
    right = accuracy.cmim_plugin.InfoNCE()(z, z, temperature=0.1)
    assert auxiliaries.shuffled(z, z, temperature=0.1) > right + 1
    torch.testing.assert_close(
        auxiliaries.entropy(z, F.normalize(torch.randn(1, 8, 16), dim=2), temperature=0.1), right
    )


# --- arms, queue and records -----------------------------------------------------------------------------------------


def test_arm_variants() -> None:
    changed = {**accuracy.ARMS["image"], "weight": 1, "layer_decay": 0.5}
    assert accuracy.arm_options("image+weight=1,layer_decay=0.5") == changed
    with pytest.raises(SystemExit, match="no arm nonsense"):
        accuracy.arm_options("nonsense+weight=1")
    with pytest.raises(SystemExit, match="has no CMIM that weight"):
        accuracy.arm_options("none+weight=1,lr=0.1")


def test_an_arm_is_compared_with_one_of_the_same_optimizer() -> None:
    assert accuracy.beside("default+weight=1,lr=0.03,optimizer=sgd", "none") == "none+lr=0.03,optimizer=sgd"
    assert accuracy.beside("default+weight=1", "shuffled") == "shuffled"


def test_schedule_follows_the_arm_then_the_regime_then_the_optimizer() -> None:
    config = accuracy.parse(["cifar10"]).config
    sgd = accuracy.schedule({}, config, "irnet")
    assert (sgd.optimizer, sgd.lr, sgd.weight_decay) == ("sgd", 0.1, 1e-4)
    adam = accuracy.schedule({"lr": 1e-3}, config, "bireal")
    assert (adam.optimizer, adam.lr, adam.weight_decay) == ("adam", 1e-3, 0.0)
    config = accuracy.parse(["overfit", "--optimizer", "sgd", "--lr", "0.03"]).config
    assert accuracy.schedule({}, config, "bireal").lr == 0.03
    assert accuracy.schedule({"two_step": True}, config, "bireal").epochs == 25


def test_queue_finishes_all_arms_of_a_seed_first_and_trains_teachers_before_their_arms() -> None:
    queue = accuracy.make_queue(["irnet", "bireal"], ["none", "distill"], [0, 1])
    assert [run.seed for run in queue] == [0] * 6 + [1] * 6
    assert [run.arm for run in queue[:3]] == ["full_precision", "none", "distill"]
    assert accuracy.make_queue(["irnet"], ["none", "image"], [3]) == [Run("irnet", "none", 3), Run("irnet", "image", 3)]


def test_plan_keeps_what_fits_and_names_the_rest() -> None:
    queue = [Run("irnet", arm, seed) for seed in (1, 2) for arm in ("none", "image", "default")]
    seconds = {Run("irnet", "none", 0): 10.0, Run("irnet", "image", 0): 20.0}  # default: as the slowest, 20
    assert accuracy.plan(queue, seconds, left=50, jobs=1) == (queue[:3], queue[3:])
    assert accuracy.plan(queue, seconds, left=50, jobs=2) == (queue, [])
    assert accuracy.plan(queue, {}, left=1, jobs=1) == (queue, [])  # nothing is measured yet


def test_records_are_not_made_from_changed_code(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(accuracy, "commit", lambda *scripts: "abc-dirty")
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path.resolve())
    with pytest.raises(SystemExit, match="differs from commit abc,"):
        accuracy.main(["digits", "--results", str(tmp_path)])


ARMS = ["none", "default", "shuffled", "balance", "distill_default", "default+weight=1e-30", "two_step_second"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory):
    """The arguments of a run of seconds, which ran once."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["digits", "--train-size", "64", "--batch-size", "32", "--width", "4", "--epochs", "2", "--seeds", "0"]
    arguments += [
        "--methods",
        "bireal",
        "--arms",
        *ARMS,
        "--results",
        str(folder),
        "--cache",
        str(folder / "teachers"),
        "--threads",
        "1",
    ]
    accuracy.main(arguments)
    return arguments, folder / "digits.jsonl"


def test_every_run_leaves_a_record(smoke) -> None:
    done = accuracy.read_results(smoke[1])
    assert {run.arm for run in done} == {"full_precision", *ARMS}
    record = done[Run("bireal", "default", 0)]
    assert len(record["curves"]["bounds"]) == 6 and len(record["curves"]["train_loss"]) == 2
    assert record["commit"] and record["versions"]["torch"] == torch.__version__ and record["threads"] == 1
    assert record["options"] == {"cmim": True} and record["resolved"]["cmim"]["weight"] > 0
    assert len(record["inside"]["codes"]) == len(record["inside"]["gradient_norms"]) == 6
    assert all(0 <= code["entropy"] <= 1 for code in record["inside"]["codes"].values())
    assert not done[Run("bireal", "shuffled", 0)]["curves"]["bounds"]
    assert len(done[Run("bireal", "two_step_second", 0)]["curves"]["train_loss"]) == 2


def test_arms_are_paired(smoke) -> None:
    """CMIM of no weight changes nothing: initial weights, batches and augmentation are those of `none`."""
    done = accuracy.read_results(smoke[1])
    none, weightless = (done[Run("bireal", arm, 0)] for arm in ("none", "default+weight=1e-30"))
    assert weightless["curves"]["train_loss"] == none["curves"]["train_loss"]
    assert weightless["accuracy"] == none["accuracy"] and weightless["inside"] == none["inside"]


def test_what_an_arm_changes_inside_is_told_beside_the_bare_network(smoke) -> None:
    records = list(accuracy.read_results(smoke[1]).values())
    lines = why.table(records, ["none", "default+weight=1e-30"]).splitlines()[2:]
    assert len(lines) == 2 and lines[1].count("+0.000 (one seed)") == len(why.COLUMNS)
    assert len(why.layers(records, ["default"]).splitlines()) == 2 + 6


def test_resuming_does_only_what_is_missing_and_repeats_exactly(smoke) -> None:
    arguments, path = smoke
    before = path.read_text()
    accuracy.main(arguments)
    assert path.read_text() == before
    lines = [line for line in before.splitlines() if json.loads(line)["arm"] != "default"]
    path.write_text("\n".join(lines) + "\n")
    accuracy.main(arguments)
    old, new = (json.loads(text.splitlines()[i]) for text, i in ((before, 2), (path.read_text(), -1)))
    assert new["arm"] == old["arm"] == "default" and new["curves"] == old["curves"] and new["inside"] == old["inside"]


def test_another_configuration_or_another_default_is_refused(smoke, monkeypatch) -> None:
    arguments, _ = smoke
    with pytest.raises(SystemExit, match="Choose another --name"):
        accuracy.main([*arguments, "--epochs", "3"])
    monkeypatch.setitem(loop.OPTIMIZERS["adam"], "lr", 1e-3)
    with pytest.raises(SystemExit, match="Choose another --name"):
        accuracy.main(arguments)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_loop_fits_its_training_images(optimizer, images) -> None:
    torch.manual_seed(0)
    model = nets.resnet(nets.BIREAL, 3, stages=1, units=2, width=8)
    schedule = loop.Schedule(30, 6, optimizer, lr=0.05 if optimizer == "sgd" else 1e-2, weight_decay=0.0)
    history = loop.train(model, images, schedule, seed=0)
    assert history.train_loss[-1] < 0.5 * history.train_loss[0]
    assert len(history.test_accuracy) == 30 and not math.isnan(history.test_accuracy[-1])


def test_runs_side_by_side_are_those_one_after_another(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(accuracy, "fuse", lambda: None)  # inductor would compile for seconds
    monkeypatch.setattr(loop, "STEPS_A_TURN", 1)
    arguments = [
        "digits",
        "--train-size",
        "64",
        "--batch-size",
        "16",
        "--width",
        "4",
        "--epochs",
        "2",
        "--fast",
        "graph",
    ]
    arguments += ["--methods", "bireal", "--arms", "none", "default", "balance", "--seeds", "0"]
    found = []
    for jobs in ("1", "4"):
        accuracy.main([*arguments, "--jobs", jobs, "--results", str(tmp_path / jobs)])
        done = accuracy.read_results(tmp_path / jobs / "digits.jsonl")
        found.append({run: (record["curves"], record["accuracy"]) for run, record in done.items()})
    assert len(found[0]) == 3 and found[0] == found[1]


def test_a_run_that_fails_beside_others_is_told(tmp_path) -> None:
    def steps(fails: bool):
        yield
        if fails:
            raise RuntimeError("no such luck")
        return "done"

    with loop.SideBySide() as pool:
        futures = [pool.submit(steps, fails) for fails in (False, True, False)]
    assert futures[0].result() == futures[2].result() == "done"
    with pytest.raises(RuntimeError, match="no such luck"):
        futures[1].result()


def test_the_learning_rate_within_a_graph_is_the_cosine_of_torch() -> None:
    rates = []
    for kind, lr in ((loop.DeviceCosine, torch.tensor(0.1)), (torch.optim.lr_scheduler.CosineAnnealingLR, 0.1)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
        scheduler = kind(optimizer, 20)
        rates.append([])
        for _ in range(20):
            optimizer.step()
            scheduler.step()
            rates[-1].append(float(optimizer.param_groups[0]["lr"]))
    assert rates[0] == pytest.approx(rates[1], abs=1e-7)


# --- tables and picture ----------------------------------------------------------------------------------------------


def test_interval_is_the_textbook_one() -> None:
    none, arm = [40.0, 41.0, 42.0, 43.0, 44.0], [41.0, 41.5, 44.0, 43.5, 46.0]  # differences 1, .5, 2, .5, 2
    variance = sum((d - 1.2) ** 2 for d in (1, 0.5, 2, 0.5, 2)) / 4
    mean, half = tables.paired_difference(none, arm)
    assert mean == pytest.approx(1.2)
    assert half == pytest.approx(2.776445 * math.sqrt(variance / 5), rel=1e-5)  # t, 4 degrees of freedom, 97.5 %


@pytest.fixture
def results(tmp_path):
    """`gains.jsonl`: 1.0, 1.1 and 1.2 points over `none`, and a fourth seed without a partner; `swept.jsonl`."""

    def record(arm: str, seed: int, value: float) -> dict:
        common = {"method": "bireal", "train_accuracy": 60.0, "config": vars(accuracy.parse(["overfit"]).config)}
        about = {"date": "2020-01-01T00:00:00", "device": "cpu", "commit": "abc"}
        return {**common, **about, "arm": arm, "seed": seed, "accuracy": value}

    gains = [record("none", s, 40.0) for s in range(3)] + [record("default", s, 41.0 + 0.1 * s) for s in range(4)]
    gains += [record("shuffled", s, 40.0 + s) for s in range(3)] + [record("full_precision", 0, 50.0)]
    rates = {"none": 40.0, "none+lr=0.03": 30.0, "default+lr=0.03,weight=1": 31.0}
    swept = [record(arm, s, value) for arm, value in rates.items() for s in range(2)]
    for name, records in {"gains": gains, "swept": swept}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


GAIN = 4.302653 * 0.1 / math.sqrt(3)  # half width; t for 2 degrees of freedom
GAIN = f"**+1.10 ({1.1 - GAIN:+.2f} to {1.1 + GAIN:+.2f})**"


def test_table_of_gains_is_paired_and_told_as_a_share_of_the_gap(results) -> None:
    filled = tables.fill("<!-- gains: gains -->\nstale\n<!-- end -->\n", results)
    setting = "CIFAR-10, 500 images, VGG-Small, 50 epochs, Adam"
    assert f"| {setting} | Bi-Real Net | `default` | 3 | 40.00 | 41.10 | {GAIN} | 11 % |" in filled
    assert "|  | Bi-Real Net | `shuffled` | 3 | 40.00 | 41.00 | +1.00 (-1.48 to +3.48) | 10 % |" in filled
    assert "stale" not in filled and "`full_precision`" not in filled
    assert tables.fill(filled, results) == filled


def test_an_arm_of_its_own_learning_rate_is_compared_with_the_bare_network_of_that_rate(results) -> None:
    filled = tables.fill("<!-- gains: swept / default+lr=0.03,weight=1 -->\n<!-- end -->\n", results)
    assert "| 2 | 30.00 | 31.00 | **+1.00 (+1.00 to +1.00)** |" in filled
    filled = tables.fill("<!-- table: swept -->\n<!-- end -->\n", results)
    assert "| `none+lr=0.03` | 2 | 30.00 ± 0.00 | 60.0 |  |" in filled


def test_tables_of_one_file(results) -> None:
    text = "a\n<!-- table: gains default -->\nstale\n<!-- end -->\nb\n<!-- pooled: gains -->\n<!-- end -->\nc\n"
    filled = tables.fill(text, results)
    assert filled.startswith("a\n") and filled.endswith("\nc\n") and tables.fill(filled, results) == filled
    assert f"| bireal | `default` | 4 | 41.15 ± 0.13 | 60.0 | {GAIN} |" in filled
    assert f"| `default` | 3 | {GAIN} | +1.10 |" in filled and "2020-01-01, cpu, commit abc" in filled
    assert "`none`" not in filled.partition("\nb\n")[0].split("|---|", 1)[1]


def test_summary_has_a_row_for_each_setting_and_arm_and_skips_what_does_not_exist(results) -> None:
    filled = tables.fill("<!-- summary: later gains / default shuffled -->\n<!-- end -->\n", results)
    rows = [line for line in filled.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert rows[2] == f"| CIFAR-10, 500 images, VGG-Small, 50 epochs, Adam | `default` | 3 | {GAIN} |  | +1.10 |  |"
    assert rows[3].startswith("|  | `shuffled` | 3 | +1.00 (-1.48 to +3.48) |")
    assert "No results yet." in tables.fill("<!-- summary: later -->\n<!-- end -->\n", results)


def test_what_changes_inside_is_told_over_the_pairs_of_all_methods(tmp_path) -> None:
    codes = {"none": (0.25, 0.5, 0.3), "default": (0.0, 0.75, 0.1)}
    records = [
        {
            "method": method,
            "arm": arm,
            "seed": seed,
            "accuracy": 40.0 + (arm == "default") * (1 + seed),
            "inside": {"codes": {"a": dict(zip(("dead", "entropy", "correlation"), codes[arm], strict=True))}},
        }
        for method, arm, seed in itertools.product(("irnet", "bireal"), ("none", "default"), range(2))
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = tables.fill("<!-- inside: in -->\n<!-- end -->\n", tmp_path).splitlines()
    assert lines[4] == "| `none` | 4 | 40 | 25 | 0.5 | 0.3 |"
    assert lines[5].startswith("| `default` | 4 | 41.5, **+1.50 (+0.58 to +2.42)** | 0, **-25.00 (")
    assert "0.1, **-0.200 (-0.200 to -0.200)** |" in lines[5]
    text = "<!-- number: inside in default entropy --><!-- end -->"
    assert tables.fill(text, tmp_path) == text.replace("--><", "-->0.75<")


def test_numbers_within_a_sentence(results) -> None:
    def number(wanted: str) -> str:
        filled = tables.fill(f"It is <!-- number: {wanted} -->stale<!-- end -->.", results)
        assert tables.fill(filled, results) == filled
        return filled.removeprefix(f"It is <!-- number: {wanted} -->").removesuffix("<!-- end -->.")

    assert number("gain gains default") == f"{GAIN.strip('*').replace(' (', ' points (95 % CI ')[:-1]}, 3 pairs)"
    assert number("gain gains default shuffled") == "+0.10 points (95 % CI -2.14 to +2.34, 3 pairs)"
    assert number("gain later default") == number("cost cpu position") == "not measured yet"
    assert number("mean gains none") == "Bi-Real Net 40.0 %" and number("mean later none") == "not measured yet"
    assert number("mean gains none absent") == "not measured yet"
    assert number("best swept") == "Bi-Real Net 31.0 % (`default+lr=0.03,weight=1`) against 40.0 % (`none`)"
    record = {"passed": {"irnet": ["a", "b"]}, "families": ["a", "b", "c"], "versions": {"timm": "1"}}
    (results / "sweep.json").write_text(json.dumps(record))
    assert number("sweep sweep.json") == "2 of 3 (irnet), timm 1"
    config = vars(overhead.Config("tiny", 4))
    lines = [{"config": config, "arm": arm, "ratio": ratio} for arm, ratio in (("none", 1.0), ("position", 1.042))]
    (results / "overhead.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert number("cost cpu position") == "1.04 to 1.04" and number("cases cpu") == "1"


def test_dense_results_get_their_own_table(tmp_path) -> None:
    config = {"data": "camvid", "task": "segmentation", "split": "test", "size": [4, 6], "width": 8, "epochs": 2}
    about = {"config": config | {"batch_size": 1}, "date": "2020-01-01T00:00:00", "device": "cpu", "commit": "abc"}
    runs = [{"method": "irnet", "arm": arm, "seed": 0} for arm in ("none", "image", "default")]
    metrics = {"miou": 0.25, "pixel_accuracy": 0.75}
    (tmp_path / "roads.jsonl").write_text(
        "".join(json.dumps(run | about | {"metrics": metrics}) + "\n" for run in runs)
    )
    filled = tables.fill("<!-- dense: roads none image -->\n<!-- end -->\n", tmp_path)
    assert "| irnet | `image` | 1 | 25.00 | +0.00 (one seed) | 75.00 | +0.00 (one seed) |" in filled
    assert "default" not in filled and "camvid, images of 4 x 6 pixels" in filled and "2 runs, 2020-01-01" in filled
    assert "No results yet" in tables.fill("<!-- dense: roads paper -->\n<!-- end -->\n", tmp_path)


def test_the_picture_is_the_same_each_time_and_says_what_it_shows(results, tmp_path) -> None:
    found = tables.gains(["gains"], [], results)
    for name in ("a.svg", "b.svg"):
        tables.draw(found, "dark", tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text() and tables.digest(found) in svg


def test_documents_and_pictures_are_up_to_date_with_the_results() -> None:
    """If not: `make tables`."""
    for document in tables.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert tables.fill(text, tables.RESULTS) == text, document.name
    found = tables.pictured(tables.DOCUMENTS[0].read_text(encoding="utf-8"), tables.RESULTS)
    for path in tables.PICTURES.values():
        assert tables.digest(found) in path.read_text(encoding="utf-8"), path.name
