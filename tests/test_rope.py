"""Rotary embedding and YaRN against the formulas of their papers, typed again here, and published numbers."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from models.rope import Rope, Yarn, rotate_first, rotate_last


def rotated(x: list[float], position: int, base: float, pairs: list[tuple[int, int]]) -> list[float]:
    """RoFormer, eq. 15: pair i turns by position · base^(−2i/d), as a complex number."""
    y = [0.0] * len(x)
    for i, (a, b) in enumerate(pairs):
        turned = complex(x[a], x[b]) * cmath.exp(1j * position * base ** (-2 * i / len(x)))
        y[a], y[b] = turned.real, turned.imag
    return y


@pytest.mark.parametrize(
    ("pairing", "pairs"),
    [("interleaved", [(0, 1), (2, 3), (4, 5)]), ("half", [(0, 3), (1, 4), (2, 5)])],
)
@pytest.mark.parametrize("position", [0, 1, 77, 100_000])
def test_each_pair_turns_by_its_frequency(pairing: str, pairs: list[tuple[int, int]], position: int) -> None:
    x = torch.randn(1, 1, 2, 6, dtype=torch.float64)
    rope = Rope(base=500.0, pairing=pairing)  # type: ignore[arg-type]
    y = rope.rotate(x, torch.tensor([[position]]))
    for head in range(2):
        expected = rotated(x[0, 0, head].tolist(), position, 500.0, pairs)
        torch.testing.assert_close(y[0, 0, head], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rope.rotate(y, torch.tensor([[position]]), inverse=True), x)
    torch.testing.assert_close(rope.rotate(x[:, :, 0], torch.tensor([[position]])), y[:, :, 0])


def test_only_the_last_numbers_turn() -> None:
    x, position = torch.randn(2, 3, 4, 8), torch.arange(3).expand(2, 3)
    y = rotate_last(Rope(), x, 6, position)
    assert torch.equal(y[..., :2], x[..., :2])
    assert torch.equal(y[..., 2:], Rope().rotate(x[..., 2:], position))


@pytest.mark.parametrize("size", [0, 2, 6, 8])
def test_only_the_first_numbers_turn(size: int) -> None:
    x, position = torch.randn(2, 3, 4, 8), torch.arange(3).expand(2, 3)
    y = rotate_first(Rope(), x, size, position)
    assert torch.equal(y[..., size:], x[..., size:])
    if size:
        assert torch.equal(y[..., :size], Rope().rotate(x[..., :size], position))


def test_scores_depend_on_the_distance_alone() -> None:
    rope = Rope(yarn=Yarn(factor=4.0, original_length=64))
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    scores = [
        float((rope.rotate(q, torch.tensor([[t]])) * rope.rotate(k, torch.tensor([[t - 5]]))).sum())
        for t in (5, 6, 300)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-9)


# base, factor, original length, and of the 32 pairs the last unchanged and the first fully divided: published numbers
YARNS = [
    pytest.param(1e4, 40.0, 4096, 10, 23, id="deepseek v3"),
    pytest.param(5e4, 64.0, 4096, 8, 20, id="kimi k2.6"),
    pytest.param(1.6e5, 16.0, 65_536, 15, 25, id="deepseek v4"),
]


@pytest.mark.parametrize(("base", "factor", "original_length", "unchanged", "divided"), YARNS)
def test_yarn_keeps_the_fast_pairs_and_divides_the_slow(
    base: float, factor: float, original_length: int, unchanged: int, divided: int
) -> None:
    rope = Rope(base, yarn=Yarn(factor, original_length))
    frequencies = rope.frequencies(64, torch.device("cpu"), torch.float64).tolist()
    for i, frequency in enumerate(frequencies):
        plain = base ** (-2 * i / 64)
        blend = min(max((i - unchanged) / (divided - unchanged), 0), 1)
        assert frequency == pytest.approx(plain / factor * blend + plain * (1 - blend), rel=1e-12), f"pair {i}"
    assert frequencies[unchanged] == pytest.approx(base ** (-unchanged / 32))
    assert frequencies[unchanged + 1] < 0.999 * base ** (-(unchanged + 1) / 32)
    assert frequencies[divided - 1] > 1.001 * base ** (-(divided - 1) / 32) / factor
    assert frequencies[divided] == pytest.approx(base ** (-divided / 32) / factor)


def test_an_exact_ramp_is_not_rounded() -> None:
    """V4's ramp ends at pairs 15.45 and 24.71 before they are rounded."""
    rope = Rope(1.6e5, yarn=Yarn(16.0, 65_536, truncate=False))
    frequencies = rope.frequencies(64, torch.device("cpu"), torch.float64)
    plain = torch.tensor([1.6e5 ** (-i / 32) for i in range(32)], dtype=torch.float64)
    blend = (1 - frequencies / plain) / (1 - 1 / 16.0)
    low, slope = 15.45, 24.71 - 15.45
    torch.testing.assert_close(blend[20], torch.tensor((20 - low) / slope, dtype=torch.float64), rtol=2e-3, atol=0.0)
    torch.testing.assert_close(blend[24], torch.tensor((24 - low) / slope, dtype=torch.float64), rtol=2e-3, atol=0.0)


def test_the_magnitude_scales_what_is_turned() -> None:
    x, position = torch.randn(1, 4, 8), torch.arange(4)[None]
    plain = Rope(yarn=Yarn(4.0, 16)).rotate(x, position)
    scaled = Rope(yarn=Yarn(4.0, 16, magnitude=1.3)).rotate(x, position)
    torch.testing.assert_close(scaled, 1.3 * plain)


def test_angles_of_far_positions_are_not_bfloat16() -> None:
    x = torch.randn(1, 1, 1, 8)
    position = torch.tensor([[10_001]])
    half = Rope().rotate(x.bfloat16(), position)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), Rope().rotate(x, position), rtol=0.0, atol=0.03)
    exact = rotated(x.flatten().tolist(), 10_001, 1e4, [(0, 4), (1, 5), (2, 6), (3, 7)])
    torch.testing.assert_close(Rope().rotate(x, position).flatten(), torch.tensor(exact), rtol=0.0, atol=3e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 0.5, "original_length": 8},
        {"factor": 2.0, "original_length": 0},
        {"factor": 2.0, "original_length": 8, "beta_slow": 0.0},
        {"factor": 2.0, "original_length": 8, "beta_slow": 2.0, "beta_fast": 1.0},
    ],
)
def test_an_impossible_stretch_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="YaRN"):
        Yarn(**wrong)  # type: ignore[arg-type]
    assert math.isfinite(Yarn(1.0, 1).factor)


def test_p_rope_turns_the_fast_pairs_at_the_whole_heads_frequencies() -> None:
    """Gemma 4's full layers: 64 of the 256 pairs of a head of 512, by numbers read off the reference."""
    rope = Rope(base=1e6, proportion=0.25)
    frequencies = rope.frequencies(512, torch.device("cpu"), torch.float64)
    assert frequencies[[0, 1, 63]].tolist() == pytest.approx([1.0, 0.94746, 0.033376], rel=1e-4)
    assert (frequencies > 0).tolist() == [True] * 64 + [False] * 192
    x = torch.randn(1, 1, 512)
    turned = (rope.rotate(x, torch.tensor([[9]])) != x).flatten()
    assert turned.nonzero().flatten().tolist() == [*range(64), *range(256, 320)]
    assert torch.equal(Rope(proportion=0.0).rotate(x, torch.tensor([[9]])), x)


@pytest.mark.parametrize("proportion", [-0.1, 1.1])
def test_a_proportion_is_a_share(proportion: float) -> None:
    with pytest.raises(ValueError, match="proportion"):
        Rope(proportion=proportion)
