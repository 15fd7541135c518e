"""Whether a model is changed between two steps.

An optimiser holds parameters, a captured CUDA graph addresses. If an adapter is switched, merged
or taken out, or a tensor moves, they would go on without effect.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from torch import nn

from gpt2.files import listed

CHILDREN = ("_modules", "_buffers", "_parameters")


class Watch:
    """A model's trained parameters, their modules and all modules above these.

    Their children, buffers, parameters and plain attributes are to be as the last step left
    them; modes, hooks and attributes that begin with `_` may differ.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        ids = {id(p) for p in trained}
        self.trained = {n: p for n, p in model.named_parameters() if id(p) in ids}
        owners = tuple(name.rpartition(".")[0] + "." for name in self.trained)
        above = [p for p, _ in model.named_modules() if any(o.startswith(f"{p}.") for o in owners)]
        self.modules = {path: vars(model.get_submodule(path)) for path in ("", *above)}
        self.renew()

    def renew(self) -> None:
        """Take the model as it is for what it should be."""
        self.names = {
            path: [n for n in attrs if not n.startswith("_") and n != "training"]
            + [n for n in CHILDREN if attrs[n]]
            for path, attrs in self.modules.items()
        }
        # Looking takes hardly a line of Python a module.
        self.rows = [(itemgetter(*n, n[0]), self.modules[path]) for path, n in self.names.items()]
        self.seen = [tuple(map(_copied, get(attrs))) for get, attrs in self.rows]
        self.where = self._where()

    def is_as_it_was(self) -> bool:
        """Whether the model is what it was."""
        try:
            now = [get(attrs) for get, attrs in self.rows]
            return now == self.seen and self._where() == self.where
        except (KeyError, RuntimeError, ValueError):
            return False  # an attribute is gone, or is a tensor

    def check(self) -> None:
        """A RuntimeError names what is not as it was."""
        if self.is_as_it_was():
            return
        pairs = zip(self.trained, self._where(), self.where, strict=True)
        changed = [name for name, now, then in pairs if now != then]
        for (path, names), seen in zip(self.names.items(), self.seen, strict=True):
            attrs = self.modules[path]
            for name, then in zip(names, seen, strict=False):
                if not _same(attrs.get(name), then):
                    changed.append(f"{path}.{name}".lstrip("."))
        raise RuntimeError(
            f"The model was changed between two steps: {listed(changed)}. "
            "Put it back, or end this run and call train again."
        )

    def _where(self) -> list[tuple[int, bool]]:
        return [(p.data_ptr(), p.requires_grad) for p in self.trained.values()]


def _copied(value: Any) -> Any:
    """The value; of a container, which can be changed where it is, its content."""
    return value.copy() if type(value) in (dict, list, set) else value


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):  # a tensor or an array has no one answer
        return False
