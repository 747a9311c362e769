"""Read a prepared corpus whole and compare it with its manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from conf.schema import Refused
from data.corpus import Config
from data.manifest import ANEW, SPLITS, Manifest, sha256


@dataclass(frozen=True)
class Verify:
    """Hash every byte of a prepared corpus; a run does this itself only for a small one."""

    path: str = field(metadata={"help": "folder that `python -m data prepare` wrote"})


def verify(request: Verify) -> str:
    """A sentence when all is well. Raises Refused where a file is not what the manifest says."""
    folder = Path(request.path)
    manifest = Manifest.read(folder)
    for split in SPLITS:
        if manifest.splits[split].tokens:
            Config(request.path, split).open()
        if sha256(folder / f"{split}.bin", folder / f"{split}.idx") != manifest.splits[split].sha256:
            raise Refused(f"{folder}/{split}.bin or .idx is damaged: its hash is not the manifest's; {ANEW}.")
    return f"{folder} is whole: every byte is as the manifest says."
