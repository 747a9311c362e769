"""The menu of what a layer injects from the token itself: `scheme: x` means the file `x.py` of this folder.

A Config has `build(width, vocab)`, a FeedForward, and `preamble()`, a contract.Preamble for all depths together,
or None.
"""
