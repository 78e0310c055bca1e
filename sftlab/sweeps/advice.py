"""What to do next with a sweep: where the winner stands in its grid, whether its lead is more than noise, what to drop.

Pure functions over the ranking. Each advice says what was seen, and what to type where that can be said.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from sftlab.sweeps.death import cause
from sftlab.sweeps.points import UNFINISHED, series
from sftlab.sweeps.ranking import SEEDS, Group, importance, number
from sftlab.sweeps.record import Sweep

SURE = 3.0  # standard errors; the verdict calls this more than noise
MOST_SEEDS = 50
MENDS = {
    "oom": "memory (fewer trainer.rows_per_microbatch, trainer.activation_checkpointing=full, more launcher.mem_gb)",
    "timeout": "the time limit (raise launcher.timeout_min)",
    "node": "a node",
    "preempted": "preemption",
    "stopped": "being stopped",
    "code": "an error (see below)",
    "unknown": "something that left no word (see their logs)",
}


@dataclass(frozen=True)
class Advice:
    """What was seen and what follows, and a command or an override to type."""

    text: str
    command: str = ""


def advice(sweep: Sweep, groups: Sequence[Group], metric: str) -> list[Advice]:
    """Return what to do next, the most important first."""
    if not groups or groups[0].mean is None:
        return list(deaths(sweep))
    return [
        *deaths(sweep), *edges(groups), *seeds(sweep, groups), *idle(groups), *rarely(sweep, metric),
    ]  # fmt: skip


def deaths(sweep: Sweep) -> Iterator[Advice]:
    """Yield what points died of, the most frequent cause first."""
    found = Counter(cause(p.state, p.error) for p in sweep.points if p.state in UNFINISHED)
    if not found:
        return
    causes = "; ".join(f"{count} because of {MENDS[name]}" for name, count in found.most_common())
    retry = f"python -m sftlab.sweep dir={sweep.folder} retry=failed"
    yield Advice(
        f"{found.total()} of {len(sweep.points)} points did not finish: {causes}.",
        retry if sweep.is_launched and not sweep.is_search else "",
    )


def edges(groups: Sequence[Group]) -> Iterator[Advice]:
    """Yield the hyperparameters of which the winner has the least or the greatest value that was tried.

    One that did not matter is left out, and so is 0 where nothing below it was tried: most settings end there.
    """
    scored = [g for g in groups if g.mean is not None]
    mattered = {share.name for share in importance(groups).shares if share.share > share.chance}
    for name, text in groups[0].settings.items():
        values = sorted({v for g in scored if (v := number(g.settings[name])) is not None})
        here = number(text)
        if here is None or len(values) < 3 or name not in mattered or here == 0 == values[0]:
            continue
        if here not in (values[0], values[-1]):
            continue
        low = here == values[0]
        beyond = next_value(values if not low else values[::-1])
        extreme = "smallest" if low else "greatest"
        yield Advice(
            f"The winner has the {extreme} {name} that was tried, {text}: the best may lie beyond it. Try more.",
            f"{name}={beyond:g}" if beyond else "",
        )


def next_value(values: Sequence[float]) -> float | None:
    """Return the value that would follow the last two: by their ratio if all are positive, else by their distance."""
    before, last = values[-2:]
    following = last * last / before if min(before, last) > 0 else 2 * last - before
    return float(f"{following:.2g}") if math.isfinite(following) else None


def seeds(sweep: Sweep, groups: Sequence[Group]) -> Iterator[Advice]:
    """Yield how many seeds the winner's lead needs, where it has too few to be more than noise."""
    if len(groups) < 2 or groups[1].mean is None or groups[0].mean is None:
        return
    spreads = [g.deviation for g in groups if g.deviation is not None]
    first, second = groups[:2]
    if not spreads:
        yield Advice(
            "Each setting ran once, so a lead may be noise. Run the first few with three seeds or more.",
            f"{SEEDS[0]}=0,1,2",
        )
        return
    deviation = math.sqrt(fmean(d * d for d in spreads))
    gap = abs(first.mean - second.mean) if first.mean is not None and second.mean is not None else 0.0
    counts = min(len(first.scored), len(second.scored))
    if deviation == 0 or gap >= SURE * deviation * math.sqrt(1 / len(first.scored) + 1 / len(second.scored)):
        return
    needed = math.ceil(2 * (SURE * deviation / gap) ** 2 - 1e-9) if gap else MOST_SEEDS + 1
    if needed > MOST_SEEDS:
        yield Advice(
            f"The first two settings are as good as each other: their distance, {gap:.3g}, is far below the noise of "
            f"the seeds, {deviation:.3g}. Take the cheaper one."
        )
    else:
        yield Advice(
            f"The winner's lead of {gap:.3g} is not more than noise yet: with the seeds' deviation of {deviation:.3g} "
            f"it would take {needed} seeds of each of the first two, and there are {counts}.",
            f"{SEEDS[0]}={','.join(map(str, range(needed)))}",
        )


def idle(groups: Sequence[Group]) -> Iterator[Advice]:
    """Yield the hyperparameters that explain no more of the scores than chance would."""
    found = importance(groups)
    for share in found.shares:
        if share.share <= share.chance and found.num_scores >= 6:
            yield Advice(
                f"{share.name} did not matter here: its levels explain {share.share:.0%} of the variance, where chance "
                f"alone explains {share.chance:.0%}. Fix it, and spend the points on another.",
                f"{share.name}={groups[0].settings[share.name]}",
            )


def rarely(sweep: Sweep, metric: str) -> Iterator[Advice]:
    """Yield that the runs were evaluated too rarely to see a curve."""
    finished = [p for p in sweep.points if p.state == "finished"]
    if not finished or not metric.startswith("val/"):
        return
    steps = finished[0].step or 0
    if len(series(finished[0].folder, metric)) <= 2 and steps >= 10:
        yield Advice(
            f"{metric} was measured before and after training only, so the training loss is shown instead.",
            f"trainer.eval_every={max(1, steps // 10)}",
        )
