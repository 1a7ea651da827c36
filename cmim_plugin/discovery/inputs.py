"""Inputs of a model: where their number of samples is read, and how they are varied for the dry run."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CMIMError

Tree = TypeVar("Tree")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Path = tuple[Any, ...]


def tensors_in(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in nested tuples, lists, mappings and objects with keys(), with the keys that lead to it."""
    if isinstance(tree, Tensor):
        yield path, tree
    for key, value in _entries(tree):
        yield from tensors_in(value, (*path, key))


def part_of(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _entries(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, (tuple, list)):
        return enumerate(tree)
    if not hasattr(tree, "keys") or not hasattr(tree, "__getitem__") or isinstance(tree, (type, nn.Module)):
        return ()
    try:  # a graph of torch_geometric, whose keys are attributes; other objects may mean something else by keys()
        return [(key, tree[key]) for key in list(tree.keys()) if isinstance(key, str) and hasattr(tree, key)]
    except Exception:
        return ()


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor has elements in memory one by one: neither sparse, nor nested, nor on the meta device."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta


def as_inputs(example: Any) -> Inputs:
    """A tensor, a tuple of positional inputs or a dict of keyword inputs, as (args, kwargs)."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise CMIMError(
        "example_input must be a tensor, a tuple of positional inputs or a dict of keyword inputs of the model; "
        f"found {type(example).__name__}."
    )


@dataclass(frozen=True)
class BatchSource:
    """Where the number of samples is read off the model's inputs: in the first of these places that fits."""

    #: Keys that lead to a tensor or a list within (args, kwargs), and the tensor's dimension, None for a list.
    places: tuple[tuple[Path, int | None], ...]

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """The number of samples in these inputs, or None."""
        for path, dim in self.places:
            try:
                found = part_of((args, kwargs), path)
                if dim is None and not isinstance(found, Tensor):
                    return len(found)
                if dim is not None and isinstance(found, Tensor):
                    return int(found.size(dim))
            except Exception:  # not contextlib.suppress: torch 2.6 does not compile it
                continue
        return None


def positional_names(model: nn.Module) -> list[str]:
    """Names of the inputs that a model's forward takes by position, in order; [] if they are not known."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def batch_sources(model: nn.Module, inputs: Inputs, stated: int | None = None) -> dict[int, BatchSource]:
    """The numbers of samples that the inputs may have, each with where it is read: lengths of lists, then first
    dimensions. If the user states a number that is none of them, other dimensions count, too."""
    places: dict[int, list[tuple[Path, int | None]]] = defaultdict(list)
    for side, tree in enumerate(inputs):
        for key, value in _entries(tree):
            # Detectors take a list of images, and a list of dicts of their targets.
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], (Tensor, Mapping)):
                places[len(value)].append(((side, key), None))
    tensors = [(path, t) for path, t in tensors_in(inputs) if t.ndim]
    for path, t in tensors:
        places[t.size(0)].append((path, 0))
    if stated is not None and stated not in places:
        dense = [(path, t.shape) for path, t in tensors if not t.is_nested]
        places[stated] = [(path, shape.index(stated)) for path, shape in dense if stated in shape]
    names = positional_names(model)
    sources = {}
    for size, found in places.items():
        # In training, an input may come by keyword that the example had by position, or the reverse.
        ways = [(way, dim) for path, dim in found for way in (path, _other_way(path, names)) if way]
        if size and ways:
            sources[size] = BatchSource(tuple(ways))
    return sources


def _other_way(path: Path, names: list[str]) -> Path:
    """The path by keyword of an input by position, or the reverse; () if there is none."""
    side, key, *rest = path
    if side == 0:
        return (1, names[key], *rest) if key < len(names) else ()
    return (0, names.index(key), *rest) if key in names else ()


def resampled(inputs: Inputs, source: BatchSource, samples: Sequence[int]) -> Inputs:
    """The inputs with these samples of the batch: everything at ``source.places`` is indexed."""
    places = dict(source.places)

    def pick(path: Path, value: Any) -> Any:
        if path not in places:
            return value
        dim = places[path]
        if dim is None:
            return type(value)(value[i] for i in samples)
        return value.detach().index_select(dim, torch.tensor(samples, device=value.device))

    return mapped(inputs, pick)


def kind_of_values(tensor: Tensor) -> str | None:
    """Of a dense floating-point tensor: "constant", "mask" (two values, or some infinite) or "varied"; else None."""
    if not tensor.is_floating_point() or not is_strided(tensor) or tensor.numel() < 2:
        return None
    low, high = tensor.detach().aminmax()
    if not low < high:  # or NaN, as torch.empty() may give
        return "constant"
    more = tensor.isfinite().all() and ((tensor > low) & (tensor < high)).any()
    return "varied" if more else "mask"


def varied(inputs: Inputs, seed: int, source: BatchSource | None = None) -> Inputs:
    """The inputs with other values in the dense floating-point ones, everything else as it is.

    The values of varied tensors change places. Only if there are none, noise replaces constants: zeros are a stand-in.
    Masks, token ids, lengths, sparse, nested and complex tensors stay. So do tensors without an entry for each sample,
    if others have one: regions hold the numbers of their images.
    """
    places = dict(source.places) if source is not None else {}
    tensors = list(tensors_in(inputs))
    kinds = {path: kind_of_values(t) for path, t in tensors}
    chosen = [(path, t) for path, t in tensors if kinds[path]]
    chosen = [(path, t) for path, t in chosen if path in places or path[:-1] in places] or chosen
    chosen = [(path, t) for path, t in chosen if t.ndim > 1] or chosen
    chosen = [(path, t) for path, t in chosen if kinds[path] == "varied"] or chosen
    # Beside token ids, a constant is a mask; beside a map of labels, one with more dimensions is an image.
    rank = max((t.ndim for _, t in tensors if not t.is_floating_point()), default=0)
    paths = [path for path, t in chosen if kinds[path] == "varied" or (kinds[path] == "constant" and t.ndim > rank)]
    generator = torch.Generator().manual_seed(seed)

    def vary(path: Path, value: Any) -> Any:
        if path not in paths:
            return value
        if kinds[path] == "constant":
            return torch.randn(value.shape, generator=generator, device="cpu").to(value)
        order = torch.randperm(value.numel(), generator=generator, device="cpu").to(value.device)
        return value.detach().flatten()[order].view(value.shape)

    return mapped(inputs, vary)


def mapped(tree: Tree, function: Callable[[Path, Any], Any], path: Path = ()) -> Tree:
    """The tree with a function of (path, value) applied from the leaves up; unchanged parts are the same objects."""
    old = dict(_entries(tree))
    new: Any = {key: mapped(value, function, (*path, key)) for key, value in old.items()}
    if all(new[key] is value for key, value in old.items()):
        new = tree
    elif isinstance(tree, (tuple, list)):
        new = type(tree)(*new.values()) if hasattr(tree, "_fields") else type(tree)(list(new.values()))
    elif hasattr(tree, "__setitem__"):  # of the same type: a model may read its fields as attributes
        changed: Any = copy.copy(tree)
        for key, part in new.items():
            changed[key] = part
        new = changed
    result: Tree = function(path, new) if path else new
    return result
