"""Softmax cores: how scores become a weighted sum, apart from what is scored.

Every core has one signature and computes the same function, of which those in `approximate` are no more than near:

    core(q [B, S, H, d], k [B, T, K, d], v [B, T, K, e], visibility, scale, lse=False) -> (out [B, S, H, e], lse [B, S,
    H])

H is a multiple of K; query head h reads KV head h // (H / K). The log-sum-exp of the scaled scores is None unless asked
for. A query that sees nothing gets zeros and a log-sum-exp of -inf.

A core that has more than one way of computing also has `kernel`, its rule for choosing, from which each run's log says
what serves which layers, `prepare`, which makes what a kernel needs before a forward, and `reaches`, which says for
what. One that does not run on every device has `check`, which raises Refused.
"""
