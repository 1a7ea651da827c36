"""Dense prediction, a binary encoder-decoder without and with CMIM: semantic segmentation, and depth from one image.

    python examples/tools/dense.py camvid --root DIR
    python examples/tools/dense.py nyu --task depth --root DIR --size 240 320
    python examples/tools/dense.py nyu --root DIR --mapping classMapping40.mat --methods irnet bireal reactnet

CamVid (Brostow et al. 2008; 11 classes, and label 11 for void), SPLIT being train, val or test:
    DIR/camvid/SPLIT.npz                  labels (N, H, W), and JPEG files in `jpeg`, one after the other, whose bounds
                                          are `offsets` (N + 1,)
    DIR/camvid/SPLIT/, SPLITannot/        or PNG images and labels of the same names, as SegNet's authors have them
NYU Depth v2 (Silberman et al. 2012): the official files, 795 training and 654 test images:
    DIR/nyu_depth_v2_labeled.mat          `images`, `depths`, `labels`
    DIR/splits.mat                        `trainNdxs`, `testNdxs`
    --mapping FILE ...                    for segmentation, classes from the 894 raw ones: of each file in turn,
                                          `mapClass`, or else the field `labels13` of the struct `classMapping13`, whose
                                          entry i is the new class of class i; counted from 1, 0 is unlabelled. 40
                                          classes: classMapping40.mat; 13: classMapping40.mat class13Mapping.mat

Images and ground truth are resized to --size, and the metrics are of that size. Every run appends a line to --results;
the same command again does what is missing there. Arms: `none` trains without CMIM, `position` with its defaults,
`position_labels` tells it the class of each pixel, `image` contrasts whole images; `+NAME=VALUE` sets an argument of
CMIM, as in `position+weight=1`. The CMIM lines are in `train`.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MeanAbsolutePercentageError, MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from tqdm import tqdm

import cmim_plugin
from bodies import BIREAL, IRNET, REACTNET, Recipe, Unit, anneal
from cmim_plugin import CMIM

METHODS = {"irnet": (IRNET, anneal), "bireal": (BIREAL, None), "reactnet": (REACTNET, None)}
ARMS: dict[str, dict[str, Any]] = {
    "none": {"weight": 0.0},
    "position": {},
    "position_labels": {"labels": True},
    "image": {"instances": "image"},
}
VOID = 255  # a label that is neither trained nor tested on; a depth of 0 likewise

# --- network ---------------------------------------------------------------------------------------------------------


class EncoderDecoder(nn.Module):
    """ResNet-18's stages, and back up with a sum at each scale (FCN, Long et al., arXiv 1411.4038).

    Input (B, 3, H, W) float, output (B, outputs, H, W). Stem, shortcuts, skips and last convolution are not binary. The
    stem ends in a batch norm and not in ResNet-18's max pool, for nearly every maximum would have the sign +1.
    """

    def __init__(self, recipe: Recipe, outputs: int, width: int):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), recipe.nonlinearity(width)),
        )
        self.down = nn.ModuleList()
        for before, after in pairwise([width, *widths]):
            first = Unit(recipe, before, after, stride=1 if before == after else 2)
            self.down.append(nn.Sequential(first, *(Unit(recipe, after, after) for _ in range(3))))
        self.narrow = nn.ModuleList(Unit(recipe, 2 * channels, channels) for channels in widths[-2::-1])
        self.merge = nn.ModuleList(Unit(recipe, channels, channels) for channels in widths[-2::-1])
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, x = x.shape[-2:], self.stem(x)
        scales = []
        for stage in self.down:
            x = stage(x)
            scales.append(x)
        for narrow, merge, skip in zip(self.narrow, self.merge, scales[-2::-1], strict=True):
            x = merge(resize(narrow(x), skip.shape[-2:]) + skip)
        return resize(self.head(x), size)


def device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def resize(x: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False, **options)


# --- tasks -----------------------------------------------------------------------------------------------------------


class Segmentation:
    """Labels uint8 (B, H, W), VOID where there is none."""

    columns: ClassVar = {"miou": "mIoU (%)", "pixel_accuracy": "pixel accuracy (%)"}

    def __init__(self, classes: int):
        self.outputs = classes

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y.long(), ignore_index=VOID)

    def predict(self, output: Tensor) -> Tensor:
        return output.argmax(1)

    def known(self, y: Tensor) -> Tensor:
        return y != VOID

    def classes(self, y: Tensor) -> Tensor:
        """As CMIM takes them: below zero where there is none."""
        return torch.where(self.known(y), y.long(), -1)

    def metrics(self) -> MetricCollection:
        """Over all pixels of a split together; a class that is neither there nor predicted is not averaged over."""
        miou, pixel = MulticlassJaccardIndex(self.outputs), MulticlassAccuracy(self.outputs, average="micro")
        return MetricCollection({"miou": miou, "pixel_accuracy": pixel})


class WithinQuarter(MeanMetric):
    """The share of pixels with max(d / d', d' / d) < 1.25, usually called delta 1."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((torch.maximum(preds / target, target / preds) < 1.25).float())


class Depth:
    """Depths float32 (B, H, W) in metres, 0 where there is none; the network gives their logarithm."""

    columns: ClassVar = {"rmse": "RMSE (cm)", "abs_rel": "abs. rel. error (%)", "delta1": "delta < 1.25 (%)"}
    outputs = 1

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        known = self.known(y)
        return F.l1_loss(output[:, 0][known], y[known].log())

    def predict(self, output: Tensor) -> Tensor:
        return output[:, 0].exp()

    def known(self, y: Tensor) -> Tensor:
        return y > 0

    def metrics(self) -> MetricCollection:
        rmse, relative = MeanSquaredError(squared=False), MeanAbsolutePercentageError()
        return MetricCollection({"rmse": rmse, "abs_rel": relative, "delta1": WithinQuarter()})


Task = Segmentation | Depth
TASKS = {"segmentation": Segmentation, "depth": Depth}

# --- data ------------------------------------------------------------------------------------------------------------

Pairs = Iterator[tuple[np.ndarray, np.ndarray]]  # image (H, W, 3) uint8, ground truth (H, W)


def camvid(root: Path, split: str) -> Pairs:
    folder = root / "camvid"
    if (path := folder / f"{split}.npz").exists():
        arrays = np.load(path)
        files, labels = arrays["jpeg"].tobytes(), arrays["labels"]
        images = (np.asarray(Image.open(io.BytesIO(files[a:b]))) for a, b in pairwise(arrays["offsets"]))
    elif paths := sorted((folder / split).glob("*.png")):
        images = (np.asarray(Image.open(p).convert("RGB")) for p in paths)
        labels = (np.asarray(Image.open(folder / f"{split}annot" / p.name)) for p in paths)
    else:
        sys.exit(f"No CamVid: there is neither {path} nor a PNG in {folder / split}.")
    for image, label in zip(images, labels, strict=True):
        yield image, np.where(label == 11, VOID, label)


def nyu(root: Path, split: str, task: str, table: np.ndarray | None) -> Pairs:
    """The .mat file is HDF5, where every array of MATLAB has its axes reversed: an image is (3, W, H) there."""
    import h5py
    from scipy.io import loadmat

    for path in (matlab := root / "nyu_depth_v2_labeled.mat", splits := root / "splits.mat"):
        if not path.exists():
            sys.exit(f"No NYU Depth v2: {path} is missing. Its authors' site has both files.")
    with h5py.File(matlab) as file:
        for i in tqdm(loadmat(splits)[f"{split}Ndxs"].ravel() - 1, desc=f"reading {split}", disable=None):
            truth = file["depths"][i].T if task == "depth" else table[file["labels"][i].T]
            yield file["images"][i].T, truth


def class_table(paths: list[Path]) -> tuple[np.ndarray, int]:
    """Of NYU's raw labels: the class of each, counted from 0, or VOID, uint8; and the number of classes."""
    from scipy.io import loadmat

    table = np.arange(895)
    for path in paths:
        variables = loadmat(path)
        if "mapClass" in variables:
            step = variables["mapClass"].ravel()
        elif "classMapping13" in variables:
            step = variables["classMapping13"]["labels13"][0, 0].ravel()
        else:
            sys.exit(f"{path} holds {sorted(variables)}; it needs mapClass, or classMapping13 with the field labels13.")
        if len(step) < table.max():
            sys.exit(f"{path} maps {len(step)} classes, not {table.max()}.")
        table = np.concatenate(([0], step)).astype(int)[table]
    if table.max() >= VOID:
        sys.exit("Segmentation of NYU needs --mapping: its 894 raw classes are no task that is reported anywhere.")
    return np.where(table == 0, VOID, table - 1).astype(np.uint8), int(table.max())


@dataclass
class Data:
    """Images uint8 (N, 3, H, W) and ground truth (N, H, W) to train and to test on, as the task has it."""

    task: Task
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def __post_init__(self) -> None:
        pixels = self.train[0].float()
        self.mean, self.std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def load(config: Config, root: Path, mapping: list[Path]) -> Data:
    if config.data == "camvid":
        if config.task == "depth":
            sys.exit("CamVid has no depth: --task segmentation.")
        task, splits = Segmentation(11), {s: camvid(root, s) for s in ("train", config.split)}
    else:
        if config.split == "val":
            sys.exit("NYU Depth v2 has no validation split: choose hyper-parameters on CamVid's.")
        table, classes = class_table(mapping) if config.task == "segmentation" else (None, 0)
        task = Segmentation(classes) if classes else Depth()
        splits = {s: nyu(root, s, config.task, table) for s in ("train", "test")}
    train, test = (stack(pairs, config.size) for pairs in splits.values())
    for _, y in (train, test):
        if isinstance(task, Segmentation) and (highest := int(y[y != VOID].max())) >= task.outputs:
            sys.exit(f"Found label {highest}, where {config.data} has {task.outputs} classes.")
    return Data(task, train, test)


def stack(pairs: Pairs, size: list[int]) -> tuple[Tensor, Tensor]:
    """Resize: images smoothly, ground truth to the nearest pixel, for a mean of two labels or depths is neither."""
    images, truths = [], []
    for image, truth in pairs:
        x, y = torch.tensor(image).permute(2, 0, 1)[None].float(), torch.tensor(truth)[None, None]
        images.append(resize(x, size, antialias=True).round().clamp(0, 255).byte())
        truths.append(F.interpolate(y.float(), size, mode="nearest-exact").to(y.dtype)[0])
    return torch.cat(images).to(device()), torch.cat(truths).to(device())


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What all runs of one results file share."""

    data: str
    task: str
    mapping: list[str]  # names of the files
    split: str  # test, or val, to choose hyper-parameters
    size: list[int]  # height, width
    width: int
    epochs: int
    batch_size: int
    lr: float


def train(
    model: nn.Module, data: Data, config: Config, *, seed: int, on_epoch: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Train in place with Adam and a cosine schedule; images are mirrored at random. Returns curves over epochs.

    options: arguments of CMIM, and `labels`: tell it the class of each pixel; positions of one class are no negatives
    """
    generator = torch.Generator().manual_seed(seed)  # runs of one seed see the same batches
    (images, truths), batch_size = data.train, config.batch_size
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    steps = math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    labels, settings = options.get("labels"), {key: value for key, value in options.items() if key != "labels"}
    cmim = None
    if settings.get("weight") != 0:
        cmim = CMIM(model, torch.zeros_like(images[:2], dtype=torch.float32), **settings)

    losses, bounds = [], defaultdict(list)
    for epoch in tqdm(range(config.epochs), disable=None):
        if on_epoch:
            on_epoch(model, epoch, config.epochs)
        model.train()
        sums: dict[str, Tensor | float] = defaultdict(float)
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            mirror = (torch.rand(len(batch), generator=generator) < 0.5).to(images.device)
            x, y = data.normalise(images[batch]), truths[batch]
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
            y = torch.where(mirror[:, None, None], y.flip(-1), y)
            loss = data.task.loss(model(x), y)
            sums["loss"] += loss.detach()
            if cmim:
                loss = loss + cmim(model, labels=data.task.classes(y) if labels else None)
                for name, metrics in cmim.metrics.items():
                    sums[name] += metrics["bound"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses.append(float(sums.pop("loss")) / steps)
        for name, total in sums.items():
            bounds[name].append(float(total) / steps)
    if cmim:
        cmim.remove()
    rounded = {tap: [round(value, 4) for value in values] for tap, values in bounds.items()}  # nats
    return {"train_loss": [round(value, 4) for value in losses], "bounds": rounded}


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, split: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The task's metrics over the known pixels of a split: shares in [0, 1], RMSE in metres."""
    model.eval()
    metrics = data.task.metrics().to(split[0].device)
    for x, y in zip(*(tensor.split(16) for tensor in split), strict=True):
        known = data.task.known(y)
        metrics.update(data.task.predict(model(data.normalise(x)))[known], y[known])
    return {name: float(value) for name, value in metrics.compute().items()}


@torch.no_grad()
def draw(model: nn.Module, data: Data, path: Path, count: int = 4) -> None:
    """Some test images beside their ground truth and what is predicted; black where the truth is not known."""
    model.eval()
    x, y = (tensor[:: max(1, len(tensor) // count)][:count] for tensor in data.test)
    known, predicted = data.task.known(y), data.task.predict(model(data.normalise(x)))
    options = {"vmin": 0, "vmax": float(y[known].max()), "cmap": "viridis_r", "interpolation": "nearest"}
    if isinstance(data.task, Segmentation):
        options |= {"vmax": data.task.outputs - 1, "cmap": "tab20" if data.task.outputs <= 20 else "nipy_spectral"}
    figure = Figure(figsize=(9, 2.3 * len(x)), layout="constrained")
    panels = {"image": x.permute(0, 2, 3, 1), "ground truth": y.where(known, torch.nan), "prediction": predicted}
    for (title, panel), column in zip(panels.items(), figure.subplots(len(x), 3, squeeze=False).T, strict=True):
        column[0].set_title(title)
        for axes, content in zip(column, panel.cpu().numpy(), strict=True):
            axes.imshow(content, **options)  # an image in colours takes no colour map
            axes.set(xticks=[], yticks=[], facecolor="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def execute(run: Run, config: Config, data: Data, pictures: Path) -> dict[str, Any]:
    """Train and test, and return the record of the run."""
    start = time.perf_counter()
    recipe, on_epoch = METHODS[run.method]
    torch.manual_seed(run.seed)
    model = EncoderDecoder(recipe, data.task.outputs, config.width).to(device(), memory_format=torch.channels_last)
    curves = train(model, data, config, seed=run.seed, on_epoch=on_epoch, options=arm_options(run.arm))
    seconds = round(time.perf_counter() - start, 1)  # of training
    draw(model, data, pictures / f"{run.method}-{run.arm}-{run.seed}.png")
    versions = {"cmim_plugin": cmim_plugin.__version__, "torch": torch.__version__, "python": platform.python_version()}
    name = torch.cuda.get_device_name() if device().type == "cuda" else f"{device().type}, {platform.machine()}"
    return {
        **run._asdict(),
        "metrics": evaluate(model, data, data.test),  # after the last epoch
        "train_metrics": evaluate(model, data, data.train),
        "options": arm_options(run.arm),
        "config": asdict(config),
        "curves": curves,
        "seconds": seconds,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "versions": versions,
        "commit": commit(),
    }


# --- results ---------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    method: str
    arm: str
    seed: int


def arm_options(arm: str) -> dict[str, Any]:
    """Arguments of CMIM, and `labels`, that an arm's name stands for."""
    base, *changes = arm.split("+")
    if base not in ARMS or not all("=" in change for change in changes):
        sys.exit(f"There is no arm {arm}: {', '.join(ARMS)}, and +NAME=VALUE for an argument of CMIM.")
    return ARMS[base] | {name: literal(value) for name, _, value in (change.partition("=") for change in changes)}


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:  # a word
        return text


def commit() -> str:
    """What is checked out; `-dirty` where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def read_results(path: Path, config: Config) -> dict[Run, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for record in records:
        if record["config"] != asdict(config):
            sys.exit(
                f"{path} has results with\n  {record['config']}\nnot\n  {asdict(config)}\nChoose another --results."
            )
    return {Run(r["method"], r["arm"], r["seed"]): r for r in records}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: mean over the seeds, and the mean difference to `none` with its 95 % interval (Student's t)."""
    columns = TASKS[records[0]["config"]["task"]].columns
    values: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for r in records:
        for name in columns:
            values[r["method"], r["arm"], name][r["seed"]] = 100 * r["metrics"][name]
    heads = ["method", "arm", "seeds", *(c for column in columns.values() for c in (column, "minus `none`"))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, arm in dict.fromkeys((r["method"], r["arm"]) for r in records):
        cells = [method, f"`{arm}`", str(len(values[method, arm, next(iter(columns))]))]
        for name in columns:
            own, none = values[method, arm, name], values[method, "none", name]
            cells += [f"{np.mean(list(own.values())):.2f}", difference(own, none) if arm != "none" else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(own: dict[int, float], none: dict[int, float]) -> str:
    """Over the seeds that both have."""
    from scipy import stats

    differences = [own[seed] - none[seed] for seed in sorted(own.keys() & none.keys())]
    if len(differences) < 2:
        return f"{differences[0]:+.2f} (one seed)" if differences else ""
    mean = np.mean(differences)
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("camvid", "nyu"))
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the files named above are")
    parser.add_argument("--task", choices=TASKS, default="segmentation")
    parser.add_argument("--mapping", type=Path, nargs="+", default=[], help="class mappings for NYU, see above")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["bireal"])
    parser.add_argument("--arms", nargs="+", default=["none", "position"], help="see above")
    parser.add_argument("--seed", "--seeds", type=int, nargs="+", default=[0], dest="seeds")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: to choose hyper-parameters")
    parser.add_argument("--size", type=int, nargs=2, default=[180, 240], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage; ResNet-18 has 64")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--results", type=Path, help="file of JSON lines; runs/dense/DATA-TASK.jsonl")
    parser.add_argument("--pictures", type=Path, default=Path("runs", "dense"), help="folder of the pictures")
    args = parser.parse_args(arguments)
    for arm in args.arms:
        if arm_options(arm).get("labels") and args.task == "depth":
            parser.error(f"{arm} needs the class of each pixel, which depth does not have")

    options = {key: value for key, value in vars(args).items() if key in Config.__dataclass_fields__}
    config = Config(**{**options, "mapping": [path.name for path in args.mapping]})
    path = args.results or Path("runs", "dense", f"{config.data}-{config.task}.jsonl")
    done = read_results(path, config)
    # All arms of one seed before the next seed: what has run when time is up is paired.
    runs = [Run(*run) for seed in args.seeds for run in product(args.methods, args.arms, [seed])]
    queue = [run for run in runs if run not in done]
    print(f"{path}: {len(done)} runs are there, {len(queue)} to do", flush=True)
    if queue:
        data = load(config, args.root, args.mapping)
        path.parent.mkdir(parents=True, exist_ok=True)
    for run in queue:
        record = done[run] = execute(run, config, data, args.pictures / path.stem)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
        print(f"{run.method} {run.arm}, seed {run.seed}: {metrics}, {record['seconds']:.0f} s", flush=True)
    print(table(list(done.values())))


if __name__ == "__main__":
    main()
