"""What becomes of a model between two steps: seen, so that no step goes on with another model.

An optimiser holds parameters and a captured CUDA graph holds addresses. Neither hears of an adapter
that is switched, merged or taken out, or of a tensor that moves; they would go on without effect.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, cast

import torch
from torch import nn

KINDS = {"_modules": "module", "_buffers": "buffer", "_parameters": "parameter"}


class Watch:
    """A model's trained parameters, the modules that own them and all modules above these.

    Their children, buffers, parameters and plain attributes are compared with what they were at
    the end of the last step. What a caller changes and puts back in between is not seen. Modes,
    hooks and attributes that begin with `_` are not watched.

    Args:
        model: what is trained.
        parameters: those of its parameters that are.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        trained = {id(p) for p in parameters}
        self.parameters = {n: p for n, p in model.named_parameters() if id(p) in trained}
        above = {""}
        for name in self.parameters:
            parts = name.split(".")[:-1]
            above |= {".".join(parts[: i + 1]) for i in range(len(parts))}
        self.modules = {path: m for path, m in model.named_modules() if path in above}
        self.renew()

    def renew(self) -> None:
        """Take the model as it is for what it should be."""
        self.seen = {path: _attributes(module) for path, module in self.modules.items()}
        # The same once more, flat: comparing it takes hardly a line of Python a module.
        own = [vars(module) for module in self.modules.values()]
        names = [_watched(attributes) for attributes in own]
        self.getters = [(itemgetter(*n), d) for n, d in zip(names, own, strict=True) if n]
        self.values = [get(attributes) for get, attributes in self.getters]
        # Containers are compared by content too, since they can be changed where they are.
        self.live = [d[n] for ns, d in zip(names, own, strict=True) for n in ns if _holds(d[n])]
        self.then = [container.copy() for container in self.live]
        self.places = self._places()

    def renew_after_step(self) -> None:
        """Take over what the step itself changed, such as a count of calls."""
        if not self._is_as_it_was():
            self.renew()

    def check(self) -> None:
        """Look whether the model is as it was.

        Raises:
            RuntimeError: it is not; with the first few differences.
        """
        if self._is_as_it_was():
            return
        if found := self._differences():
            shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if found[3:] else "")
            raise RuntimeError(
                f"The model was changed between two steps: {shown}. "
                "Put it back, or end this run and call train again."
            )
        self.renew()

    def _is_as_it_was(self) -> bool:
        try:
            return (
                [get(attributes) for get, attributes in self.getters] == self.values
                and self.live == self.then
                and self._places() == self.places
            )
        except Exception:  # an attribute is gone, or tensors differ, which torch does by element
            return False

    def _places(self) -> list[tuple[int, bool]]:
        return [(p.data_ptr(), p.requires_grad) for p in self.parameters.values()]

    def _differences(self) -> list[str]:
        found: list[str] = []
        for path, module in self.modules.items():
            now, where = _attributes(module), path or type(module).__name__
            for name, then in self.seen[path].items():
                if name not in now or not _same(then, now[name]):
                    found += _described(where, name, then, now.get(name))
        for (name, p), (place, grad) in zip(self.parameters.items(), self.places, strict=True):
            if p.data_ptr() != place:
                found.append(f"{name} lies elsewhere in memory")
            if p.requires_grad != grad:
                found.append(f"{name}.requires_grad is now {p.requires_grad}")
        return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What is watched of a module, containers copied."""
    own = vars(module)
    return {name: own[name].copy() if _holds(own[name]) else own[name] for name in _watched(own)}


def _holds(value: Any) -> bool:
    return type(value) in (dict, list, set)


def _watched(own: dict[str, Any]) -> list[str]:
    plain = [name for name in own if not name.startswith("_") and name != "training"]
    return plain + [name for name in KINDS if own[name]]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        ours, theirs = cast(dict[Any, Any], one), cast(dict[Any, Any], other)
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    try:
        return bool(one == other)
    except Exception:  # an array, or whatever else has no one answer
        return False


def _described(where: str, name: str, then: Any, now: Any) -> list[str]:
    if name in KINDS:
        now = now or {}
        return [
            f"{where}.{key} is another {KINDS[name]}"
            for key in {**then, **now}
            if then.get(key) is not now.get(key)
        ]
    return [f"{where}.{name} was {_short(then)} and is {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
