"""One optimiser step: micro-batches, gradients, clip, AdamW; on a GPU as one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.data.batches import Batch
from gpt2.fast import devices
from gpt2.fast.compiling import blocks_run
from gpt2.fast.graphs import GraphedCalls
from gpt2.model import GPT2
from gpt2.training import distributed, summing
from gpt2.training.checks import check_options
from gpt2.training.config import GRAPHED_TOKENS, TrainConfig
from gpt2.training.groups import Groups, adamw
from gpt2.training.packing import undropped
from gpt2.training.randomness import RandomState
from gpt2.training.watch import Watch
from gpt2.training.wrapped import inner, summed_loss


class Stepper:
    """One optimiser step after another on a model's trainable parameters, nothing asked of the GPU.

    Args:
        model: in training mode; only it is called, so that a wrapper around a GPT-2 is in force.
        config: how to step; order and number of the steps are the caller's.
        groups: optimiser groups, if not all parameters are to have the same options.
        longest: no document of a packed row has more tokens; the context's length, if not given.

    Attributes:
        parameters: what is trained, by name.
        optimizer: the AdamW; its groups' `lr` are those of the last step.
        peaks: each group's own learning rate, before the schedule.
        failed: 1 on the device after a step whose loss or gradient was not finite, else 0.
        taken: how many steps the weights have taken, all runs that were gone on with included.
        whole: whether weights and moments are of step `taken`; not in the midst of an update.
        graphs: the captured steps, None where they cannot be captured.

    Raises:
        ValueError: groups that do not fit; options that the model or its device cannot follow.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        groups: Groups | None = None,
        longest: int | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self._trained = list(self.parameters.values())
        self._how, full = check_options(model, config, groups)
        self._longest = longest
        self._sums = summing.sums(self._trained, config)
        sharded = isinstance(self._sums, summing.Sharded)
        self.optimizer: Any = adamw(full, self.device, capturable=not sharded)
        self.peaks = [float(group["initial_lr"]) for group in self.optimizer.param_groups]
        self.optimizer.zero_grad()  # of what the caller, or a run that was cut short, left
        self.failed = torch.zeros((), dtype=torch.float32, device=self.device)
        self.taken, self.whole = 0, True
        capturable = devices.on_cuda(self.device) and not sharded
        self.graphs = GraphedCalls() if capturable else None
        self._updates = GraphedCalls()
        self._randomness = RandomState(config.seed, self.device)
        self._network: Any = inner(model)
        self._undropped = undropped(self._network, config)
        self._watch = Watch(self._network, self._trained)

    def __call__(self, batches: Sequence[Batch], step: int, scale: float = 1.0) -> Tensor:
        """Take a step; gives its loss and gradient norm, `(2,)`, still on the device.

        Where either is not finite the parameters and the optimiser stay as they are, for good: the
        caller may look only some steps later.

        Args:
            batches: the micro-batches.
            step: its number, which fixes the step's random numbers.
            scale: factor of each group's learning rate.

        Raises:
            RuntimeError: the model was changed since the last step, or nothing that is trained has
                a part in the loss.
        """
        self._watch.check()
        if any(p.grad is not None for p in self._trained):  # a caller's, who called backward
            self.optimizer.zero_grad()
        self._set_learning_rates(scale)
        n_tokens = sum(batch.n_tokens for batch in batches)
        share = torch.full((), self._sums.scale / n_tokens, dtype=torch.float32, device=self.device)
        own = self._sums.begin(batches)
        with self._randomness, self._in_force():
            if self.graphs is not None and self._is_graphed(batches):
                if isinstance(self._sums, summing.Alone):
                    return self._replayed(self.graphs, batches[0], step, share)
                return self._replayed_together(self.graphs, own, step, share)
            for row, (i, batch) in enumerate(own):
                batch = batch.to(self.device)
                self._randomness.begin(step, i)
                self._sums.take(row, self._backward(share, *_inputs(batch)))
            loss = self._sums.total()
            with self._counted():
                figures = self._update(loss)
        self._watch.renew_after_step()
        return figures

    def forget_graphs(self) -> None:
        """Drop what was captured, and its memory: the next step captures anew."""
        if self.graphs is not None:
            self.graphs, self._updates = GraphedCalls(), GraphedCalls()

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state by its kind and the parameter's name; empty before a step."""
        state = self.optimizer.state
        return {
            f"{kind}.{name}": tensor
            for name, p in self.parameters.items()
            for kind, tensor in state[p].items()
        }

    def resume(self, taken: int, moments: Mapping[str, Tensor]) -> None:
        """Go on after step `taken`, whose moments these are."""
        for key, tensor in moments.items():
            kind, _, name = key.partition(".")
            fused = devices.has_fused_adamw(self.device)  # else the host counts the steps
            home = self.device if kind != "step" or fused else torch.device("cpu")
            p, tensor = self.parameters[name], tensor.to(home, copy=True)
            self.optimizer.state[p][kind] = (
                distributed.as_part(tensor, p) if tensor.dim() else tensor
            )
        self.taken = taken

    @contextmanager
    def _counted(self) -> Generator[None]:
        self.whole = False
        yield
        self.taken += 1
        self.whole = True

    def _backward(self, share: Tensor, *inputs: Tensor) -> Tensor:
        how: Any = {"smoothing": self.config.label_smoothing, "longest": self._longest}
        how["compile"] = self._how.get("compile", False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            loss = summed_loss(self.model, *inputs, **how) * share
        if not loss.requires_grad:
            raise RuntimeError(
                "No parameter that requires grad has a part in the loss. Is what you train "
                "switched off, such as an adapter that is disabled or merged?"
            )
        loss.backward()
        return loss.detach()

    def _update(self, loss: Tensor) -> Tensor:
        norm = distributed.whole(
            nn.utils.clip_grad_norm_(self._trained, self.config.clip or math.inf)
        )
        figures = torch.stack([loss, norm.to(loss.dtype)])
        self.failed.copy_(torch.maximum(self.failed, (~figures.isfinite().all()).float()))
        if devices.skips_found_inf(self.device):
            # The fused optimiser reads this flag on the device and does nothing where it is 1.
            self.optimizer.found_inf = self.failed
            self.optimizer.step()
        elif not self.failed.item():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return figures

    def _replayed(self, graphs: GraphedCalls, batch: Batch, step: int, share: Tensor) -> Tensor:
        batch = batch.to(self.device)
        inputs = share, *_inputs(batch)
        with self._counted():
            graphs.prepare(self._step, self._state, *inputs)  # it may draw numbers of its own
            self._randomness.begin(step, 0)
            return graphs(self._step, self._state, *inputs).clone()

    def _replayed_together(
        self, graphs: GraphedCalls, own: list[tuple[int, Batch]], step: int, share: Tensor
    ) -> Tensor:
        """As `_replayed`; what processes do together is a graph of its own.

        It has one shape, so that all capture it in the same step, whatever the batch each has.
        """
        for i, batch in own:  # at most one
            inputs = share, *_inputs(batch.to(self.device))
            graphs.prepare(self._gradients, self._sums.state, *inputs)
            self._randomness.begin(step, i)
            graphs(self._gradients, self._sums.state, *inputs)
        with self._counted():
            return self._updates(self._update_together, self._shared_state).clone()

    def _gradients(self, share: Tensor, *inputs: Tensor) -> Tensor:
        loss = self._backward(share, *inputs)
        self._sums.take(0, loss)
        return loss

    def _update_together(self) -> Tensor:
        return self._update(self._sums.total())

    def _step(self, share: Tensor, *inputs: Tensor) -> Tensor:
        return self._update(self._backward(share, *inputs))

    def _is_graphed(self, batches: Sequence[Batch]) -> bool:
        if self.config.cuda_graph is None:
            small = self.config.compile or batches[0].idx.numel() <= GRAPHED_TOKENS
            single = self.config.accumulate == distributed.size() and not self.config.checkpointing
            return small and single and isinstance(self.model, GPT2)
        return self.config.cuda_graph

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return [self.failed, *(p.detach() for p in self._trained), *moments]

    def _shared_state(self) -> list[Tensor]:
        return [*self._sums.state(), *self._state()]  # in this order: moments appear in a trial

    def _set_learning_rates(self, scale: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * scale)
            else:
                group["lr"] = peak * scale

    @contextmanager
    def _in_force(self) -> Generator[None]:
        """The GPT-2 within all wrappers computes as the config says, and after as before."""
        p = [attention.attn_pdrop for attention in self._undropped]
        with ExitStack() as stack:
            if self._how:
                stack.enter_context(blocks_run(self._network.transformer, **self._how))
            try:
                for attention in self._undropped:
                    attention.attn_pdrop = 0.0
                yield
            finally:
                for attention, before in zip(self._undropped, p, strict=True):
                    attention.attn_pdrop = before


def _inputs(batch: Batch) -> list[Tensor]:
    return [batch.idx, batch.labels, *([] if batch.documents is None else [batch.documents])]
