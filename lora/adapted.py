"""What every adapted module has: its base, what adapters put beside it, and which are in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora.untyped import on_state_dict


@dataclass(frozen=True)
class Origin:
    """What `eject` puts back; all adapted modules of a model share one.

    Args:
        thawed: the parameters that were trainable before, each as its module and its name there.
        tied: the layers whose weight was shared, each with a module that has the shared one too,
            and its name there.
    """

    thawed: tuple[tuple[nn.Module, str], ...] = ()
    tied: tuple[tuple[nn.Module, nn.Module, str], ...] = ()


class Adapted(nn.Module):
    """A frozen base module, and beside it what any number of adapters add.

    The base is the very module that stood here. In a state dict it keeps its own keys, so that the
    state dict of an adapted model is the base's, and the adapters' under `updates` more.

    Args:
        base: the module.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleDict()  # by the adapter's name
        self.active: Mapping[str, float] = {}  # by name: the weight in the sum. `activate` writes
        self.resting: Mapping[str, tuple[str, ...]] = {}  # what trains again. `train_only` writes
        self.pauses: tuple[object, ...] = ()  # open contexts of `lora.disabled`. `pause` writes
        self.enabled = True  # whether there is none; compiled code looks at nothing else
        self.origin = Origin()  # written when an adapter is attached
        on_state_dict(self, after=_with_the_bases_keys, before_load=_from_the_bases_keys)
        self.train(base.training)

    def activate(self, weights: Mapping[str, float]) -> None:
        """Put those of the named adapters that this module has in force; only they train."""
        # In the order of names: the sum is then the same bits however the mixture was written.
        self.active = {name: weights[name] for name in sorted(weights) if name in self.updates}
        self.train_only(self.active)

    def train_only(self, names: Mapping[str, object]) -> None:
        """Freeze all other adapters; one that was frozen so trains again what it trained before.

        What a user froze in an adapter stays frozen.
        """
        for name, update in self.updates.items():
            if name in names and name in self.resting:
                for key in self.resting[name]:
                    update.get_parameter(key).requires_grad_(True)
                self.resting = {n: keys for n, keys in self.resting.items() if n != name}
            elif name not in names:
                if name not in self.resting:
                    trained = tuple(k for k, p in update.named_parameters() if p.requires_grad)
                    self.resting = {**self.resting, name: trained}
                # Looked at again, since Ctrl-C may have left it trainable.
                if any(update.get_parameter(key).requires_grad for key in self.resting[name]):
                    update.requires_grad_(False)

    def pause(self, context: object, *, begins: bool) -> None:
        """Begin or end a context of `lora.disabled`; contexts may overlap in any order."""
        others = tuple(pause for pause in self.pauses if pause is not context)
        self.pauses = (*others, context) if begins else others
        self.enabled = not self.pauses

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        self.activate({n: w for n, w in self.active.items() if n != name})
        self.resting = {n: keys for n, keys in self.resting.items() if n != name}
        del self.updates[name]

    def __getstate__(self) -> dict[str, Any]:
        """Copies are outside of the contexts that this module is in."""
        return {**vars(self), "pauses": (), "enabled": True}


def _with_the_bases_keys(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: object
) -> None:
    """After `state_dict`: the base's tensors under the keys that they had before injection."""
    own = [key for key in state if key.startswith(f"{prefix}updates.")]
    for key in [key for key in state if key.startswith(f"{prefix}base.")]:
        state[prefix + key.removeprefix(f"{prefix}base.")] = state.pop(key)
    for key in own:  # after the base's
        state[key] = state.pop(key)


def _from_the_bases_keys(
    module: nn.Module, state: dict[str, Any], prefix: str, *others: object
) -> None:
    """Before `load_state_dict`: the reverse."""
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(f"{prefix}updates.")]:
        state[f"{prefix}base.{key.removeprefix(prefix)}"] = state.pop(key)
