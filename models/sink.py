"""A learned logit of each head that only enters the softmax's denominator (gpt-oss, arXiv 2508.10925; DeepSeek-V4
report, arXiv 2606.19348): p_j = exp(z_j) / (exp(s) + Σ_i exp(z_i)), so that a head may read little.

Nothing is cached for it. It is merged with whatever a core has read by the log-sum-exp of that: o · σ(LSE − s), see
models.cores.merge. Before training it is 0: one more entry with score 0 and without a value.
"""

from __future__ import annotations

from models.parameter import Module


def declare(module: Module, heads: int, *, wanted: bool = True) -> None:
    """Give `module` its `sink`: [heads] in fp32, or None where none is wanted."""
    if wanted:
        module.declare("sink", (heads,), ("heads",), "sink", fp32=True)
    else:
        module.register_parameter("sink", None)
