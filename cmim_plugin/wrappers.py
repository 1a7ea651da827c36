"""See through what training loops put around a model."""

from __future__ import annotations

from torch import nn

from .errors import CMIMError

# Where wrappers keep their module. Lightning Fabric comes first: its `module` is the model without wrappers. Then DDP,
# DataParallel and FSDP1; torch.compile; opacus; FSDP1; torch's checkpoint_wrapper.
_INNER = ("_forward_module", "module", "_orig_mod", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model to attach to: inside DistributedDataParallel, torch.compile and DataParallel on one device."""
    if not isinstance(model, nn.Module):
        raise CMIMError(f"The model comes first, a torch.nn.Module; found a {type(model).__name__}.")
    _refuse_replicas(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def _refuse_replicas(model: nn.Module) -> None:
    """Refuse DataParallel on several devices: it runs copies of the model in threads, without our hooks."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise CMIMError(
            f"nn.DataParallel on {len(model.device_ids)} devices runs copies of the model, which cannot be captured. "
            "Use one process a GPU with DistributedDataParallel, or one GPU: nn.DataParallel(model, device_ids=[0]), "
            "or model.module without the wrapper (and without the prefix 'module.' in its checkpoints)."
        )


def path_to(own: nn.Module | None, model: nn.Module) -> list[nn.Module]:
    """The wrappers from the model that was passed in down to the one that was attached to, both included."""
    if not isinstance(model, nn.Module):
        raise CMIMError(
            f"Pass the model, a torch.nn.Module, and not its input or output; found a {type(model).__name__}."
        )
    _refuse_replicas(model)
    if own is None:
        raise CMIMError("This CMIM belongs to no model: it is a copy, or its model is gone. Build one for this model.")
    path = _path(own, model)
    if path is None:
        raise CMIMError(
            f"This CMIM is attached to another model than the {type(model).__name__} passed in: pass the model that "
            "you attached to. A copy (copy.deepcopy, an EMA) is a plain model: attach a CMIM of its own to train it, "
            "or to look into it with the state_dict of this one."
        )
    return path


def _path(own: nn.Module, model: nn.Module) -> list[nn.Module] | None:
    if model is own:
        return [model]
    inner = (getattr(model, name, None) for name in _INNER)
    rest = (_path(own, module) for module in inner if isinstance(module, nn.Module))
    return next(([model, *found] for found in rest if found), None)
