"""A study in words and tables: every arm, the contrasts that it asked for, its 2×2s, its curves over ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launch.report.compare import spread_of
from launch.report.show import UNKNOWN, spread
from launch.report.tables import Table, markdown
from launch.study.contrasts import NOISE, Difference, Value, interaction, paired, pairs_asked, recall, text_loss
from launch.study.results import Results

Measure = tuple[str, str, Value]
"""heading; kind, as launch.report.show prints it; value of a run."""


def document(results: Results, pictures: Sequence[tuple[str, str, str]] = ()) -> str:
    """The whole as Markdown. pictures: file, title and caption of each."""
    parts = ["# Study", "\n".join(f"- {note}" for note in notes(results))]
    for table in (
        arms(results), differences(results), *contrasts(results), *squares(results), *curves(results), trials(results),
    ):  # fmt: skip
        if table.body:
            parts.append(f"## {table.title}\n\n{markdown(table)}")
    parts += [f"![{title}]({file})\n\n{title}. {caption}" for file, title, caption in pictures]
    return "\n\n".join(parts) + "\n"


def notes(results: Results) -> Iterator[str]:
    """What a reader must know before believing a row."""
    runs, study = results.runs, results.study
    num_seeds = max([study.seeds, *(run.seed + 1 for run in runs)])  # an earlier start may have asked for more
    wanted = len(results.arms) * num_seeds
    tokens = {run.tokens for run in runs}
    seeds = f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"
    yield (
        f"{len(runs)} of {wanted} runs: {len(results.arms)} arms, {seeds} each; by seed every arm has the "
        f"same data in the same order; {' or '.join(f'{n:,}' for n in sorted(tokens)) or 'no'} tokens each."
    )
    if runs:
        machines = sorted({f"{run.machine}, PyTorch {run.torch}" for run in runs})
        yield f"One thread a run, on {'; '.join(machines)}."
    if results.arms:
        unit = max(arm.unit for arm in results.arms.values())
        off = max(abs(arm.off) for arm in results.arms.values())
        yield (
            f"{study.knob} is solved for in every arm, so that total and active parameters are as {study.anchor}'s, "
            f"to within half of a unit of that width ({unit:,} parameters); the largest rest is {off:,}. Rows of "
            "tables, of which a token takes one, count as neither, and stand apart."
        )
    yield from _tuning(results)
    odd = [name for name, arm in results.arms.items() if arm.cache.declared != arm.cache.measured]
    weighed = f"Cache: bytes in bf16 at {study.context:,} tokens of one sequence, for each token"
    yield f"{weighed}, declared = measured" + (f", except of {', '.join(odd)}." if odd else ".")
    if num_seeds > 1:
        quantile = Difference((0.0,) * num_seeds).quantile
        yield (
            "± is one standard deviation over the seeds. Differences are paired by seed; within noise: the mean is at "
            f"most {NOISE:g} standard errors (s.e.) from 0. With {num_seeds} seeds, 95 % of what chance does lies "
            f"within {quantile:g} of them (Student's t), and of twenty differences where there is none, one beyond."
        )
    for name, why in results.failed.items():
        yield f"Failed: {name}: {why}"


def _tuning(results: Results) -> Iterator[str]:
    tuning = results.study.tuning
    if tuning is None:
        return
    chosen = [results.tuned(name) for name in results.arms]
    taken = [f"{value:g} by {chosen.count(value)}" for value in sorted(tuning.values)]
    yield (
        f"{tuning.key} is chosen for every arm, by the least held-out loss of one trial a value, of a seed that no run "
        f"that counts has. Chosen: {', '.join(taken)}."
    )


def measures(results: Results) -> list[Measure]:
    """What arms are compared in."""
    return [
        ("bits/byte", "loss", text_loss),
        *((f"recall, {pairs} pairs", "percent", recall(pairs)) for pairs in pairs_asked(results.runs)),
    ]


def arms(results: Results) -> Table:
    """An arm a row, by its cache, the largest first."""
    kinds, tuning = measures(results), results.study.tuning
    ordered = sorted(results.arms, key=lambda name: -results.arms[name].cache.measured)
    body = []
    for name in ordered:
        arm, runs = results.arms[name], list(results.by_seed(name).values())
        body.append(
            [
                name,
                f"{arm.cache.measured / arm.cache.context:,.5g}",
                f"{arm.cache.growth:,.5g}",
                *(spread(spread_of([value(run) for run in runs]), kind) for _, kind, value in kinds),
                *([] if tuning is None else [UNKNOWN if (value := results.tuned(name)) is None else f"{value}"]),
                f"{arm.width}",
                f"{arm.total - arm.looked_up:,}",
                f"{arm.active:,}",
                f"{arm.off:+,}",
                f"{arm.looked_up:,}",
                spread(spread_of([run.tokens_per_second for run in runs]), "count"),
            ]
        )
    head = [
        "arm", f"KV B/token at {results.study.context:,}", "KV B/further token", *(heading for heading, _, _ in kinds),
        *([] if tuning is None else [tuning.key]),
        results.study.knob, "total", "active", "rest", "looked up", "tokens/s",
    ]  # fmt: skip
    return Table("The arms", head, body, "numbers")


def differences(results: Results) -> Table:
    """Every arm − the baseline."""
    kinds = measures(results)
    baseline = results.study.baseline
    body = [
        [name, *(difference(paired(results, name, baseline, value), kind) for _, kind, value in kinds)]
        for name in results.arms
        if name != baseline
    ]
    return Table(f"Against {baseline}", ["arm", *(heading for heading, _, _ in kinds)], body, "numbers")


def contrasts(results: Results) -> Iterator[Table]:
    """Each contrast."""
    for contrast in results.study.contrasts:
        body = [
            [heading, difference(paired(results, contrast.arm, contrast.against, value), kind)]
            for heading, kind, value in measures(results)
        ]
        yield Table(contrast.title, ["", f"{contrast.arm} − {contrast.against}"], body, "numbers")


def squares(results: Results) -> Iterator[Table]:
    """Each 2×2: what either change does alone, and what both do beyond that."""
    for s in results.study.interactions:
        body = [
            [
                heading,
                difference(paired(results, s.first, s.neither, value), kind),
                difference(paired(results, s.second, s.neither, value), kind),
                difference(paired(results, s.both, s.neither, value), kind),
                difference(interaction(results, s.neither, s.first, s.second, s.both, value), kind),
            ]
            for heading, kind, value in measures(results)
        ]
        head = ["", *(f"{arm} − {s.neither}" for arm in (s.first, s.second, s.both)), "interaction"]
        yield Table(f"2×2: {s.title}", head, body, "numbers")


def curves(results: Results) -> Iterator[Table]:
    """Each scheme at its ratios, which are the baseline's cache ÷ the arm's."""
    kinds = measures(results)
    for title, names in results.study.curves.items():
        body = []
        for name in (results.study.baseline, *names):
            runs = list(results.by_seed(name).values())
            values = [spread(spread_of([value(run) for run in runs]), kind) for _, kind, value in kinds]
            body.append([name, f"{ratio(results, name):.3g}×", *values])
        yield Table(f"By ratio: {title}", ["arm", "ratio", *(heading for heading, _, _ in kinds)], body, "numbers")


def trials(results: Results) -> Table:
    """The held-out loss of each value that was tried in an arm."""
    values = sorted(results.study.tuning.values) if results.study.tuning else []
    losses = {(trial.arm, trial.value): trial.loss for trial in results.trials}
    body = [
        [name, *(UNKNOWN if (loss := losses.get((name, value))) is None else f"{loss:.3f}" for value in values)]
        for name in (results.arms if losses else ())
    ]
    key = results.study.tuning.key if results.study.tuning else ""
    return Table(f"Trials of {key}: held-out loss, nats", ["arm", *(f"{value:g}" for value in values)], body, "numbers")


def ratio(results: Results, name: str) -> float:
    """The baseline's cache ÷ the arm's, at the study's context."""
    return results.arms[results.study.baseline].cache.measured / results.arms[name].cache.measured


def difference(found: Difference | None, kind: str) -> str:
    """Mean ± sd and what it is worth."""
    if found is None:
        return UNKNOWN
    points = kind == "percent"
    scaled = [100 * v for v in found.values] if points else list(found.values)
    of = Difference(tuple(scaled))
    digits = ".1f" if points else ".3f"
    sd = "" if of.sd is None else f" ± {of.sd:{digits}}"
    return f"{of.mean:+{digits}}{sd}{' points' if points else ''} ({found.verdict})"
