"""Whether a model is changed between two steps.

An optimiser holds parameters, a captured CUDA graph addresses: an adapter that is switched,
merged or taken out, or a tensor that moves, would go on without effect.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from torch import nn

from gpt2.files import listed

CHILDREN = ("_modules", "_buffers", "_parameters")


class Watch:
    """The trained parameters, their modules, and the modules above these.

    Modes, hooks and attributes that begin with `_` may change.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        ids = {id(p) for p in trained}
        parts = [name.split(".") for name, p in model.named_parameters() if id(p) in ids]
        above = {".".join(path[:i]) for path in parts for i in range(len(path))}
        self.trained = trained
        self.modules = {path: vars(model.get_submodule(path)) for path in sorted(above)}
        self.renew()

    def renew(self) -> None:
        """Take the model as it is for what it should be."""
        self.places = self._places()
        self.seen: list[tuple[str, Any, Any]] = []
        for path, attrs in self.modules.items():
            names = [n for n in attrs if n in CHILDREN or not (n[0] == "_" or n == "training")]
            values = tuple(_copied(attrs[name]) for name in names)
            self.seen.append((path, itemgetter(*names), values))

    def changes(self) -> list[str]:
        """The names of what is not as it was."""
        changed = ["the trained parameters"] if self._places() != self.places else []
        for path, get, then in self.seen:
            try:
                is_same = get(self.modules[path]) == then
            except (KeyError, RuntimeError, ValueError):
                is_same = False  # an attribute is gone, or is a tensor
            if not is_same:
                changed.append(path or "the model")
        return changed

    def check(self) -> None:
        """Raise a RuntimeError that names what is not as it was."""
        if changed := self.changes():
            raise RuntimeError(
                f"The model was changed between two steps: {listed(changed)}. "
                "Put it back, or end this run and call train again."
            )

    def _places(self) -> list[tuple[int, bool]]:
        return [(p.data_ptr(), p.requires_grad) for p in self.trained]


def _copied(value: Any) -> Any:
    """The value; of a container, which can be changed where it is, its content."""
    return value.copy() if type(value) in (dict, list, set) else value
