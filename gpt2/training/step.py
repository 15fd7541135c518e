"""One optimiser step: micro-batches, gradients, clip, AdamW; on a GPU as one CUDA graph."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch
from gpt2.data.order import seed_of
from gpt2.fast import devices
from gpt2.fast.compiling import blocks_run
from gpt2.fast.graphs import GraphedCalls
from gpt2.files import is_sharded, listed
from gpt2.model import GPT2
from gpt2.training import distributed
from gpt2.training.config import GRAPHED_TOKENS, OPTIONS, TrainConfig
from gpt2.training.losses import inner, summed_loss
from gpt2.training.watch import Watch

Groups = Sequence[Mapping[str, Any]]
Weights = Mapping[str, Tensor]


class Stepper:
    """Optimiser steps, without a wait; arguments as `gpt2.train`.

    No document of a packed row has more than `longest` tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        groups: Groups | None = None,
        longest: int | None = None,
    ) -> None:
        check_options(model, config)
        self.model, self.config, self.longest = model, config, longest
        self.network: Any = inner(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trained = list(self.parameters.values())

        self.device = self.trained[0].device
        self.sharded = is_sharded(self.trained[0])
        capturable = devices.on_cuda(self.device) and not self.sharded
        self.optimizer: Any = adamw(grouped(model, config, groups), self.device, capturable)
        self.peaks = [float(group["initial_lr"]) for group in self.optimizer.param_groups]
        self.graphs = GraphedCalls() if capturable and distributed.size() == 1 else None

        self.watch = Watch(self.network, self.trained)
        # On the device, the number of the first step that was not finite; 0 for none.
        self.failed = torch.zeros((), dtype=torch.float32, device=self.device)
        self.taken = 0  # steps, those before a resume included
        self.whole = True  # not in the midst of an update

    def __call__(self, batches: Sequence[Batch], step: int, scale: float = 1.0) -> Tensor:
        """Loss and gradient norm of a step, and the first step that failed, `(3,)` on the device.

        Where either is not finite all stays as it is, in later steps too. The step's number
        fixes its random numbers; `scale` is a factor of the learning rates.
        """
        self.watch.check()
        for p in self.trained:
            p.grad = None  # a caller's

        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * scale)
            else:
                group["lr"] = peak * scale

        share = (distributed.size() if self.sharded else 1) / sum(b.n_tokens for b in batches)
        facts = torch.tensor([share, step], dtype=torch.float32, device="cpu")
        known = devices.copied(facts, self.device)
        number = partial(seed_of, self.config.seed, step)
        with devices.own_generators(self.device) as seed, self._blocks_run():
            if self.graphs and self.is_graphed(batches[0].idx.numel()):
                inputs = known, *_inputs(batches[0], self.device)
                update = partial(self._replayed, self.graphs, partial(seed, number(0)), *inputs)
            else:
                losses: list[Tensor] = []
                in_order = distributed.adds_in_order(self.trained, self.config.accumulate)
                for i, batch in distributed.shares(batches, sharded=self.sharded):
                    seed(number(i))
                    loss = self._gradients(known, *_inputs(batch, self.device))
                    losses.append(distributed.row(self.trained, loss) if in_order else loss)
                loss = distributed.summed(self.trained, losses, len(batches), in_order=in_order)
                update = partial(self._update, loss, known)

            self.whole = False
            figures = update()
            self.taken, self.whole = self.taken + 1, True
        if self.watch.changes():  # as of a model that counts its calls
            self.watch.renew()
        return figures

    def is_graphed(self, tokens: int) -> bool:
        """Whether a step with a batch of so many tokens is a CUDA graph."""
        config = self.config
        if self.graphs is None or config.cuda_graph is not None:
            return self.graphs is not None and bool(config.cuda_graph)
        small = config.compile or tokens <= GRAPHED_TOKENS
        single = config.accumulate == 1 and not config.checkpointing
        return small and single and isinstance(self.model, GPT2)

    def state(self) -> dict[str, Any]:
        """Parameters by name, AdamW's moments by kind and name; the next step changes them."""
        moments = {
            f"{kind}.{name}": tensor
            for name, p in self.parameters.items()
            for kind, tensor in self.optimizer.state[p].items()
        }
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        return {"parameters": parameters, "moments": moments}

    @torch.no_grad()
    def resume(self, step: int, parameters: Weights, moments: Weights) -> None:
        """Go on from that state after that step."""
        fused = devices.has_fused_adamw(self.device)  # else the host counts the steps
        for name, p in self.parameters.items():
            p.copy_(parameters[name])
        for key, tensor in moments.items():
            kind, _, name = key.partition(".")
            home = self.device if kind != "step" or fused else torch.device("cpu")
            self.optimizer.state[self.parameters[name]][kind] = tensor.to(home, copy=True)
        self.taken = step

    def _replayed(self, graphs: GraphedCalls, seed: Callable[[], None], *inputs: Tensor) -> Tensor:
        graphs.prepare(self._step, self._state, *inputs)  # it may draw numbers
        seed()
        return graphs(self._step, self._state, *inputs).clone()

    def _step(self, known: Tensor, *inputs: Tensor) -> Tensor:
        return self._update(self._gradients(known, *inputs), known)

    def _gradients(self, known: Tensor, *inputs: Tensor) -> Tensor:
        """Add a micro-batch's gradients to the parameters'; gives its loss."""
        how: Any = {"smoothing": self.config.label_smoothing, "longest": self.longest}
        how["compile"] = self.config.compile and self.network is self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            loss = summed_loss(self.model, *inputs, **how) * known[0]
        if not loss.requires_grad:
            raise RuntimeError(
                "Nothing in the loss requires grad. Is the adapter disabled or merged?"
            )
        loss.backward()
        return loss.detach()

    def _update(self, loss: Tensor, known: Tensor) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.clip or math.inf)
        figures = torch.stack([loss, distributed.whole(norm).to(loss.dtype)])
        fails = ~figures.isfinite().all() & (self.failed == 0)
        self.failed.copy_(torch.where(fails, known[1], self.failed))
        if devices.skips_found_inf(self.device):
            # The fused optimiser does nothing where it is 1.
            self.optimizer.found_inf = self.failed.clamp(max=1)
            self.optimizer.step()
        elif not self.failed.item():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.cat([figures, self.failed[None].to(loss.dtype)])

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        states = self.optimizer.state.values()
        moments = [tensor for state in states for tensor in state.values()]
        return [self.failed, *(p.detach() for p in self.trained), *moments]

    def _blocks_run(self) -> Any:
        if not isinstance(self.network, GPT2):
            return nullcontext()
        compiles = self.config.compile and self.network is self.model
        checkpointing = self.config.checkpointing
        return blocks_run(self.network.transformer, compile=compiles, checkpointing=checkpointing)


def check_options(model: nn.Module, config: TrainConfig) -> None:
    """Raise a ValueError that names what cannot be done with this model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("Nothing in the model requires grad: inject an adapter.")
    network: Any = inner(model)
    device, is_gpt2 = trained[0].device, isinstance(network, GPT2)
    faults = distributed.faults(model, config)
    if config.checkpointing and not is_gpt2:
        faults.append("checkpointing=True needs a GPT2; another model checkpoints itself")
    if config.compile and not is_gpt2 and network is model:
        faults.append("compile=True needs a GPT2; give torch.compile(model) instead")
    if config.cuda_graph and not devices.on_cuda(device):
        faults.append(f"cuda_graph=True needs a CUDA device, and the model is on {device}")
    if config.packing and not is_gpt2:
        faults.append(f"packing takes a GPT-2, and the model is a {type(network).__name__}")
    elif config.packing and not devices.on_cpu(device) and network.config.attn_pdrop:
        faults.append(
            f"packing on {device.type} takes no dropout in attention: load the base with dropout=0"
        )
    if faults:
        raise ValueError(f"The model cannot be trained so: {'; '.join(faults)}.")


def grouped(model: nn.Module, config: TrainConfig, groups: Groups | None) -> list[dict[str, Any]]:
    """The groups with the config's options filled in; one of all parameters by default.

    Raises:
        ValueError: listing parameters in no group, or not trained, and bad options.
    """
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    usual = {name: getattr(config, name) for name in OPTIONS}
    made: list[dict[str, Any]] = []
    faults: list[str] = []

    for i, group in enumerate([{"params": trained}] if groups is None else groups):
        params = group["params"]
        made.append({**usual, **group})
        made[-1]["params"] = [params] if isinstance(params, nn.Parameter) else list(params)
        if unknown := group.keys() - {"params", *OPTIONS}:
            faults.append(f"group {i} has {', '.join(unknown)} (known: {', '.join(OPTIONS)})")
        try:
            replace(config, **{name: made[-1][name] for name in OPTIONS})
        except ValueError as error:
            faults.append(f"group {i}: {error}")

    given = {p for group in made for p in group["params"]}
    if lacking := [name for p, name in trained.items() if p not in given]:
        faults.append(f"in no group: {', '.join(lacking)}")
    if strangers := len(given - trained.keys()):
        faults.append(f"{strangers} parameters are not the model's, or require no grad")
    if faults:
        raise ValueError(f"groups: {listed(faults)}.")
    return made


_TORCHS: Any = torch.optim.AdamW


class AdamW(torch.optim.AdamW):
    """torch's, without the import of torch's compiler, which takes up to 5 s."""

    add_param_group: Any = inspect.unwrap(_TORCHS.add_param_group)
    zero_grad: Any = inspect.unwrap(_TORCHS.zero_grad)
    step: Any = torch.no_grad()(inspect.unwrap(_TORCHS.step))


def adamw(groups: list[dict[str, Any]], device: torch.device, capturable: bool) -> AdamW:
    """Fused where it can be: no interrupt then falls within a group."""
    for group in groups:
        group["initial_lr"] = group["lr"]
        if capturable:  # a tensor, so that a captured step reads the rate of the moment
            group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=device)
    return AdamW(groups, fused=devices.has_fused_adamw(device), capturable=capturable)


def _inputs(batch: Batch, device: torch.device) -> list[Tensor]:
    batch = batch.to(device)
    documents = [] if batch.documents is None else [batch.documents]
    return [batch.idx, batch.labels, *documents]
