"""Checkpoints: copied and written in the background, aside, with checksums, renamed into place; verified when loaded.

    checkpoints/step_00000040/
        manifest.json    every other file's size and checksums, the step, facts of the run; checksummed itself
        tensors.json     every tensor's dtype, shape and parts: which bytes of which file hold which rows
        rank_0.bin …     the parts that each rank wrote, raw
        plain.pt         everything in the state that is no tensor

`Checkpoints` (store.py) is the whole interface. Layout-independent: what N ranks saved, M ranks load.
"""

from __future__ import annotations

from .store import Checkpoint, Checkpoints, SaveFailed

__all__ = ["Checkpoint", "Checkpoints", "SaveFailed"]
