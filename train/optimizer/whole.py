"""Whole matrices for an optimizer that needs them, from sharded ones: each matrix is made whole on one rank, once.

Every rank sends its part of a matrix to the matrix's owner and gets its part of the result back: two all-to-alls a step
over each mesh axis. The ranks of an axis share the matrices that they cut; what each of them holds whole (parameters
declared fp32, and replicas) each works on by itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .shards import cuts

# From places in the caller's list and whole matrices of these to what replaces them, of the same shapes.
Work = Callable[[Sequence[int], Sequence[Tensor]], Sequence[Tensor]]


def on_whole_matrices(parts: Sequence[Tensor], owners: Sequence[Tensor], work: Work) -> list[Tensor]:
    """Apply `work` to whole matrices [..., rows, cols], given this rank's part of each; return its part of each result.

    parts: the local parts. owners: tensors (the parameters) that are cut as the matrices are.

    A stack cut between its matrices is whole already. Matrices cut by rows or by columns over one mesh axis, each of a
    stack by itself, go to one rank of that axis (replicas along other axes do the same among themselves). Any other
    layout is gathered on every rank. `work` is called once, with all that this rank has to do: a place comes as often
    as matrices of its stack come apart. Collective: every rank gives the same list in the same order.
    """
    here: list[int] = []
    everywhere: list[int] = []
    by_axis: dict[dist.ProcessGroup, list[int]] = defaultdict(list)
    for place, owner in enumerate(owners):
        cut = cuts(owner)
        if all(isinstance(placement, Shard) and placement.dim < owner.ndim - 2 for _, placement in cut):
            here.append(place)
        elif len(cut) == 1 and cut[0][1] in (Shard(owner.ndim - 2), Shard(owner.ndim - 1)):
            by_axis[cut[0][0]].append(place)
        else:
            everywhere.append(place)

    exchanges = [Exchange.plan(axis, places, owners) for axis, places in by_axis.items()]
    places = here + [matrix.place for exchange in exchanges for matrix in exchange.owned] + everywhere
    whole = [parts[place] for place in here]
    for exchange in exchanges:
        whole += exchange.collect(parts)
    whole += [_gather(parts[place], owners[place]) for place in everywhere]

    done = iter(work(places, whole))
    results = dict(zip(here, islice(done, len(here)), strict=True))
    for exchange in exchanges:
        results |= exchange.hand_back(list(islice(done, len(exchange.owned))), parts)
    results |= {place: _cut(next(done), owners[place]) for place in everywhere}
    return [results[place] for place in range(len(owners))]


class Matrix(NamedTuple):
    """One matrix of the stack at `place` of the caller's list; rows: of what is cut, its columns where `turned`."""

    place: int
    rows: int
    cols: int
    turned: bool


@dataclass(frozen=True)
class Exchange:
    """Matrices cut over one mesh axis: to their owners and back. Those cut by columns travel transposed.

    matrices: those of one place in a row, as they are stacked. of_rank: by rank of the axis, which of them it owns.
    """

    axis: dist.ProcessGroup
    matrices: list[Matrix]
    of_rank: list[list[int]]

    @classmethod
    def plan(cls, axis: dist.ProcessGroup, places: list[int], owners: Sequence[Tensor]) -> Exchange:
        """Share out the work: the largest matrix first, each to the rank with the least so far."""
        matrices: list[Matrix] = []
        for place in places:
            *stack, rows, cols = owners[place].shape
            turned = cuts(owners[place])[0][1] == Shard(len(stack) + 1)
            matrices += [Matrix(place, *((cols, rows) if turned else (rows, cols)), turned)] * math.prod(stack)
        work = [min(matrix.rows, matrix.cols) ** 2 * max(matrix.rows, matrix.cols) for matrix in matrices]
        load = [0] * axis.size()
        of_rank: list[list[int]] = [[] for _ in load]
        for item in sorted(range(len(matrices)), key=lambda item: -work[item]):
            rank = load.index(min(load))
            of_rank[rank].append(item)
            load[rank] += work[item]
        return cls(axis, matrices, of_rank)

    @property
    def owned(self) -> list[Matrix]:
        """The matrices that this rank owns."""
        return [self.matrices[item] for item in self.of_rank[self.axis.rank()]]

    def collect(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """From this rank's parts, of the caller's whole list, to the whole matrices that it owns."""
        rows: list[Tensor] = []
        for place in dict.fromkeys(matrix.place for matrix in self.matrices):
            *stack, _, _ = shape = parts[place].shape
            rows += parts[place].reshape(math.prod(stack), *shape[-2:]).unbind()
        rows = [_turn(own, matrix) for own, matrix in zip(rows, self.matrices, strict=True)]
        mine = self.of_rank[self.axis.rank()]
        outgoing = [[rows[item] for item in items] for items in self.of_rank]
        incoming = [[self._rows_on(rank, item) for item in mine] for rank in range(self.axis.size())]
        received = self._all_to_all(outgoing, incoming, like=rows[0])
        whole = [torch.cat(pieces) for pieces in zip(*received, strict=True)]
        return [_turn(matrix, self.matrices[item]) for item, matrix in zip(mine, whole, strict=True)]

    def hand_back(self, whole: Sequence[Tensor], parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """From the whole matrices that this rank owns to its part at every place, of the shape that `parts` has."""
        me, everyone = self.axis.rank(), range(self.axis.size())
        cut = [
            _turn(matrix, self.matrices[item]).split([self._rows_on(rank, item)[0] for rank in everyone])
            for item, matrix in zip(self.of_rank[me], whole, strict=True)
        ]
        outgoing = [[pieces[rank] for pieces in cut] for rank in everyone]
        incoming = [[self._rows_on(me, item) for item in items] for items in self.of_rank]
        received = self._all_to_all(outgoing, incoming, like=parts[self.matrices[0].place])
        own = {
            item: _turn(rows, self.matrices[item])
            for items, pieces in zip(self.of_rank, received, strict=True)
            for item, rows in zip(items, pieces, strict=True)
        }
        stacks: dict[int, list[Tensor]] = defaultdict(list)
        for item, matrix in enumerate(self.matrices):
            stacks[matrix.place].append(own[item])
        return {place: torch.stack(stack).view_as(parts[place]) for place, stack in stacks.items()}

    def _rows_on(self, rank: int, item: int) -> tuple[int, int]:
        """The shape of a rank's rows, as Shard cuts: equal parts rounded up, the last ones short or empty."""
        matrix = self.matrices[item]
        most = -(-matrix.rows // self.axis.size())
        return max(0, min(most, matrix.rows - rank * most)), matrix.cols

    def _all_to_all(
        self, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, int]]], like: Tensor
    ) -> list[list[Tensor]]:
        """Send each rank its list of matrices; receive from each rank matrices of the shapes given."""
        sizes = [[rows * cols for rows, cols in shapes] for shapes in incoming]
        received = like.new_empty(sum(map(sum, sizes)))
        sent = torch.cat([like.new_empty(0), *(piece.flatten() for pieces in outgoing for piece in pieces)])
        dist.all_to_all_single(
            received,
            sent,
            [sum(of_rank) for of_rank in sizes],
            [sum(piece.numel() for piece in pieces) for pieces in outgoing],
            group=self.axis,
        )
        blocks = received.split([sum(of_rank) for of_rank in sizes])
        return [
            [flat.view(shape) for flat, shape in zip(block.split(of_rank), shapes, strict=True)]
            for block, of_rank, shapes in zip(blocks, sizes, incoming, strict=True)
        ]


def _turn(tensor: Tensor, matrix: Matrix) -> Tensor:
    return tensor.mT if matrix.turned else tensor


def _gather(part: Tensor, owner: Tensor) -> Tensor:
    assert isinstance(owner, DTensor)
    like = DTensor.from_local(
        part, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
    )
    return like.full_tensor()


def _cut(whole: Tensor, owner: Tensor) -> Tensor:
    assert isinstance(owner, DTensor)
    mesh = owner.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, owner.placements).to_local()
