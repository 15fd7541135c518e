"""Adapters on disk, in PEFT's format: a folder with a config and a safetensors file.

The metadata of our own files adds a digest of the config, some entries of the base's weights and
the names of slices.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
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
from lora.tree import Tree, listed, survey, survey_adapted

DIGEST = "lora_config_sha256"  # key in the metadata: of the config that was saved with it
SLICES = "lora_slices"  # key in the metadata: which slices' blocks a plain B holds
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
        model: a model that carries the adapter. Of a sharded one call this in each process.
        folder: created if missing.
        adapter: the adapter's name.
        notes: what a model card should say, such as `{"data": "legal.jsonl"}`: it is written to
            README.md.

    Raises:
        RuntimeError: the model carries no adapter.
        ValueError: none of this name, or factors that are no floats or not finite.
        OSError: the folder cannot be written.

    Warns:
        UserWarning: other parameters of the model require grad, and are not saved; or a README.md
            that `save` did not write is kept.
    """
    tree, folder = survey_adapted(model), Path(folder)
    carrying = tree.carrying(adapter)
    updates = {path: tree.layers[path].update(adapter) for path in carrying if path in tree.layers}
    if not updates:
        raise ValueError(f"{adapter!r} has no low-rank update, and PEFT's format needs one.")
    factors = {path: [*map(_on_cpu, update.factors())] for path, update in updates.items()}
    if faults := [
        f"{name} of {path} {reason}"
        for path, pair in factors.items()
        for name, factor in zip("AB", pair, strict=True)
        if (reason := why_not_usable(factor))
    ]:
        raise ValueError(f"Not saved: {listed(faults)}.")
    copies = {
        path: {name: _on_cpu(t) for name, t in module.updates[adapter].state_dict().items()}
        for path, module in carrying.items()
        if isinstance(module, ModuleCopy)
    }
    base_name: str | None = getattr(tree.root, "name_or_path", None) or None
    config = peft.to_config(
        {path: update.config for path, update in updates.items()},
        tree.bases.keys(),
        copies,
        fan_in_fan_out=any(is_fan_in_fan_out(tree.bases[path]) for path in updates),
        task_type="CAUSAL_LM" if hasattr(tree.root, "lm_head") else None,
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
        warnings.warn(f"{CARD} was not written by lora.save, and is kept as it is.", stacklevel=2)
    elif notes is not None:
        targets = json.loads(config)["target_modules"]
        ranks = sorted({update.config.r for update in updates.values()})
        content[CARD] = _card(base_name, {"targets": targets, "r": ranks, **notes}).encode()
    if not tree.is_sharded or torch.distributed.get_rank() == 0:
        files.write(folder, content)
    _warn_of_others(tree)


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str = "default",
    allow_base_mismatch: bool = False,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
) -> list[str]:
    """Put a saved adapter, updated or PEFT's, on the model and make it the active one.

    The base is frozen, as by `lora.inject`. Updates are in the mode, training or eval, of the base.

    Args:
        model: the base that the adapter was made for.
        folder: as `save` or PEFT's `save_pretrained` wrote it; a string that names no folder here
            may be "org/repo" on the Hub.
        adapter: the name to give it.
        allow_base_mismatch: accept base weights other than those it was made for.
        dtype: of A and B; by default as for `lora.inject`.
        trainable: whether the loaded factors require grad; False for inference.

    Returns:
        The dotted paths of the adapted layers.

    Raises:
        FileNotFoundError: a file or a repository is missing.
        ValueError: listing all faults: tensors missing, left over, mis-shaped or not finite,
            another base, an unreadable file, features of PEFT that are not supported.
        RuntimeError: the model is merged or routed.

    Warns:
        UserWarning: the config was edited, the file's paths have another prefix than the model's,
            or weights of the base in it differ.
    """
    tree = survey(model)
    config, tensors, metadata = read(folder)
    drop, add = _prefixes([*tensors.factors, *tensors.copies], tree.bases)
    slices = json.loads(metadata.get(SLICES, "{}"))
    updates: dict[str, nn.Module] = {}
    bases: dict[str, nn.Module] = {}  # by their paths in the file
    faults = [] if tensors.factors else [f"no LoRA tensors in {WEIGHTS}"]
    for end in config.copies:
        # PEFT names every head that a task's models may have, and the model has one of them.
        expected = any(path.endswith(end) for path in tree.bases)
        if expected and not any(path.endswith(end) for path in tensors.copies):
            faults.append(f"modules_to_save names {end}, of which the file has no tensors")
    for path, pair in tensors.factors.items():
        here = add + path.removeprefix(drop)
        try:
            if here not in tree.bases:
                raise ValueError("no such layer here")
            if missing := [f"lora_{name} is missing" for name in "AB" if name not in pair]:
                raise ValueError(", ".join(missing))
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
        faults.append(
            f"it was made for another base, whose weights differ in {', '.join(other[:3])} "
            "(allow_base_mismatch=True loads it all the same)"
        )
    if faults:
        raise ValueError(f"{folder} does not fit this model: {listed(faults)}.")
    if not trainable:
        for update in updates.values():
            update.requires_grad_(False)
    return attach(tree, adapter, {p: updates[p] for p in tree.bases if p in updates})


def read(folder: str | Path) -> tuple[peft.PeftConfig, peft.Tensors, dict[str, str]]:
    """The config, tensors and metadata of an adapter's folder, or of a repository on the Hub."""
    config_file, weights_file = files.locate(folder)
    try:
        config = peft.parse(config_file.read_bytes())
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{config_file}: {str(error).removesuffix('.')}.") from None
    tensors, metadata = files.read(weights_file)
    if metadata.get(DIGEST, config.digest) != config.digest:
        if _is_torn(config_file.parent, metadata[DIGEST]):
            raise ValueError(
                f"{folder}: a save was interrupted between {WEIGHTS} and {CONFIG}. Save again."
            )
        warnings.warn(f"{config_file} was edited after {WEIGHTS} was saved.", stacklevel=3)
    return config, peft.sort_tensors(tensors, config), metadata


def _is_torn(folder: Path, digest: str) -> bool:
    """Whether a save was killed after the weights took their name: their config still waits."""
    waiting = [f for f in folder.glob(f"{SAVING}*/{CONFIG}") if not (f.parent / WEIGHTS).exists()]
    return any(peft.parse(file.read_bytes()).digest == digest for file in waiting)


def _prefixes(paths: Sequence[str], modules: Collection[str]) -> tuple[str, str]:
    """What to drop from the paths of a file and what to add, if one choice makes all fit."""
    if not paths or all(path in modules for path in paths):
        return "", ""
    choices: dict[tuple[str, ...], tuple[str, str]] = {}
    for dot in [0, *(match.end() for match in re.finditer(r"\.", paths[0]))]:
        drop, end = paths[0][:dot], paths[0][dot:]
        for module in modules:
            add = module.removesuffix(end)
            if f".{module}".endswith(f".{end}") and all(path.startswith(drop) for path in paths):
                renamed = tuple(add + path.removeprefix(drop) for path in paths)
                same_block = re.findall(r"\d+", drop) == re.findall(r"\d+", add)
                if same_block and all(path in modules for path in renamed):
                    choices[renamed] = drop, add
    if len(choices) != 1:
        return "", ""
    drop, add = next(iter(choices.values()))
    warnings.warn(f"The layers are called {drop}… in the file and {add}… here.", stacklevel=3)
    return drop, add


def _misfits(beside: Mapping[str, Tensor], tree: Tree) -> list[str]:
    """What is wrong with other tensors of a file: PEFT writes the base's embeddings there."""
    faults: list[str] = []
    other: list[str] = []
    for key, tensor in beside.items():
        path, _, name = key.rpartition(".")
        weight = getattr(tree.bases.get(path), name, None)
        if not isinstance(weight, Tensor):
            faults.append(f"{key}: left over")
        elif tensor.shape != weight.shape:
            shapes = f"{tuple(tensor.shape)}, this model's is {tuple(weight.shape)}"
            faults.append(f"{key} is {shapes}: resize the model first (resize_token_embeddings)")
        else:
            coarser = min(tensor.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
            if not torch.equal(tensor.to(coarser), weight.detach().cpu().to(coarser)):
                other.append(key)
    if other and not faults:
        warnings.warn(
            f"Not loaded: {', '.join(other[:3])} in the file, which differ from the model's. If "
            "they were trained, copy them into the model before.",
            stacklevel=3,
        )
    return faults


def _on_cpu(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()


def _card(base: str | None, notes: Mapping[str, object]) -> str:
    """A model card; the same adapter gives the same text."""
    lines = ["---", "library_name: peft", "tags:", "- lora"]
    if base and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base):  # a name on the Hub
        lines.insert(1, f"base_model: {base}")
    lines += ["---", _MARK, "# A LoRA adapter", "", "| | |", "|---|---|"]
    for name, value in {"base": base or "", **notes}.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"| {name} | {text} |")
    lines += ["", "`lora.load(model, folder)` and `peft.PeftModel.from_pretrained(model, folder)`"]
    return "\n".join(lines) + " put it on the base.\n"


def _warn_of_others(tree: Tree) -> None:
    """Warn of what was trained, or should have been, and is in no adapter and so in no file."""
    if heads := [name for name in HEADS if name in tree.bases and name not in tree.copies]:
        warnings.warn(
            f"Not saved: {heads[0]}, which a task's model draws at random. Train and save it by "
            f"lora.inject(modules_to_save={heads[0]!r}).",
            stacklevel=3,
        )
    updated = {p for module in tree.adapted.values() for p in module.updates.parameters()}
    others = [
        name
        for name, parameter in tree.root.named_parameters()
        if parameter.requires_grad and parameter not in updated
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(
            f"Not saved: {', '.join(others[:3])}{more} require grad, but are in no adapter. "
            "Name their modules in lora.inject(modules_to_save=...), or save them yourself.",
            stacklevel=3,
        )
