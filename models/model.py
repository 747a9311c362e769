"""The whole model: embedding, blocks, final norm, head; and beside them what predicts further ahead in training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conf.schema import Refused
from models import initial, loss, norm
from models.ahead import Ahead, Config, Made, Prediction
from models.block import AttentionSublayer, Block, FeedForwardSublayer, Sublayer, Writer
from models.box import Box, whole
from models.config import Layer, ModelConfig, resolve, resolve_mtp, resolve_residual
from models.contract import Attention, Ends, FeedForward, Preamble, Report, Residual, Sequence
from models.linear import Linear
from models.parameter import Module, Parametrization, named_specs
from models.positions import Positions
from models.stream import Stream


class Losses(NamedTuple):
    """cross_entropy: sum over the scored tokens in hand, nats. extra: auxiliary losses, each ÷ its global count.

    The objective is cross_entropy ÷ scored tokens of the global batch + extra. reports: by layer, then of the modules
    of multi-token prediction. ahead: its cross-entropies, by depth, where it was run.
    """

    cross_entropy: Tensor
    extra: Tensor
    reports: list[Report]
    ahead: list[Tensor]


class Scores(NamedTuple):
    """Per token, [B, S]: cross-entropy in nats (0 where not scored), and whether the target has the highest logit."""

    cross_entropy: Tensor
    hit: Tensor


class Embedding(Module):
    """Rows by token id."""

    weight: Tensor

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.declare("weight", (vocab, width), ("vocab", "width"), "embedding")

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype)


class Model(nn.Module):
    """Built on the current default device, uninitialised; `initialise` fills it.

    compute_dtype: of activations and matrix products. Parameters keep their own dtype, and those declared fp32 are
    computed in it whatever this says. parametrization: how the parameters start and are optimised.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        residual = resolve_residual(config)
        self.embedding = Embedding(config.vocab, config.width)
        self.positions = None if config.positions is None else Positions(config.positions, config.width)
        layers = resolve(config)
        self.preambles = nn.ModuleList(_preambles(layers))
        self.ends = residual.ends(config.width)
        self.blocks = nn.ModuleList(_block(i, layer, residual, config) for i, layer in enumerate(layers))
        self.norm = norm.build(config.norm, config.width, config.norm_eps)
        self.head = None if config.tied else Linear(config.width, config.vocab, ("vocab", "width"), "head")
        further = resolve_mtp(config)
        self.mtp_depth: int = 0 if further is None else further[0].depth
        self.mtp = nn.ModuleList(() if further is None else _predictions(*further, len(layers), residual, config))
        _refuse_misread(self.attention_sublayers())
        _refuse_unknown_ids(self.feedforwards(), config.vocab)
        self.compute_dtype = compute_dtype or torch.get_default_dtype()
        self.parametrization = Parametrization(std=config.std, num_layers=len(layers))
        at_start = {"ids", "embedding"}.union(*(preamble.provides for preamble in self.preambles))  # type: ignore[arg-type]
        self.live = _mark_live(self.depths(), at_start, "model.layers")

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        """Told to the residual too, whose stream may be wider."""
        self._compute_dtype = dtype
        for module in self.modules():
            if isinstance(module, Residual | Ends):
                module.compute_dtype = dtype

    def depths(self) -> list[Block]:
        """The blocks, in order of depth."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def trained_blocks(self) -> list[Block]:
        """The blocks in order of depth, then those of multi-token prediction."""
        return self.depths() + [module.block for module in self.mtp if isinstance(module, Prediction)]

    def trained_names(self) -> list[str]:
        """Of the trained blocks, for people: the depth from 0 on, or how many further tokens multi-token prediction is
        at, from 1 on; of one module for all of these, their range."""
        whole = self.mtp_depth > len(self.mtp)
        ahead = [f"mtp 1-{self.mtp_depth}"] if whole else [f"mtp {depth}" for depth in range(1, self.mtp_depth + 1)]
        return [str(depth) for depth in range(len(self.blocks))] + ahead

    def units(self) -> list[nn.Module]:
        """What is compiled and sharded whole: the blocks, and the modules of multi-token prediction."""
        return [*self.blocks, *self.mtp]

    def attention_sublayers(self) -> list[AttentionSublayer]:
        """In order of depth, without multi-token prediction's: a model that generates has no others."""
        return [module for module in self.blocks.modules() if isinstance(module, AttentionSublayer)]

    def attentions(self) -> list[Attention]:
        """The schemes, in order of depth, without multi-token prediction's."""
        return [sublayer.attention for sublayer in self.attention_sublayers()]

    def writers(self) -> list[Attention]:
        """The schemes of the writers that stand alone."""
        return [sublayer.alone.scheme for sublayer in self.attention_sublayers() if sublayer.alone is not None]

    def trained_attentions(self) -> list[Attention]:
        """The schemes of every block that is trained."""
        found = [module for block in self.trained_blocks() for module in block.sublayers()]
        return [sublayer.attention for sublayer in found if isinstance(sublayer, AttentionSublayer)]

    def feedforwards(self) -> list[FeedForward]:
        """All that tokens go through by themselves, injections too, in order of depth, without multi-token
        prediction's."""
        return [module.feedforward for module in self.blocks.modules() if isinstance(module, FeedForwardSublayer)]

    def residuals(self) -> list[Residual]:
        """Of every sublayer, in order of depth, without multi-token prediction's."""
        return [module for module in self.blocks.modules() if isinstance(module, Residual)]

    @torch.no_grad()
    def initialise(self, seed: int, here: Callable[[Tensor], Box] = whole, among: tuple[str, ...] = ("",)) -> None:
        """Fill every parameter by its role, and every buffer as its owner says: the same in every layout.

        here: the box of a parameter that this process holds, and fills. among: what the names of the parameters begin
        with that are filled at all; of the others, somebody else knows the values.
        """
        for name, parameter, spec in named_specs(self):
            if name.startswith(among):
                initial.fill(here(parameter), spec, self.parametrization, seed, name)
        for name, module in self.named_modules():
            if isinstance(module, Module):
                module.start_buffers(initial.generator(seed, name))

    def forward(
        self,
        ids: Tensor,
        sequence: Sequence,
        targets: Tensor | None = None,
        *,
        ahead: Ahead | None = None,
        score: bool = False,
    ) -> Tensor | Losses | Scores:
        """ids: [B, S]. Without targets: logits [B, S, V] in fp32. With targets [B, S]: Losses, or Scores if `score`.
        ahead: for multi-token prediction, which is not run without."""
        stream = self.enter(ids, sequence)
        reports = []
        for layer, block in enumerate(self.blocks):
            stream, report = block(stream, sequence.at(layer))
            reports.append(report)
        hidden = self.norm(self.ends.leave(stream.residual))
        weight = self.embedding.weight if self.head is None else self.head.weight
        cap = self.config.logit_cap
        if targets is None:
            return loss.capped(F.linear(hidden, weight.to(hidden.dtype)), cap)
        flat, flat_targets = hidden.flatten(0, 1), targets.flatten()
        if score:
            return Scores(*(value.view_as(targets) for value in loss.score(flat, weight, flat_targets, cap)))
        losses = Losses(loss.cross_entropy(flat, weight, flat_targets, cap), stream.extra, reports, [])
        return losses if ahead is None else self._look_ahead(losses, Made(stream.residual, hidden), ahead, sequence)

    def _look_ahead(self, losses: Losses, made: Made, ahead: Ahead, sequence: Sequence) -> Losses:
        """`losses` with those of multi-token prediction. made: of the last block."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        extra, further = losses.extra, []
        reports: list[Report] = [*losses.reports, *({} for _ in self.mtp)]
        for depth, (ids, targets) in enumerate(zip(ahead.ids, ahead.targets, strict=True)):
            which = depth % len(self.mtp)  # of one module for all depths, that one
            layer = len(self.blocks) + which
            # zeros, so that nothing of the next document is seen
            embedded = self._embed(ids.clamp_min(0)) * (ids >= 0)[..., None]
            made, more, report = self.mtp[which](made, embedded, sequence.at(layer))
            further.append(
                loss.cross_entropy(made.hidden.flatten(0, 1), weight, targets.flatten(), self.config.logit_cap)
            )
            extra, before = extra + more, reports[layer]
            reports[layer] = {name: value + before[name] if before else value for name, value in report.items()}
        return Losses(losses.cross_entropy, extra, reports, further)

    def _embed(self, ids: Tensor) -> Tensor:
        """ids: [B, S]. Returns [B, S, D], scaled."""
        embedded: Tensor = self.embedding(ids, self.compute_dtype)
        if self.config.embedding_scale != 1.0:
            embedded = embedded * torch.tensor(self.config.embedding_scale, dtype=embedded.dtype).item()
        return embedded

    def enter(self, ids: Tensor, sequence: Sequence) -> Stream:
        """ids: [B, S]. What the first block is handed."""
        embedded = self._embed(ids)
        carried: dict[str, Any] = {"ids": ids, "embedding": embedded}
        for preamble in self.preambles:
            carried |= preamble(ids, embedded)
        live = {name: value for name, value in carried.items() if name in self.live}
        placed = embedded if self.positions is None else self.positions(embedded, sequence)
        return Stream.start(self.ends.enter(placed), live)

    def refuse_longer(self, tokens: int) -> None:
        """Raises Refused where a row of so many tokens is longer than the model can read."""
        if self.positions is not None:
            self.positions.refuse_longer(tokens)

    def update_router_biases(self, loads: list[Tensor | None]) -> None:
        """One step of each trained block's selection bias; loads: by block, [E] over the global batch, None without
        experts."""
        for block, load in zip(self.trained_blocks(), loads, strict=True):
            if load is not None:
                block.update_bias(load)


def _block(index: int, layer: Layer, residual: Any, config: ModelConfig) -> Block:
    def around() -> tuple[Residual, nn.Module, nn.Module | None]:
        """The residual and the norms of one sublayer."""
        before, after = (norm.build(config.norm, config.width, config.norm_eps) for _ in range(2))
        return residual.build(config.width), before, after if config.post_norm else None

    alone = None
    if layer.alone:
        of_its_own = norm.build(config.norm, config.width, config.norm_eps)
        alone = Writer(of_its_own, layer.attention.build(config.width, reads=False))
    try:
        attention = layer.attention.build(config.width, writes=layer.writer == index and not layer.alone)
    except ValueError as error:
        raise Refused(f"model.layers: layer {index} cannot be: {error}.") from error
    sublayers: dict[str, Sublayer] = {
        "attention": AttentionSublayer(attention, index, layer.writer, *around(), alone),
        "feedforward": FeedForwardSublayer(layer.feedforward.build(config.width), *around()),
    }
    if layer.injection is not None:
        sublayers["injection"] = FeedForwardSublayer(layer.injection.build(config.width, config.vocab), *around())
    return Block(sublayers, scaled=config.block_scale)


def _predictions(scheme: Config, layer: Layer, num_layers: int, residual: Any, config: ModelConfig) -> list[Prediction]:
    """Of multi-token prediction. Raises Refused where their layer reads what the model's own alone are given."""
    made = []
    for index in range(num_layers, num_layers + scheme.modules):
        block = _block(index, replace(layer, writer=index), residual, config)
        _mark_live([block], (), "model.mtp.layer")
        join = scheme.join(config.width, lambda: norm.build(config.norm, config.width, config.norm_eps))
        final = norm.build(config.norm, config.width, config.norm_eps)
        made.append(Prediction(join, block, residual.ends(config.width), final))
    return made


def _preambles(layers: list[Layer]) -> list[Preamble]:
    """One for all depths of the same injection. Raises Refused where two make different things under one name."""
    made = {layer.injection: layer.injection.preamble() for layer in layers if layer.injection is not None}
    preambles = [preamble for preamble in made.values() if preamble is not None]
    names = [name for preamble in preambles for name in preamble.provides]
    if len(set(names)) < len(names):
        raise Refused("model.layers: all depths share one injection; give it the same settings wherever it stands.")
    return preambles


def _mark_live(blocks: list[Block], at_start: Collection[str], where: str) -> frozenset[str]:
    """Every sublayer learns which carried names a later one reads. Returns those that the first one is handed.

    at_start: the names that there are from the start. Raises Refused for a name that nobody before its reader provides.
    """
    live: frozenset[str] = frozenset()
    for sublayer in reversed([sublayer for block in blocks for sublayer in block.sublayers()]):
        sublayer.keep(live)
        live = (live - set(sublayer.provides)) | set(sublayer.needs)
    if missing := live.difference(at_start):
        raise Refused(f"{where}: a layer reads {min(missing)!r}, which no layer before it provides.")
    return live


def _refuse_unknown_ids(feedforwards: list[FeedForward], vocab: int) -> None:
    """Raises Refused for a table by token id that has not a row for every token."""
    for feedforward in feedforwards:
        if feedforward.vocab is not None and feedforward.vocab != vocab:
            raise Refused(
                f"model.layers: a layer has a table for {feedforward.vocab} token ids, but model.vocab is {vocab}; "
                "give both the same."
            )


def _refuse_misread(sublayers: list[AttentionSublayer]) -> None:
    """Raises Refused where a layer cannot read what its writer keeps."""
    by_layer = {sublayer.layer: sublayer for sublayer in sublayers}
    for sublayer in sublayers:
        kept, read = by_layer[sublayer.writer].attention.slots(), sublayer.attention.slots()
        if not all(mine.serves(theirs) for mine, theirs in zip(kept, read, strict=True)):
            raise Refused(
                f"model.layers: layer {sublayer.layer} reads layer {sublayer.writer}, whose state has other sizes "
                "or a shorter window; give both the same sizes, and the reader no longer a window."
            )
