"""Dense prediction: the readers against files written here, the metrics against plain loops, both tasks end to end."""

import io
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import dense
from bodies import BIREAL
from cmim_plugin import find_binary_activations
from dense import VOID, Config, Depth, Segmentation

h5py = pytest.importorskip("h5py")
savemat = pytest.importorskip("scipy.io").savemat

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def config(**changes) -> Config:
    common = {"data": "camvid", "task": "segmentation", "mapping": [], "split": "test", "size": [32, 48]}
    return Config(**{**common, "width": 4, "epochs": 1, "batch_size": 2, "lr": 1e-3, **changes})


@pytest.fixture
def camvid_root(tmp_path):
    """Three images a split, 40 x 64: car (8) and sky (0) above, road (3) below, the right edge void (11).

    The colours are the classes, and the car is on the left: an image that is mirrored without its labels teaches wrong.
    """
    (tmp_path / "camvid").mkdir()
    labels = np.zeros((3, 40, 64), np.uint8)
    labels[:, :20, :30], labels[:, 20:], labels[:, :, 60:] = 8, 3, 11
    images = np.array(BLUE, np.uint8) * np.ones((3, 40, 64, 1), np.uint8)
    images[:, :20, :30], images[:, 20:] = RED, GREEN
    for split in ("train", "val", "test"):
        files = []
        for image in images:
            Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=95)
            files.append(buffer.getvalue())
        offsets = np.cumsum([0, *map(len, files)])
        jpeg = np.frombuffer(b"".join(files), np.uint8)
        np.savez(tmp_path / "camvid" / f"{split}.npz", jpeg=jpeg, offsets=offsets, labels=labels)
    return tmp_path


@pytest.fixture
def nyu_root(tmp_path):
    """Five images 40 wide and 30 high, written as MATLAB does: every array with its axes reversed.

    All are black with a red, a green and a blue pixel, and have everywhere a depth that grows to the right.
    """
    images = np.zeros((30, 40, 3, 5), np.uint8)  # H x W x 3 x N, as MATLAB shows them
    for place, colour in (((2, 37), RED), ((9, 9), GREEN), ((29, 0), BLUE)):
        images[place] = np.array(colour)[:, None]
    depths = np.tile(np.linspace(1, 8, 40, dtype=np.float32)[None, :, None], (30, 1, 5))
    depths[5, 7, 3] = 0
    labels = np.ones((30, 40, 5), np.uint16)
    labels[15:], labels[2, 37], labels[0, 0] = 4, 894, 0
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        for name, array in {"images": images, "depths": depths, "labels": labels}.items():
            file[name] = array.transpose()
    columns = {"trainNdxs": [[1], [3], [5]], "testNdxs": [[2], [4]]}
    savemat(tmp_path / "splits.mat", {key: np.array(value, np.uint16) for key, value in columns.items()})
    to_40 = np.full((1, 894), 40, np.uint8)
    to_40[0, 0], to_40[0, 3] = 7, 2  # raw 1 is class 7, raw 4 is class 2, all others are 40
    savemat(tmp_path / "classMapping40.mat", {"mapClass": to_40})
    to_13 = np.full((1, 40), 13, np.uint8)
    to_13[0, 6] = 5  # 7 is class 5, all others are 13
    savemat(tmp_path / "class13Mapping.mat", {"classMapping13": {"labels13": to_13}})
    return tmp_path


def test_camvid_is_read_with_label_11_as_void(camvid_root) -> None:
    pairs = list(dense.camvid(camvid_root, "val"))
    assert len(pairs) == 3
    image, label = pairs[1]
    assert image.shape == (40, 64, 3) and image.dtype == np.uint8 and label.shape == (40, 64)
    for place, colour, expected in (((5, 8), RED, 8), ((5, 50), BLUE, 0), ((30, 8), GREEN, 3), ((30, 63), GREEN, VOID)):
        assert np.abs(image[place].astype(int) - colour).max() < 10 and label[place] == expected


def test_camvid_is_read_from_png_files(tmp_path) -> None:
    for folder, pixel in (("train", RED), ("trainannot", 8)):
        (tmp_path / "camvid" / folder).mkdir(parents=True)
        array = np.full((4, 6, 3), pixel, np.uint8) if folder == "train" else np.full((4, 6), pixel, np.uint8)
        Image.fromarray(array).save(tmp_path / "camvid" / folder / "a.png")
    ((image, label),) = dense.camvid(tmp_path, "train")
    assert (image == RED).all() and image.shape == (4, 6, 3) and (label == 8).all() and label.shape == (4, 6)


def test_nyu_is_read_upright_and_split_by_the_official_file(nyu_root) -> None:
    train, test = (list(dense.nyu(nyu_root, split, "depth", None)) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    for image, depth in train + test:
        assert image.shape == (30, 40, 3) and depth.shape == (30, 40)
        assert tuple(image[2, 37]) == RED and tuple(image[29, 0]) == BLUE and tuple(image[9, 9]) == GREEN
        assert image.astype(int).sum() == 3 * 255 and depth[3, 0] == 1 and depth[3, 39] == 8
    assert test[1][1][5, 7] == 0  # image 4, counted from 1
    assert train[2][1][5, 7] > 0 and test[0][1][5, 7] > 0


def test_nyu_classes_come_from_the_mapping_files(nyu_root) -> None:
    to_40, to_13 = nyu_root / "classMapping40.mat", nyu_root / "class13Mapping.mat"
    # Raw 1, 4, 894 and 0 in the places where the fixture has them; counted from 0, so each is one less.
    for files, classes, expected in (([to_40], 40, (6, 1, 39)), ([to_40, to_13], 13, (4, 12, 12))):
        table, number = dense.class_table(files)
        assert number == classes
        _, label = next(dense.nyu(nyu_root, "train", "segmentation", table))
        assert (label[3, 3], label[20, 3], label[2, 37]) == expected and label[0, 0] == VOID


def test_missing_or_wrong_files_are_named(nyu_root, tmp_path) -> None:
    with pytest.raises(SystemExit, match="needs --mapping"):
        dense.class_table([])
    with pytest.raises(SystemExit, match="maps 40 classes, not 894"):
        dense.class_table([nyu_root / "class13Mapping.mat"])
    with pytest.raises(SystemExit, match="needs mapClass"):
        dense.class_table([nyu_root / "splits.mat"])
    with pytest.raises(SystemExit, match="no validation split"):
        dense.load(config(data="nyu", split="val"), nyu_root, [])
    (nyu_root / "splits.mat").unlink()
    with pytest.raises(SystemExit, match=r"splits\.mat is missing"):
        dense.load(config(data="nyu", task="depth"), nyu_root, [])
    with pytest.raises(SystemExit, match=r"neither .*test\.npz nor"):
        list(dense.camvid(tmp_path, "test"))
    with pytest.raises(SystemExit, match="has no depth"):
        dense.load(config(task="depth"), tmp_path, [])


def test_resizing_makes_no_labels_or_depths_that_were_not_there(camvid_root, nyu_root) -> None:
    x, y = dense.load(config(size=[17, 23]), camvid_root, []).test
    assert x.shape == (3, 3, 17, 23) and x.dtype == torch.uint8
    assert y.shape == (3, 17, 23) and y.dtype == torch.uint8 and set(y.unique().tolist()) == {0, 3, 8, VOID}
    _, depth = dense.load(config(data="nyu", task="depth", size=[15, 20]), nyu_root, []).train
    assert depth.dtype == torch.float32
    assert np.isin(depth.numpy(), np.linspace(1, 8, 40, dtype=np.float32)).all()


def test_unexpected_labels_are_refused(camvid_root) -> None:
    path = camvid_root / "camvid" / "test.npz"
    arrays = dict(np.load(path))
    arrays["labels"][0, 0, 0] = 30
    np.savez(path, **arrays)
    with pytest.raises(SystemExit, match="Found label 30, where camvid has 11 classes"):
        dense.load(config(size=[40, 64]), camvid_root, [])


class Fixed(torch.nn.Module):
    """A network that gives what it was told to, one batch after the other."""

    def __init__(self, outputs: torch.Tensor):
        super().__init__()
        self.batches = iter(outputs.split(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.batches)


def data_of(task: dense.Task, y: torch.Tensor) -> dense.Data:
    images = torch.randint(256, (len(y), 3, *y.shape[1:]), dtype=torch.uint8)
    return dense.Data(task, (images, y), (images, y))


def test_segmentation_metrics_are_those_of_plain_loops() -> None:
    task = Segmentation(5)  # class 4 is neither there nor predicted, class 3 only predicted
    y = torch.randint(3, (20, 6, 7), dtype=torch.uint8)
    y[torch.rand(y.shape) < 0.2] = VOID
    output = torch.randn(20, 5, 6, 7)
    output[:, 4] = -9
    right = all_known = 0
    both, either = [0] * 5, [0] * 5
    for truth, guess in zip(y.flatten().tolist(), output.argmax(1).flatten().tolist(), strict=True):
        if truth == VOID:
            continue
        all_known += 1
        right += truth == guess
        for c in range(5):
            both[c] += truth == c and guess == c
            either[c] += truth == c or guess == c
    ious = [b / e for b, e in zip(both, either, strict=True) if e]
    assert len(ious) == 4
    data = data_of(task, y)
    metrics = dense.evaluate(Fixed(output), data, data.test)
    assert metrics == pytest.approx({"miou": sum(ious) / 4, "pixel_accuracy": right / all_known}, rel=1e-6)


def test_depth_metrics_are_those_of_plain_loops() -> None:
    y = torch.rand(20, 6, 7) * 5 + 0.5
    y[torch.rand(y.shape) < 0.2] = 0
    output = y.clamp(min=0.1).log()[:, None] + 0.3 * torch.randn(20, 1, 6, 7)
    squares = relative = close = count = 0
    for truth, log_guess in zip(y.flatten().tolist(), output.flatten().tolist(), strict=True):
        if truth == 0:
            continue
        guess = math.exp(log_guess)
        count += 1
        squares += (truth - guess) ** 2
        relative += abs(truth - guess) / truth
        close += max(truth / guess, guess / truth) < 1.25
    assert 0 < close < count
    data = data_of(Depth(), y)
    metrics = dense.evaluate(Fixed(output), data, data.test)
    expected = {"rmse": math.sqrt(squares / count), "abs_rel": relative / count, "delta1": close / count}
    assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", [Segmentation(3), Depth()], ids=["segmentation", "depth"])
def test_unknown_pixels_do_not_train(task: dense.Task) -> None:
    output = torch.randn(2, task.outputs, 4, 5, requires_grad=True)
    y = torch.full((2, 4, 5), VOID, dtype=torch.uint8) if task.outputs == 3 else torch.zeros(2, 4, 5)
    y[0, 1, 2] = 2
    task.loss(output, y).backward()
    touched = output.grad.abs().sum(1) > 0
    assert touched.nonzero().tolist() == [[0, 1, 2]]


def test_every_binarization_of_encoder_and_decoder_is_tapped() -> None:
    model = dense.EncoderDecoder(BIREAL, 5, 4)
    found = find_binary_activations(model, torch.randn(8, 3, 33, 47))
    expected = [f"down.{stage}.{unit}.binary" for stage in range(4) for unit in range(4)]
    for scale in range(3):
        expected += [f"narrow.{scale}.binary", f"merge.{scale}.binary"]
    assert [f.name for f in found if f.tapped] == expected and len(found) == 22
    assert model(torch.randn(2, 3, 33, 47)).shape == (2, 5, 33, 47)


def run(arguments: list[str], folder) -> list[dict]:
    tiny = ["--size", "32", "48", "--width", "4", "--epochs", "2", "--batch-size", "3"]
    dense.main([*arguments, *tiny, "--results", str(folder / "out.jsonl"), "--pictures", str(folder / "pictures")])
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_segmentation_end_to_end_paired_and_resumed(camvid_root, tmp_path, capsys) -> None:
    arms = ["--arms", "none", "position+weight=1e-30", "position_labels"]
    arguments = ["camvid", "--root", str(camvid_root), *arms]
    records = run(arguments, tmp_path)
    assert [r["arm"] for r in records] == arms[1:]
    none, weightless, position = records
    # CMIM of no weight changes nothing: initial weights and batches are those of `none`.
    assert weightless["curves"]["train_loss"] == none["curves"]["train_loss"]
    assert weightless["metrics"] == none["metrics"] and set(none["metrics"]) == {"miou", "pixel_accuracy"}
    assert position["curves"]["train_loss"] != none["curves"]["train_loss"]
    assert not none["curves"]["bounds"] and position["curves"]["bounds"]
    assert position["commit"] and position["versions"]["torch"] == torch.__version__
    width, height = Image.open(tmp_path / "pictures" / "out" / "bireal-none-0.png").size
    assert width > 500 and height > 300
    assert "| bireal | `position_labels` | 1 |" in capsys.readouterr().out

    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:2]))
    again = run(arguments, tmp_path)
    assert [(r["arm"], r["metrics"], r["curves"]) for r in again] == [
        (r["arm"], r["metrics"], r["curves"]) for r in records
    ]
    with pytest.raises(SystemExit, match="Choose another"):
        run([*arguments, "--lr", "0.1"], tmp_path)
    with pytest.raises(SystemExit, match="no arm distill"):
        run(["camvid", "--arms", "distill"], tmp_path)


def test_depth_end_to_end(nyu_root, tmp_path) -> None:
    (record,) = run(
        ["nyu", "--task", "depth", "--root", str(nyu_root), "--methods", "irnet", "--arms", "image"], tmp_path
    )
    assert set(record["metrics"]) == {"rmse", "abs_rel", "delta1"}
    assert all(math.isfinite(value) for value in record["metrics"].values())
    assert (tmp_path / "pictures" / "out" / "irnet-image-0.png").exists()


def test_segmentation_of_nyu_end_to_end(nyu_root, tmp_path) -> None:
    mapping = [str(nyu_root / name) for name in ("classMapping40.mat", "class13Mapping.mat")]
    (record,) = run(["nyu", "--root", str(nyu_root), "--mapping", *mapping, "--arms", "none"], tmp_path)
    assert record["config"]["mapping"] == ["classMapping40.mat", "class13Mapping.mat"]
    assert 0 <= record["metrics"]["miou"] <= 1


@pytest.mark.slow
def test_training_learns_what_can_be_learned(camvid_root) -> None:
    chosen = config(size=[64, 96], epochs=30, batch_size=3, lr=1e-2)
    data = dense.load(chosen, camvid_root, [])
    model = dense.EncoderDecoder(BIREAL, 11, 8)
    curves = dense.train(model, data, chosen, seed=0, on_epoch=None, options={"weight": 0.3, "labels": True})
    assert curves["train_loss"][-1] < 0.2 * curves["train_loss"][0]
    assert dense.evaluate(model, data, data.test)["pixel_accuracy"] > 0.9


def test_table_pairs_by_seed() -> None:
    def record(arm: str, seed: int, value: float) -> dict:
        metrics = {"rmse": value, "abs_rel": 0.25, "delta1": 0.5}
        return {
            "method": "bireal",
            "arm": arm,
            "seed": seed,
            "metrics": metrics,
            "config": asdict(config(task="depth")),
        }

    records = [record("none", s, 0.5 + 0.1 * s) for s in range(3)] + [record("image", s, 0.6) for s in range(2)]
    text = dense.table(records)
    # Differences over the two seeds that both have: 10 and 0 cm; 12.7062 is t for one degree of freedom.
    half = 12.7062 * math.sqrt(50 / 2)
    assert f"| bireal | `image` | 2 | 60.00 | +5.00 ({5 - half:+.2f} to {5 + half:+.2f}) | 25.00 |" in text
    assert "| bireal | `none` | 3 | 60.00 |  | 25.00 |  |" in text
