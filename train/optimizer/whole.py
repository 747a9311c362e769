"""Whole matrices for an optimizer that needs them, from sharded ones: each matrix is made whole on one rank, once.

Every rank sends its rows of a matrix to the matrix's owner and gets its rows of the result back: two all-to-alls a
step over each mesh axis. No rank repeats another's work, and none holds more than its share of whole matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .shards import cuts

# From places in the caller's list and the whole matrices there to what replaces them, of the same shapes.
Work = Callable[[Sequence[int], Sequence[Tensor]], Sequence[Tensor]]


def on_whole_matrices(parts: Sequence[Tensor], owners: Sequence[Tensor], work: Work) -> list[Tensor]:
    """Apply `work` to whole matrices [..., rows, cols], given this rank's part of each; return its part of each result.

    parts: the local parts. owners: tensors (the parameters) that are cut as the matrices are.

    A stack cut between its matrices is whole already. A matrix cut by rows over one mesh axis goes to one rank of that
    axis (replicas along other axes do the same among themselves). Any other layout is gathered on every rank. `work` is
    called once, with all that this rank has to do. Collective: every rank gives the same list in the same order.
    """
    here: list[int] = []
    everywhere: list[int] = []
    by_axis: dict[dist.ProcessGroup, list[int]] = defaultdict(list)
    for place, owner in enumerate(owners):
        cut = cuts(owner)
        on_first_dim = all(placement == Shard(0) for _, placement in cut)
        if not cut or (on_first_dim and owner.ndim > 2):
            here.append(place)
        elif on_first_dim and len(cut) == 1:
            by_axis[cut[0][0]].append(place)
        else:
            everywhere.append(place)

    exchanges = [RowExchange.plan(axis, places, owners) for axis, places in by_axis.items()]
    places = here + [place for exchange in exchanges for place in exchange.owned] + everywhere
    whole = [parts[place] for place in here]
    for exchange in exchanges:
        whole += exchange.collect([parts[place] for place in exchange.places])
    whole += [_gather(parts[place], owners[place]) for place in everywhere]

    done = dict(zip(places, work(places, whole), strict=True))
    results = {place: done[place] for place in here}
    for exchange in exchanges:
        rows = exchange.hand_back([done[place] for place in exchange.owned], like=parts[exchange.places[0]])
        results |= zip(exchange.places, rows, strict=True)
    results |= {place: _cut(done[place], owners[place]) for place in everywhere}
    return [results[place] for place in range(len(owners))]


@dataclass(frozen=True)
class RowExchange:
    """Matrices cut by rows over one mesh axis: to their owners and back.

    places: their places in the caller's list. shapes: whole, (rows, cols). ranks: the owner of each on the axis.
    """

    axis: dist.ProcessGroup
    places: list[int]
    shapes: list[tuple[int, int]]
    ranks: list[int]

    @classmethod
    def plan(cls, axis: dist.ProcessGroup, places: list[int], matrices: Sequence[Tensor]) -> RowExchange:
        """Share out the work: the largest matrix first, each to the rank with the least so far."""
        shapes = [(matrices[place].shape[0], matrices[place].shape[1]) for place in places]
        work = [min(shape) ** 2 * max(shape) for shape in shapes]
        load = [0] * axis.size()
        ranks = [0] * len(places)
        for item in sorted(range(len(places)), key=lambda item: -work[item]):
            ranks[item] = load.index(min(load))
            load[ranks[item]] += work[item]
        return cls(axis, places, shapes, ranks)

    @property
    def owned(self) -> list[int]:
        """Places in the caller's list of the matrices that this rank owns."""
        return [self.places[item] for item in self._of(self.axis.rank())]

    def collect(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """From this rank's rows of every matrix to the whole matrices that it owns."""
        everyone, mine = range(self.axis.size()), self._of(self.axis.rank())
        outgoing = [[rows[item] for item in self._of(rank)] for rank in everyone]
        incoming = [[self._rows_on(rank, item) for item in mine] for rank in everyone]
        received = self._all_to_all(outgoing, incoming, like=rows[0])
        return [torch.cat([received[rank][i] for rank in everyone]) for i in range(len(mine))]

    def hand_back(self, whole: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """From the whole matrices that this rank owns to its rows of every matrix; `like` tells dtype and device."""
        me, everyone = self.axis.rank(), range(self.axis.size())
        cut = [
            matrix.split([self._rows_on(rank, item)[0] for rank in everyone])
            for item, matrix in zip(self._of(me), whole, strict=True)
        ]
        outgoing = [[pieces[rank] for pieces in cut] for rank in everyone]
        incoming = [[self._rows_on(me, item) for item in self._of(rank)] for rank in everyone]
        received = [iter(pieces) for pieces in self._all_to_all(outgoing, incoming, like)]
        return [next(received[rank]) for rank in self.ranks]

    def _of(self, rank: int) -> list[int]:
        return [item for item, owner in enumerate(self.ranks) if owner == rank]

    def _rows_on(self, rank: int, item: int) -> tuple[int, int]:
        """The shape of a rank's part, as Shard(0) cuts: equal parts rounded up, the last ones short or empty."""
        rows, cols = self.shapes[item]
        most = -(-rows // self.axis.size())
        return max(0, min(most, rows - rank * most)), cols

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
