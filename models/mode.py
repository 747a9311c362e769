"""How far a scheme that selects is trained; read before torch is imported."""

from __future__ import annotations

from typing import Literal

Mode = Literal["dense", "warmup", "sparse"]
"""How a scheme that selects is trained: without selecting, its selector alone, or both (DeepSeek-V3.2, arXiv
2512.02556, section 2.1.1). Fixed within a phase; a scheme that selects nothing does not read it."""
