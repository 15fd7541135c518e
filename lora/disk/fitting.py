"""A saved adapter fitted to a model: which of its parts go where, and all that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora.building import build
from lora.copies import bias_copy, own_bias, whole_copy
from lora.disk import strict_json
from lora.disk.folder import PREFIX, SavedAdapter
from lora.layout import out_in_view, why_not_adaptable
from lora.messages import cut, listed
from lora.updates import LowRankUpdate
from lora.values import why_not_usable

SLICES = "lora_slices"  # key in the metadata: which slices' blocks a plain B holds


def places(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The path in the model for each path in a file, in the model's order.

    torch.compile and wrappers put `_orig_mod` and `module` into paths, here or where it was saved.
    """
    plain = {_plain(path): path for path in reversed(list(modules))}  # a first one wins
    found = {p: p if p in modules else plain.get(_plain(p), p) for p in paths}
    order = {path: i for i, path in enumerate(modules)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[1], len(order))))


def _plain(path: str) -> str:
    return path.replace("_orig_mod.", "").removeprefix("module.")


def rebuild(
    saved: SavedAdapter,
    modules: Mapping[str, nn.Module],
    places: Mapping[str, str],
    dtype: torch.dtype | None,
) -> tuple[dict[str, LowRankUpdate], list[str]]:
    """The saved updates by their path in the file, and what is wrong with them."""
    names = {place: path for path, place in places.items()}
    wanted = [p for p in modules if saved.config.matches(names.get(p, p))]
    missing = [p for p in wanted if p not in names and not why_not_adaptable(modules[p])]
    faults = [f"{path}: no tensors in the file" for path in missing]
    updates: dict[str, LowRankUpdate] = {}
    for path, place in places.items():
        try:
            if place not in modules:
                raise ValueError("no such layer here")
            if names[place] != path:
                raise ValueError(f"left over (the file has this layer as {names[place]} too)")
            if reason := why_not_adaptable(modules[place]):
                raise ValueError(reason)
            if not saved.config.matches(path):
                raise ValueError("not a target of the config")
            updates[path] = _rebuild(modules[place], path, saved, dtype)
        except ValueError as error:
            faults.append(f"{cut(path, 120)}: {error}")
    return updates, faults


def _rebuild(
    base: nn.Module, path: str, saved: SavedAdapter, dtype: torch.dtype | None
) -> LowRankUpdate:
    """The saved update of one layer; ValueError lists what does not fit."""
    config, factors = saved.config.update_config(path), saved.factors[path]
    spans = _spans(saved.metadata, path, base)
    if missing := [f"lora_{name} is missing" for name in "AB" if name not in factors]:
        raise ValueError(", ".join(missing))
    return build(base, config, factors["A"], factors["B"], spans=spans, dtype=dtype)


def restore(
    saved: SavedAdapter, modules: Mapping[str, nn.Module], updates: Mapping[str, LowRankUpdate]
) -> tuple[dict[str, nn.Module], list[str]]:
    """The saved copies by their path in the model, the biases of updates, and what is wrong.

    Args:
        saved: what the folder holds.
        modules: the model's, by path.
        updates: those of the file, by their path there; they get their biases.
    """
    copies: dict[str, nn.Module] = {}
    faults: list[str] = []
    for path, place in places([*saved.copies, *saved.biases], modules).items():
        try:
            if place not in modules:
                raise ValueError("no such module here")
            if path in saved.copies:
                copies[place] = filled(whole_copy(modules[place]), saved.copies[path])
                continue
            if own_bias(modules[place]) is None:
                raise ValueError("it has no bias, and the file has")
            if path in updates:
                updates[path].bias = own_bias(modules[place])
                filled(updates[path], {"bias": saved.biases[path]})
            else:
                copies[place] = filled(bias_copy(modules[place]), {"bias": saved.biases[path]})
        except ValueError as error:
            faults.append(f"{cut(path, 120)}: {error}")
    return copies, faults


def filled(copy: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The copy with these values in its tensors.

    Raises:
        ValueError: listing what does not fit, or is missing of a module's tensors.
    """
    own = copy.state_dict(keep_vars=True)
    whole = "bias" not in tensors or len(tensors) > 1
    faults = [f"{name} is missing" for name in own if whole and name not in tensors]
    for name, tensor in tensors.items():
        if name not in own:
            faults.append(f"{name} is left over")
        elif own[name].shape != tensor.shape:
            shapes = tuple(tensor.shape), tuple(own[name].shape)
            faults.append("{} is {}, this module takes {}".format(name, *shapes))
        elif own[name].is_floating_point() and (why := why_not_usable(tensor, own[name].dtype)):
            faults.append(f"{name} {why}")
    if faults:
        raise ValueError(listed(faults, ", "))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return copy


def _spans(metadata: Mapping[str, str], path: str, base: nn.Module) -> dict[str, tuple[int, int]]:
    """The slices that a file says one layer's blocks are for."""
    out_features = out_in_view(base, base.get_parameter("weight")).shape[0]
    try:
        every = strict_json.parse_object(metadata.get(SLICES, "{}"))
        spans: dict[str, tuple[int, int]] = every.get(path, {})
        bounds = [0, *(bound for span in sorted(spans.values()) for bound in span), out_features]
        sound = bounds == sorted(bounds) and all(start < stop for start, stop in spans.values())
        sound = sound and all(type(bound) is int for bound in bounds)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the slices in its metadata are malformed ({cut(error)})") from None
    if not sound:
        raise ValueError(f"the slices in its metadata do not fit {out_features} outputs")
    return spans


def strangers(
    saved: SavedAdapter, modules: Mapping[str, nn.Module], allow_base_mismatch: bool
) -> list[str]:
    """What the file holds beside updates that is not the base's own, and what it lacks."""
    own = {
        _plain(f"{path}.{name}"): tensor
        for path, module in modules.items()
        for name, tensor in [*_parameters(module), *module.named_buffers(recurse=False)]
    }
    faults: list[str] = []
    for path, tensors in saved.base.items():
        for name, tensor in tensors.items():
            place = f"{path}.{name}"
            if (mine := own.get(_plain(place))) is None:
                faults.append(f"{place}: left over")
            elif (reason := difference(tensor, mine)) and (
                not allow_base_mismatch or tensor.shape != mine.shape
            ):
                faults.append(f"{place} {reason}: it was made for another base")
    for key, tensor in saved.left_over.items():
        mine = own.get(_plain(key.removeprefix(PREFIX)))
        if reason := "no such tensor is here" if mine is None else difference(tensor, mine):
            faults.append(f"{key}: left over ({reason})")
    return [*faults, *_lacking(saved, modules)]


def _lacking(saved: SavedAdapter, modules: Mapping[str, nn.Module]) -> list[str]:
    """What the config says was trained beside the updates, and the file lacks."""
    config = saved.config
    faults = [
        f"{path}: no tensors in the file, though modules_to_save names it"
        for path, module in modules.items()
        if any(path.endswith(end) for end in config.copies)
        and path not in saved.copies
        and module.state_dict()
    ]
    if config.bias != "none":
        plain = {_plain(path): module for path, module in modules.items()}
        biased = [
            p for p in saved.factors if getattr(plain.get(_plain(p)), "bias", None) is not None
        ]
        if lacking := [path for path in biased if path not in saved.biases]:
            paths = listed(lacking, ", ", 160)
            faults.append(f"bias is {config.bias!r}, and the file lacks the bias of {paths}")
    return faults


def _parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters(recurse=False))


def difference(saved: Tensor, base: Tensor) -> str | None:
    """How a tensor of the base in a file differs from the base's own, or None.

    They may be rounded to different dtypes.
    """
    if saved.shape != base.shape:
        return f"is {tuple(saved.shape)}, the base's is {tuple(base.shape)}"
    if reason := why_not_usable(saved):
        return reason
    if base.is_meta:
        return "cannot be compared with the base's, which is on the meta device"
    here = base.detach().cpu()
    if saved.dtype == here.dtype:
        unlike = saved != here
    else:
        slack = max(torch.finfo(t.dtype).eps for t in (saved, here))
        unlike = (saved.double() - here.double()).abs() > slack * here.double().abs() + 1e-7
    if not (count := int(unlike.count_nonzero())):
        return None
    return f"differs from the base's in {count:,} of {unlike.numel():,} values"
