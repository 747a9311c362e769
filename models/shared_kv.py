"""What DeepSeek-V4's three kinds of layers have in common (report, arXiv 2606.19348, section 2.3).

One head is key and value of all query heads; the last tokens are read uncompressed, and a learned sink takes part in
the softmax. The output is turned back by the query's position, so that a value counts by its distance alone, and
projected group by group of heads. The kinds differ in what they read beside the window.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from conf.schema import at_least
from models import sink
from models.contract import Attention, Entries, Packing, Part, Sequence, Slot, Visibility, at_tokens
from models.cores import blockwise
from models.cores.merge import Core, Readable
from models.linear import Linear
from models.norm import RMSNorm, unit_rms
from models.output import Grouped, GroupedOutput
from models.rope import Rope, rotate_last


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """See models.output for the way out."""

    heads: int
    head_dim: int
    rope_dim: int
    query_latent: int
    window: int
    output: Grouped
    norm_eps: float = 1e-6
    rope: Rope = field(default_factory=lambda: Rope(pairing="interleaved"))

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.query_latent) < 1:
            raise ValueError("heads, head_dim and query_latent must be positive")
        if not 2 <= self.rope_dim <= self.head_dim or self.rope_dim % 2:
            raise ValueError(
                f"rope_dim ({self.rope_dim}) must be even, at least 2 and at most head_dim ({self.head_dim})"
            )
        self.output.check(self.heads)
        if self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1, the query itself")
        at_least(0, self, "norm_eps")


class SharedKV(Attention):
    """Queries, the window, and the way out."""

    config: SharedConfig
    core: Core = staticmethod(blockwise.core)
    sink: Tensor

    def __init__(self, config: SharedConfig, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.reads, self.scale = writes, reads, c.head_dim**-0.5
        if reads:
            self.query_down = Linear(width, c.query_latent, ("latent", "width"))
            self.query_norm = RMSNorm(c.query_latent, c.norm_eps, "latent")
            self.query = Linear(c.query_latent, c.heads * c.head_dim, ("heads", "latent"))
            sink.declare(self, c.heads)
            self.output = GroupedOutput(c.output, c.heads * c.head_dim, width)
        if writes:
            self.kv = Linear(width, c.head_dim, ("latent", "width"))
            self.kv_norm = RMSNorm(c.head_dim, c.norm_eps, "latent")

    def window_slot(self) -> Slot:
        c = self.config
        kv = Part("kv", (("latent", c.head_dim),), packed=packed(c.head_dim, c.rope_dim))
        return Slot("window", (kv,), reach=c.window)

    def query_latent(self, x: Tensor) -> Tensor:
        """x: [B, S, D]. What the queries are made from."""
        low: Tensor = self.query_norm(self.query_down(x))
        return low

    def query_heads(self, low: Tensor, sequence: Sequence) -> Tensor:
        """low: [B, S, C]. Returns [B, S, H, head_dim], rotated."""
        c = self.config
        query = self.query(low).unflatten(-1, (-1, c.head_dim))
        return rotate_last(c.rope, unit_rms(query, c.norm_eps), c.rope_dim, sequence.position)

    def window(self, x: Tensor, sequence: Sequence) -> Entries:
        """One entry for each token in hand."""
        kv = rotate_last(self.config.rope, self.kv_norm(self.kv(x)), self.config.rope_dim, sequence.position)
        return at_tokens(sequence, {"kv": kv})

    def readables(self, pieces: list[Entries], sequence: Sequence, reach: int | None = None) -> list[Readable]:
        """Entries as what a core reads: their key is their value."""
        shared = [(entries.parts["kv"].unsqueeze(2), Visibility.of(entries, sequence, reach)) for entries in pieces]
        return [(kv, kv, visibility) for kv, visibility in shared]

    def leave(self, out: Tensor, sequence: Sequence) -> Tensor:
        """out: [B, S, H, head_dim], what the heads read. Returns [B, S, D]."""
        # rotating back leaves each value turned by its distance to the query, not by its absolute position
        out = rotate_last(self.config.rope, out, self.config.rope_dim, sequence.position, inverse=True)
        y: Tensor = self.output(out.flatten(-2))
        return y

    def projections(self) -> float:
        """Operations per token, those of the window's entries included."""
        through = self.query_down.flops() + self.query.flops() + self.output.flops() if self.reads else 0.0
        return through + self.kv.flops() if self.writes else through

    def flops_of_pair(self) -> float:
        """Operations for each entry that a query reads: a score and a weighted sum for every head."""
        return 4.0 * self.config.heads * self.config.head_dim


def packed(size: int, rope_dim: int) -> Packing:
    """How DeepSeek's kernels store an entry: fp8 with a one-byte scale for every 64 numbers, what is rotated in bf16,
    whole 8 bytes."""
    plain = size - rope_dim
    scales = -(-plain // 64)
    padding = -(plain + 2 * rope_dim + scales) % 8
    return (("fp8", plain), ("bf16", rope_dim), ("fp8", scales + padding))
