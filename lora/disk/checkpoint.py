"""Adapters on disk, in PEFT's format: a folder with a config and a safetensors file.

Our metadata adds a digest of the config, entries of the base's weights and the names of slices.
"""

import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.copies import ModuleCopy, whole_copy
from lora.disk import files, fingerprint, peft
from lora.disk.files import CONFIG, SAVING, WEIGHTS
from lora.injection import HEADS, attach, build
from lora.layer import EmbeddingUpdate, why_not_usable
from lora.layout import is_fan_in_fan_out
from lora.slices import SlicedUpdate
from lora.tree import Tree, listed, refuse, survey, survey_adapted

DIGEST, SLICES = "lora_config_sha256", "lora_slices"  # keys in our metadata
CARD = "README.md"
_MARK = "<!-- Written by lora.save, which writes it anew. -->"


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write an adapter as PEFT does; the same adapter gives the same bytes.

    Args:
        model: carries the adapter. Of a sharded one call this in each process.
        folder: created if missing.
        adapter: the adapter's name.
        notes: rows of a model card, README.md, such as `{"data": "legal.jsonl"}`.

    Raises:
        RuntimeError: the model carries no adapter.
        ValueError: none of this name, or factors that are no floats or not finite.
        OSError: the folder cannot be written.

    Warns:
        UserWarning: something else requires grad and is not saved, or a README.md is kept.
    """
    tree, folder = survey_adapted(model), Path(folder)
    carrying = tree.carrying(adapter)
    updates = {path: tree.layers[path].update(adapter) for path in carrying if path in tree.layers}
    if not updates:
        raise ValueError(f"{adapter!r} has no low-rank update, which PEFT needs.")
    factors = {path: [*map(_on_cpu, update.factors())] for path, update in updates.items()}
    for path, (a, b) in factors.items():
        for name, factor in ("A", a), ("B", b):
            if reason := why_not_usable(factor):
                raise ValueError(f"Not saved: {name} of {path} {reason}.")
    copies = {
        path: {name: _on_cpu(t) for name, t in module.updates[adapter].state_dict().items()}
        for path, module in carrying.items()
        if isinstance(module, ModuleCopy)
    }
    base_name: str | None = getattr(tree.root, "name_or_path", None) or None
    # transformers' masked models have an lm_head too, and PEFT's wrapper for text fails on them.
    is_causal = hasattr(tree.root, "lm_head") and getattr(tree.root, "can_generate", lambda: True)()
    config = peft.to_config(
        {path: update.config for path, update in updates.items()},
        tree.bases.keys(),
        copies,
        fan_in_fan_out=any(is_fan_in_fan_out(tree.bases[path]) for path in updates),
        task_type="CAUSAL_LM" if is_causal else None,
        base_model_name_or_path=base_name,
    )
    slices = {path: u.slices for path, u in updates.items() if isinstance(u, SlicedUpdate)}
    metadata = {
        "format": "pt",
        DIGEST: peft.parse(config).digest,
        **({SLICES: json.dumps(slices)} if slices else {}),
        **fingerprint.describe({path: tree.bases[path] for path in updates}),
    }
    embeddings = {path for path, u in updates.items() if isinstance(u, EmbeddingUpdate)}
    tensors = peft.to_tensors(factors, embeddings, copies)
    content = {WEIGHTS: files.to_bytes(tensors, metadata), CONFIG: config.encode()}
    card = folder / CARD
    if notes is not None and card.exists() and _MARK.encode() not in card.read_bytes():
        warnings.warn(f"{CARD} was not written by lora.save, and is kept.", stacklevel=2)
    elif notes is not None:
        targets = json.loads(config)["target_modules"]
        ranks = sorted({update.config.r for update in updates.values()})
        content[CARD] = _card(base_name, {"targets": targets, "r": ranks, **notes}).encode()
    if not tree.is_sharded or torch.distributed.get_rank() == 0:
        files.write(folder, content)
    _warn_of_others(tree, updates)


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    allow_base_mismatch: bool = False,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
) -> list[str]:
    """Put a saved adapter, ours or PEFT's, on the model and make it the active one.

    The base is frozen, as by `lora.inject`.

    Args:
        model: the base that the adapter was made for.
        folder: as `save` or PEFT's `save_pretrained` wrote it, or "org/repo" on the Hub.
        adapter: the name to give it.
        allow_base_mismatch: accept base weights other than those it was made for.
        dtype: of A and B; by default as for `lora.inject`.
        trainable: whether the loaded factors require grad; False for inference.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        FileNotFoundError: a file or a repository is missing.
        ValueError: listing all faults: tensors missing, left over, mis-shaped or not finite,
            another base, an unreadable file, other features of PEFT.
        RuntimeError: the model is merged or routed.

    Warns:
        UserWarning: the config was edited, paths have another prefix, or weights beside differ.
    """
    tree = survey(model)
    config, tensors, metadata = read(folder)
    drop, add = _prefixes([*tensors.factors, *tensors.copies], tree.bases)
    slices = json.loads(metadata.get(SLICES, "{}"))
    updates: dict[str, nn.Module] = {}
    bases: dict[str, nn.Module] = {}  # by their paths in the file
    faults = [] if tensors.factors else [f"no LoRA tensors in {WEIGHTS}"]
    for end in config.copies:
        expected = any(path.endswith(end) for path in tree.bases)
        if expected and not any(path.endswith(end) for path in tensors.copies):
            faults.append(f"modules_to_save names {end}, of which the file has no tensors")
    for path, pair in tensors.factors.items():
        here = add + path.removeprefix(drop)
        try:
            if here not in tree.bases:
                raise ValueError("no such layer here")
            refuse([f"lora_{name} is missing" for name in "AB" if name not in pair])
            a, b = pair["A"], pair["B"]
            one, spans = config.update_config(path, len(a)), slices.get(path)
            updates[here] = build(tree.bases[here], one, a, b, spans=spans, dtype=dtype)
            bases[path] = tree.bases[here]
        except ValueError as error:
            faults.append(f"{path}: {str(error).removesuffix('.')}")
    for path, values in tensors.copies.items():
        here = add + path.removeprefix(drop)
        try:
            updates[here] = whole_copy(tree.bases[here])
            updates[here].load_state_dict(dict(values))
        except (KeyError, RuntimeError) as error:
            faults.append(f"{path}, trained whole: {' '.join(str(error).split())}")
    beside = {add + name.removeprefix(drop): t for name, t in tensors.beside.items()}
    faults += _misfits(beside, tree)
    other = [] if allow_base_mismatch else fingerprint.differing(metadata, bases)
    if other and not faults:
        differ = f"weights differ in {', '.join(other[:3])} (allow_base_mismatch=True)"
        faults.append(f"it was made for another base, whose {differ}")
    refuse(faults, f"{folder} does not fit this model: {{}}.")
    if not trainable:
        for update in updates.values():
            update.requires_grad_(False)
    return attach(tree, adapter, {p: updates[p] for p in tree.bases if p in updates})


def read(folder: str | Path) -> tuple[peft.PeftConfig, peft.Tensors, dict[str, str]]:
    """The config, tensors and metadata of an adapter's folder or repository."""
    config_file, weights_file = files.locate(folder)
    try:
        config = peft.parse(config_file.read_bytes())
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{config_file}: {str(error).removesuffix('.')}.") from None
    tensors, metadata = files.read(weights_file)
    if metadata.get(DIGEST, config.digest) != config.digest:
        if _is_torn(config_file.parent, metadata[DIGEST]):
            raise ValueError(f"{folder}: a save was interrupted before {CONFIG}. Save again.")
        warnings.warn(f"{config_file} was edited after {WEIGHTS} was saved.", stacklevel=3)
    return config, peft.sort_tensors(tensors, config), metadata


def _is_torn(folder: Path, digest: str) -> bool:
    """Whether a killed save left the config of these weights waiting."""
    for file in folder.glob(f"{SAVING}*/{CONFIG}"):
        alone = not (file.parent / WEIGHTS).exists()
        if alone and peft.parse(file.read_bytes()).digest == digest:
            return True
    return False


def _prefixes(paths: Sequence[str], modules: Collection[str]) -> tuple[str, str]:
    """What to drop from a file's paths and what to add, if one choice makes all fit."""
    if all(path in modules for path in paths):
        return "", ""
    choices: list[tuple[str, str]] = []
    first = paths[0].split(".")
    for module in modules:
        here = module.split(".")
        ends = zip(reversed(first), reversed(here), strict=False)
        same = len([*takewhile(lambda end: end[0] == end[1], ends)])
        drop = "".join(f"{word}." for word in first[: len(first) - same])
        add = "".join(f"{word}." for word in here[: len(here) - same])
        if re.findall(r"\d+", drop) == re.findall(r"\d+", add) and all(
            path.startswith(drop) and add + path.removeprefix(drop) in modules for path in paths
        ):
            choices.append((drop, add))
    if len(choices) != 1:
        return "", ""
    ((drop, add),) = choices
    warnings.warn(f"The layers are called {drop}… in the file and {add}… here.", stacklevel=3)
    return drop, add


def _misfits(beside: Mapping[str, Tensor], tree: Tree) -> list[str]:
    """The faults of other tensors: PEFT writes the base's embeddings there."""
    faults: list[str] = []
    other: list[str] = []
    for key, tensor in beside.items():
        path, _, name = key.rpartition(".")
        weight = getattr(tree.bases.get(path), name, None)
        if not isinstance(weight, Tensor):
            faults.append(f"{key}: left over")
        elif tensor.shape != weight.shape:
            shapes = f"{(*tensor.shape,)}, this model's is {(*weight.shape,)}"
            faults.append(f"{key} is {shapes}: call resize_token_embeddings first")
        else:
            coarser = min(tensor.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
            if not torch.equal(tensor.to(coarser), weight.detach().cpu().to(coarser)):
                other.append(key)
    if other and not faults:
        message = (
            f"Not loaded: {listed(other)}, which differ. If trained, copy them into the model."
        )
        warnings.warn(message, stacklevel=3)
    return faults


def _on_cpu(tensor: Any) -> Tensor:
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()


def _card(base: str | None, notes: Mapping[str, object]) -> str:
    lines = ["---", "library_name: peft", "tags:", "- lora"]
    if base and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base):  # a name on the Hub
        lines.insert(1, f"base_model: {base}")
    lines += ["---", _MARK, "# A LoRA adapter", "", "| | |", "|---|---|"]
    for name, value in {"base": base or "", **notes}.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"| {name} | {text} |")
    lines += [
        "",
        "`lora.load(model, folder)` or `peft.PeftModel.from_pretrained(base, folder)`",
        "",
    ]
    return "\n".join(lines)


def _warn_of_others(tree: Tree, saved: Collection[str]) -> None:
    heads = [name for name in HEADS if name in tree.bases and name not in tree.copies]
    left_out = [f"{name}, which a task draws at random" for name in heads]
    updated = {p for module in tree.adapted.values() for p in module.updates.parameters()}
    parameters = tree.root.named_parameters()
    left_out += [name for name, p in parameters if p.requires_grad and p not in updated]
    if left_out:
        message = f"Not saved: {listed(left_out)}. Train it by modules_to_save, or save it."
        warnings.warn(message, stacklevel=3)
    # transformers 5 fuses experts, and PEFT takes layers of these names for their parts.
    names = [name for name, _ in tree.root.named_parameters()]
    fused = any(name.endswith("experts.gate_up_proj") for name in names)
    ends = (".gate_proj", ".up_proj", ".down_proj")
    if misread := [path for path in saved if fused and path.endswith(ends)]:
        warnings.warn(
            f"PEFT takes {listed(misread)} for experts; lora.load does not.", stacklevel=3
        )
