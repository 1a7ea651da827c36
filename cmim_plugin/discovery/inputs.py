"""Inputs of a model: where their number of samples is read, and how they are varied for the dry run."""

from __future__ import annotations

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
    """Every tensor in nested tuples, lists and mappings, with the keys that lead to it."""
    if isinstance(tree, Tensor):
        yield path, tree
    for key, value in _entries(tree):
        yield from tensors_in(value, (*path, key))


def part_of(tree: Any, path: Path) -> Any:
    """What the keys lead to."""
    for key in path:
        tree = tree[key]
    return tree


def _entries(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return tree.items()
    return enumerate(tree) if isinstance(tree, (tuple, list)) else ()


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor has elements in memory one by one: neither sparse nor nested."""
    return tensor.layout == torch.strided and not tensor.is_nested


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

    @property
    def of_first_dimensions(self) -> BatchSource | None:
        """The places that are no other dimension, None where there are none."""
        first = tuple((path, dim) for path, dim in self.places if not dim)
        return BatchSource(first) if first else None

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """The number of samples in these inputs, None where it cannot be read."""
        for path, dim in self.places:
            try:
                found = part_of((args, kwargs), path)
                if isinstance(found, Tensor) != (dim is None):
                    return len(found) if dim is None else int(found.size(dim))
            except Exception:  # not contextlib.suppress: torch 2.6 does not compile it
                continue
        return None


def positional_names(model: nn.Module) -> list[str]:
    """Names of the inputs that a model's forward takes by position, in order; none where they cannot be told."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def batch_sources(model: nn.Module, inputs: Inputs, stated: int | None = None) -> dict[int, BatchSource]:
    """The numbers of samples that the inputs may have, most likely first, each with where it is read.

    They are lengths of first dimensions; for the number that the user stated also of others, tried after these.
    """
    places: dict[int, list[tuple[Path, int | None]]] = defaultdict(list)
    for path, value in _lists_in(inputs):
        places[len(value)].append((path, None))
    tensors = list(tensors_in(inputs))
    for path, tensor in tensors:
        if tensor.ndim:
            places[tensor.size(0)].append((path, 0))
    if stated is not None:
        others = [(path, t) for path, t in tensors if not t.is_nested and stated in t.shape and t.size(0) != stated]
        places[stated] += [(path, t.shape.index(stated)) for path, t in others]
    names = positional_names(model)
    sources = {}
    for size, found in places.items():
        # In training an input may come by keyword that came by position in the example, and the reverse.
        ways = [(way, dim) for path, dim in found for way in (path, _other_way(path, names)) if way]
        if size and ways:
            sources[size] = BatchSource(tuple(ways))
    return sources


def _other_way(path: Path, names: list[str]) -> Path:
    side, key, *rest = path
    if side == 0:
        return (1, names[key], *rest) if key < len(names) else ()
    return (0, names.index(key), *rest) if key in names else ()


def is_offsets(inputs: Inputs, source: BatchSource) -> bool:
    """Whether all tensors with one entry a sample rise: offsets, at which samples start in another tensor.

    Those of other samples are out of order, which on a GPU ends the process.
    """
    tensors = [t for path, t in tensors_in(inputs) if (path, 0) in source.places]
    rising = [t.ndim == 1 and not t.is_floating_point() and bool((t.diff() >= 0).all()) for t in tensors]
    return bool(rising) and all(rising)


def resampled(inputs: Inputs, source: BatchSource, samples: Sequence[int]) -> Inputs:
    """The inputs with these samples of the batch: all that has one entry a sample is indexed."""
    places = dict(source.places)

    def pick(path: Path, value: Any) -> Any:
        if path not in places:
            return value
        if isinstance(value, Tensor):
            return value.detach().index_select(places[path] or 0, torch.tensor(samples, device=value.device))
        return type(value)(value[i] for i in samples)

    return mapped(inputs, pick)


def says_only_shapes(inputs: Inputs) -> bool:
    """Whether a dense input holds a single value, as zeros that stand in for images do."""
    return any(_is_dense(t) and (_is_stand_in(t) or _is_uniform(t)) for _, t in tensors_in(inputs))


def points_into_batch(inputs: Inputs, source: BatchSource, samples: int) -> bool:
    """Whether an input that has not one entry a sample may hold numbers of samples beyond the first ``samples``.

    As the edges of a graph do, or regions with the number of their image: they would point out of a smaller batch.
    """
    size, places = source.of(*inputs) or 0, dict(source.places)
    others = [t for path, t in tensors_in(inputs) if path not in places and is_strided(t)]
    numbers = [t.double() for t in others if not t.is_complex()]
    return any(bool(((t >= samples) & (t < size) & (t == t.round())).any()) for t in numbers)


def varied(inputs: Inputs, seed: int, source: BatchSource | None = None) -> Inputs:
    """The inputs with other values in the dense floating-point ones, everything else as it is.

    The values of a tensor change places. Noise comes in place of a constant: an example of zeros is a stand-in.
    Masks, token ids, lengths, sparse, nested and complex tensors stay. So does what has not one entry a sample, where
    something has: regions hold the numbers of their images.
    """
    tensors = [t for _, t in tensors_in(inputs)]
    places = dict(source.places) if source is not None else {}
    dense = [t for path, t in tensors_in(inputs) if (path in places or path[:-1] in places) and _is_dense(t)]
    dense = dense or [t for t in tensors if _is_dense(t)]
    dense = [t for t in dense if t.ndim > 1] or dense
    # Beside token ids, zeros or ones of their shape are a mask; beside a map of labels, zeros with channels are images.
    rank = max((t.ndim for t in tensors if not t.is_floating_point()), default=0)
    chosen = [t for t in dense if _has_many_values(t)]
    chosen = chosen or [t for t in dense if _is_stand_in(t) and (rank < 2 or t.ndim > rank)]
    chosen = chosen or (dense if rank < 2 else [])
    ids = {id(t) for t in chosen}
    generator = torch.Generator().manual_seed(seed)

    def vary(path: Path, value: Any) -> Any:
        if id(value) not in ids:
            return value
        if _is_stand_in(value) or _is_uniform(value):
            return torch.randn(value.shape, generator=generator, device="cpu").to(value)
        order = torch.randperm(value.numel(), generator=generator, device="cpu").to(value.device)
        return value.detach().flatten()[order].view(value.shape)

    return mapped(inputs, vary)


def mapped(tree: Tree, function: Callable[[Path, Any], Any], path: Path = ()) -> Tree:
    """The tree with a function of (path, value) applied from the leaves up; parts without a change are kept."""
    new: Any = {key: mapped(value, function, (*path, key)) for key, value in _entries(tree)}
    if all(new[key] is value for key, value in _entries(tree)):
        new = tree
    elif isinstance(tree, (tuple, list)):
        new = type(tree)(*new.values()) if hasattr(tree, "_fields") else type(tree)(list(new.values()))
    result: Tree = function(path, new) if path else new
    return result


def _lists_in(inputs: Inputs) -> Iterator[tuple[Path, Any]]:
    """Lists with an entry for each sample, as detectors take: of images, or of a dict of targets for each."""
    for side, tree in enumerate(inputs):
        for key, value in _entries(tree):
            entries = value if isinstance(value, (list, tuple)) else []
            if entries and any(all(isinstance(v, kind) for v in entries) for kind in (Tensor, Mapping)):
                yield (side, key), value


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and is_strided(tensor) and tensor.numel() > 1


def _is_stand_in(tensor: Tensor) -> bool:
    """Zeros, or nowhere finite: an example that says nothing but its shape."""
    return not bool(tensor.any()) or not bool(tensor.isfinite().any())


def _is_uniform(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _has_many_values(tensor: Tensor) -> bool:
    """More than two, which a mask does not have; an additive mask holds minus infinity."""
    low, high = tensor.detach().aminmax()
    return bool(tensor.isfinite().all()) and not bool(((tensor == low) | (tensor == high)).all())
