"""The engine of plain PyTorch: FSDP2 or one device, gloo or NCCL."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule

from data.batch import Batch
from models.ahead import Ahead
from models.cores import approximate
from models.cores.merge import Core
from models.linear import full_precision
from models.mode import Mode
from models.model import Losses, Model, Scores
from models.sequence import Whole, local_readers
from parallel.apply import apply, defer_replicas, sum_gradients, total
from parallel.box import box_of, local
from train import optimizer
from train.config import Config
from train.meter import Clock
from train.ranks import Ranks
from train.statistics import Watch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Step(NamedTuple):
    """Scalars on the device, over the whole global batch. loss: cross-entropy alone, nats per scored token.

    extra: auxiliary losses. grad_norm: before clipping. loads: by layer with experts, [E] token copies by expert.
    lessons: [layers that are taught to choose, 2], divergence from the attention they imitate and share of its mass
    that the chosen hold, means over queries, or None. mtp_loss: of multi-token prediction, cross-entropy by depth, nats
    per token scored there, or None.
    """

    loss: Tensor
    extra: Tensor
    grad_norm: Tensor
    loads: dict[int, Tensor]
    lessons: Tensor | None
    mtp_loss: Tensor | None


class Evaluation(NamedTuple):
    """loss: nats per scored token. accuracy: share of scored tokens with the highest logit. tokens: scored.

    loss_by_position: of the tokens at positions edges[i] to edges[i + 1] - 1 in their document's piece; None without
    any.
    """

    loss: float
    accuracy: float
    tokens: int
    edges: list[int]
    loss_by_position: list[float | None]


class Engine:
    """One model, one optimizer, all ranks; empty until `initialise`. before_update: called in each step before anything
    of the state changes."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        train = config.train
        self.config, self.ranks = config, ranks
        self.mesh = config.parallel.mesh(ranks.world_size, ranks.device.type)
        with torch.device("meta"):
            model = Model(config.model, DTYPES[train.compute])
        self.wide = full_precision(model.compute_dtype)
        model.to(self.wide)
        core = importlib.import_module(f"models.cores.{train.core}")
        if hasattr(core, "check"):
            ranks.together(lambda: core.check(ranks.device))
        self.prepare = getattr(core, "prepare", None)
        self.slots = [slot for attention in model.trained_attentions() for slot in attention.slots()]
        self.leads = sorted({slot.lead for slot in self.slots if slot.kind == "entry"})
        self.core: Core = core.core
        for attention in model.trained_attentions():
            attention.core = self.core
        self.model = apply(
            model,
            self.mesh,
            recomputed=train.recompute,
            compile_blocks=train.compile,
            reshard_after_forward=config.parallel.reshard_after_forward,
        )
        self.approximated = approximate.cores(train.approximate, self.model.attentions())
        selectors = [part for attention in self.model.trained_attentions() for part in attention.selector()]
        self.selector = [parameter for part in selectors for parameter in part.parameters()]
        mine = set(self.selector)
        self.trunk = [parameter for parameter in self.model.parameters() if parameter not in mine]
        self.mode: Mode = "sparse"
        self.mtp_weight = train.first_mtp_weight
        settings = optimizer.read(config.optimizer)
        self.optimizer = settings.build(self.model, self.model.parametrization)
        self.before_update: Callable[[], None] = lambda: None

    def initialise(self, among: tuple[str, ...] = ("",)) -> None:
        """Give the model its first values: parameters whose names begin with one of `among`, all buffers. Before `load`
        nothing need be drawn that it overwrites."""
        self.model.initialise(self.config.train.seed, box_of, among)

    def set_mode(self, mode: Mode) -> None:
        """Between phases, as `mtp_weight`, the factor on multi-token prediction's loss. In a warm-up what chooses is
        trained alone: nothing else changes, router biases neither."""
        self.mode = mode
        for attention in self.model.trained_attentions():
            attention.mode = mode
        if not isinstance(self.model, FSDPModule):  # which settles at first use what wants a gradient: `step` drops it
            for parameter in self.trunk:
                parameter.requires_grad_(mode != "warmup")

    def _approximate(self, wanted: bool) -> None:
        """Training alone, and none that is to be dense or trains what chooses, reads less than all."""
        for attention, core in self.approximated:
            attention.core = core if wanted else self.core

    def watch(self) -> Watch:
        """For the statistics of the next step."""
        return Watch(self.model, self.mesh)

    def step(self, batch: Batch, learning_rate: float, clock: Clock, watch: Watch | None = None) -> Step:
        """One optimizer step over this rank's `batch`, in micro-batches; losses divide by global counts."""
        self._approximate(self.mode == "sparse")
        device = self.ranks.device
        # filled on the device: copying them from the host would wait for the step before
        own = [int(local_readers(batch.position, batch.document, lead)) for lead in self.leads]
        mine = (batch.count(), batch.ids.numel(), batch.ids.shape[0], *own)
        known_here = torch.stack([torch.full((), n, dtype=self.wide, device=device) for n in mine])
        batch, depth = batch.to(device, non_blocking=True), self.model.mtp_depth
        further = (batch.targets[1 : 1 + depth] >= 0).flatten(1).sum(1)
        counts = total(torch.cat((known_here, further.to(self.wide))), self.mesh)
        scored, known = counts[0].clamp_min(1), {"tokens": counts[1], "sequences": counts[2]}
        readers = dict(zip(self.leads, counts[3 : 3 + len(own)].clamp_min(1), strict=True))
        scored_ahead = counts[3 + len(own) :].clamp_min(1)
        sums = torch.zeros(2 + depth, dtype=self.wide, device=device)
        loads: dict[int, Tensor] = {}
        lessons: dict[int, Tensor] = {}
        micro_batches = list(_micro_batches(batch, self.config.train.micro_batch))
        for i, micro in enumerate(micro_batches):
            defer_replicas(self.model, i < len(micro_batches) - 1)
            ahead = Ahead(micro.ahead[:depth], micro.targets[1 : 1 + depth]) if depth else None
            losses = self.model(micro.ids, self._sequence(micro, known, readers), micro.targets[0], ahead=ahead)
            assert isinstance(losses, Losses)
            objective = losses.cross_entropy / scored + losses.extra
            if depth:
                objective = objective + self.mtp_weight * (torch.stack(losses.ahead) / scored_ahead).mean()
            objective.backward()
            sums += torch.stack([loss.detach() for loss in (losses.cross_entropy, losses.extra, *losses.ahead)])
            for layer, report in enumerate(losses.reports):
                if "load" in report:
                    loads[layer] = loads[layer] + report["load"] if layer in loads else report["load"]
                if "kl" in report:
                    lesson = torch.stack((report["kl"], report["recall"]))
                    lessons[layer] = lessons[layer] + lesson if layer in lessons else lesson
        if self.mode == "warmup":
            for parameter in self.trunk:
                parameter.grad = None
        sum_gradients(self.model, self.mesh)
        clock.mark("compute")
        if watch is not None:
            watch.backward_done()
        norm = self._clip()
        optimizer.set_learning_rate(self.optimizer, learning_rate)
        self.before_update()
        self.optimizer.step()
        if watch is not None:
            watch.updated()
        self.optimizer.zero_grad(set_to_none=True)
        total(sums, self.mesh)
        loads = self._total_loads(loads)
        if self.mode != "warmup":
            self.model.update_router_biases([loads.get(n) for n in range(len(self.model.trained_blocks()))])
        clock.mark("optimizer")
        mtp_loss = sums[2:] / scored_ahead if depth else None
        return Step(sums[0] / scored, sums[1], norm, loads, self._means(lessons), mtp_loss)

    def _clip(self) -> Tensor:
        """What chooses apart from all else: it learns from another loss, of another size. Returns the joint norm."""
        clip = self.config.train.clip
        trained = [part for part in (self.trunk, self.selector) if any(p.grad is not None for p in part)]
        norms = [optimizer.clip_gradients(part, float("inf") if clip is None else clip) for part in trained]
        return norms[0] if len(norms) == 1 else torch.stack(norms).norm()

    def _means(self, lessons: dict[int, Tensor]) -> Tensor | None:
        if not lessons:
            return None
        sums, queries = total(torch.stack(list(lessons.values())), self.mesh).unbind(-1)
        return sums / queries.clamp_min(1)

    def _total_loads(self, loads: dict[int, Tensor]) -> dict[int, Tensor]:
        """Over the ranks, all layers in one go."""
        if not loads:
            return {}
        parts = total(torch.cat(list(loads.values())), self.mesh).split([load.numel() for load in loads.values()])
        return dict(zip(loads, parts, strict=True))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Over all ranks' shares of `batches`, of which each rank has as many."""
        self._approximate(False)
        sums = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        edges, by_position = [0], sums.new_zeros(2, 0)
        for batch in batches:
            if len(edges) == 1:
                edges = position_edges(batch.ids.shape[1])
                by_position = sums.new_zeros(2, len(edges) - 1)
            for micro in _micro_batches(batch.to(self.ranks.device), self.config.train.micro_batch):
                scores = self.model(micro.ids, self._sequence(micro), micro.targets[0], score=True)
                assert isinstance(scores, Scores)
                scored = micro.targets[0] >= 0
                by_position += _by_position(scores.cross_entropy.double(), scored, micro.position, edges)
                sums += torch.stack(
                    (scores.cross_entropy.double().sum(), (scores.hit & scored).sum().double(), scored.sum().double())
                )
        loss, hits, tokens = total(sums, self.mesh).tolist()
        losses, counts = total(by_position, self.mesh).tolist()
        shares = [share / count if count else None for share, count in zip(losses, counts, strict=True)]
        return Evaluation(loss / max(tokens, 1), hits / max(tokens, 1), int(tokens), edges, shares)

    def _sequence(
        self, batch: Batch, counts: dict[str, Tensor] | None = None, readers: dict[int, Tensor] | None = None
    ) -> Whole:
        sequence = Whole(batch.position, batch.document, documents=batch.documents, counts=counts, readers=readers)
        if self.prepare is not None:
            self.prepare(sequence, self.slots)
        return sequence

    def is_finite(self) -> bool:
        """Whether all weights and optimizer state are, on every rank. Waits for the device."""
        tensors = [*self.model.parameters(), *(v for values in self.optimizer.state.values() for v in values.values())]
        parts = [part for part in map(local, tensors) if part.numel()]
        # sums of magnitudes, which a CPU has in a quarter of the time that the largest take
        sums = torch.stack([norm.double() for norm in torch._foreach_norm(parts, 1)])
        bad = (~sums.isfinite()).sum().to(torch.float32)
        return total(bad, self.mesh).item() == 0

    def state(self) -> dict[str, Any]:
        """Model and optimizer by parameter name, each rank its part."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optim}

    def load(self, state: dict[str, Any]) -> None:
        """As `state` returned it, for the same configuration on any layout."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def load_weights(self, weights: dict[str, Any]) -> None:
        """The weights alone; the optimizer starts anew."""
        set_model_state_dict(self.model, weights)


def position_edges(length: int) -> list[int]:
    """0, 1, 2, 4, 8, … and `length`: where the stretches of positions begin of which the loss is told apart."""
    return [0, *(2**power for power in range((length - 1).bit_length())), length]


def _by_position(losses: Tensor, scored: Tensor, position: Tensor, edges: list[int]) -> Tensor:
    """losses, scored, position: [B, S]. Returns [2, stretches]: sums of the scored losses, and how many they are."""
    inner = torch.tensor(edges[1:-1], device=position.device)
    stretch = torch.bucketize(position.flatten(), inner, right=True)
    member = torch.nn.functional.one_hot(stretch, len(edges) - 1).to(losses.dtype)  # a product adds up in one order
    return torch.stack((losses.flatten() * scored.flatten(), scored.flatten().to(losses.dtype))) @ member


def _micro_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """Cut along the rows. What the host knows of the whole batch holds for its parts too, except the count."""
    for start in range(0, batch.ids.shape[0], rows):
        part = slice(start, start + rows)
        yield Batch(
            batch.ids[part],
            batch.targets[:, part],
            batch.ahead[:, part],
            batch.position[part],
            batch.document[part],
            -1,
            batch.documents,
            batch.digest,
        )
