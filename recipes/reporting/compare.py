"""Which settings are better, by how much, and whether that is more than chance."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean, stdev, variance
from typing import Any

from scipy.special import stdtrit

from torchrl_iql_recipes.experiment.results import FEWEST, half_width
from torchrl_iql_recipes.experiment.schema import rounded, written
from torchrl_iql_recipes.experiment.settings import has_effect
from torchrl_iql_recipes.reporting.gather import Learner, Run

__all__ = [
    "Difference",
    "Group",
    "differences",
    "groups",
    "repeated",
    "varied",
    "verdict",
    "welch",
    "worlds",
]

FEW = 3
"""Settings in a name."""

Settings = Mapping[str, Any]

Members = tuple[tuple[Run, Learner], ...]


@dataclass(frozen=True)
class Group:
    """Learners that differ by their seeds alone, of one run or of several.

    Attributes:
        world: what scores are comparable in.
        label: the algorithm, and by what it differs from others there.
        title: the algorithm.
        settings: what it is trained with.
        members: each learner with its run, each seed once.
        scores: the final ones of runs that are finished, by seed.
        repeated: the learners that do not count, by seed, since it was there more than once: one of a run
            that is finished does, else the furthest.
    """

    world: str
    label: str
    title: str
    settings: Settings
    members: tuple[tuple[Run, Learner], ...]
    scores: Mapping[int | str, float]
    repeated: Mapping[int | str, Members]

    @property
    def values(self) -> list[float]:
        """The scores."""
        return list(self.scores.values())

    @property
    def mean(self) -> float | None:
        """Of the scores; None without any."""
        return mean(self.values) if self.scores else None

    @property
    def half(self) -> float | None:
        """Half the width of the 95% interval of the mean, Student's t.

        None for fewer than three seeds, and for those that are all alike: they may be at a bound.
        """
        enough = len(self.scores) >= FEWEST and len(set(self.values)) > 1
        return half_width(self.values) if enough else None

    @property
    def spread(self) -> float | None:
        """Standard deviation between the seeds."""
        return stdev(self.values) if len(self.scores) > 1 else None

    @property
    def unfinished(self) -> list[tuple[Run, Learner]]:
        """Members whose runs are not over."""
        return [(run, its) for run, its in self.members if run.state != "finished"]

    @property
    def unscored(self) -> list[tuple[Run, Learner]]:
        """Members without a score: their runs are not over, or the last evaluation failed or was not made."""
        return [(run, its) for run, its in self.members if _seed(run, its) not in self.scores]


@dataclass(frozen=True)
class Difference:
    """Of two means.

    Attributes:
        better: whose mean is higher.
        other: the other one.
        mean: the difference, at least 0.
        interval: its 95% interval, Welch's t; None for fewer than three seeds of one, or without any spread.
    """

    better: Group
    other: Group
    mean: float
    interval: tuple[float, float] | None

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and self.interval[0] > 0


def groups(runs: Sequence[Run]) -> list[Group]:
    """Put together the learners that differ by their seeds alone.

    Returns:
        by world in the order of the runs, and in each by the mean score, the highest first.
    """
    found: dict[tuple, list[tuple[Run, Learner]]] = {}
    for run in runs:
        for learner in run.learners:
            key = repr(_settings(run, learner)) if run.settings else str(run.path)
            found.setdefault((run.world, run.script, learner.title, key), []).append((run, learner))
    made = []
    for (world, _, title, _), all_ in found.items():
        members, others = _each_seed_once(tuple(all_))
        finished = {
            _seed(run, its): its.score
            for run, its in members
            if run.state == "finished" and its.score is not None
        }
        settings = _settings(*members[0])
        made.append(Group(world, title, title, settings, members, finished, others))
    return _labelled(made)


def _each_seed_once(all_: Members) -> tuple[Members, dict[int | str, Members]]:
    """Keep one learner of each seed, of a run that is finished if there is one, else the furthest.

    Returns:
        these; and by seed the others, if there are any.
    """
    kept: dict[int | str, tuple[Run, Learner]] = {}
    others: dict[int | str, Members] = {}
    for run, learner in all_:
        seed = _seed(run, learner)
        other = kept.setdefault(seed, (run, learner))
        if other[1] is learner:
            continue
        if other[0].state != "finished" and (
            run.state == "finished" or learner.step > other[1].step
        ):
            kept[seed] = run, learner
        else:
            other = run, learner
        others[seed] = (*others.get(seed, ()), other)
    return tuple(kept.values()), others


def repeated(its: Group) -> list[str]:
    """Say which seeds were trained more than once, where they do not count, and how else they scored."""
    if not its.repeated:
        return []
    seeds = ", ".join(map(str, its.repeated))
    labels = dict.fromkeys(run.label for others in its.repeated.values() for run, _ in others)
    unlike = []
    for seed, others in its.repeated.items():
        scores = [learner.score for run, learner in others if run.state == "finished"]
        found = [score for score in (its.scores.get(seed), *scores) if score is not None]
        if len(set(found)) > 1:
            unlike.append(f"of seed {seed} {', '.join(f'{each:.6g}' for each in found)}")
    scored = f"; their scores differ: {'; '.join(unlike)}" if unlike else ""
    return [
        f"seed {seeds} of {its.label} was trained more than once, and counts once, not in "
        f"{', '.join(labels)}{scored}"
    ]


def _seed(run: Run, learner: Learner) -> int | str:
    return f"{run.label}/{learner.name}" if learner.seed is None else learner.seed


def _settings(run: Run, learner: Learner) -> dict[str, Any]:
    known = {**run.settings, **learner.settings, "transitions": run.transitions}
    without = ("task", "algorithm", "eval_interval")  # by name, and of no effect on the last score
    its = {
        key: value for key, value in sorted(known.items()) if has_effect(key) and key not in without
    }
    if isinstance(its.get("checkpoint"), str):  # the same of another seed
        its["checkpoint"] = re.sub(r"seed=\d+", "seed=*", its["checkpoint"])
    return its


def _labelled(made: Sequence[Group]) -> list[Group]:
    labelled = []
    for world in dict.fromkeys(each.world for each in made):
        its = [each for each in made if each.world == world]
        named = [replace(each, label=_label(each, its)) for each in its]
        for label in {each.label for each in named}:
            twice = [i for i, each in enumerate(named) if each.label == label]
            for number, i in enumerate(twice[1:], 2):
                named[i] = replace(named[i], label=f"{label} ({number})")
        labelled += sorted(
            named, key=lambda each: (each.mean is None, -(each.mean or 0.0), each.label)
        )
    return labelled


def _label(group: Group, its: Sequence[Group]) -> str:
    """Name a group by its algorithm and by what is other in those that are alike."""
    run = group.members[0][0]
    alike = [each for each in its if each.title == group.title]
    scripts = {each.members[0][0].script for each in alike}
    title = group.title + " online" * (len(scripts) > 1 and run.script == "online")
    same = [each for each in alike if each.members[0][0].script == run.script]
    keys = varied([each.settings for each in same])
    if len(same) > 1 and (len(keys) > FEW or not keys):
        inside = [each.settings for each in same if each.members[0][0] is run]
        return ", ".join([title, run.label, *_parts(group, varied(inside))])
    return ", ".join([title, *_parts(group, keys)])


def _parts(group: Group, keys: Sequence[str]) -> list[str]:
    return [_part(key, group.settings.get(key)) for key in keys]


def _part(key: str, value: Any) -> str:
    if key == "transitions":  # no setting, but of the data
        return "data unknown" if value is None else f"{value:,} transitions"
    return f"{key}={written(value)}"


def varied(settings: Sequence[Settings]) -> list[str]:
    """Return the names of the settings that are not the same in all."""
    names = dict.fromkeys(key for each in settings for key in each)
    return [key for key in names if len({repr(each.get(key)) for each in settings}) > 1]


def worlds(its: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the groups by world."""
    found: dict[str, list[Group]] = {}
    for each in its:
        found.setdefault(each.world, []).append(each)
    return found


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95% interval of the difference of two means, mean(a) - mean(b), by Welch's t.

    Args:
        a: one value per seed, at least two.
        b: the same, of others.

    Returns:
        its ends; None if neither has any spread.
    """
    of_a, of_b = variance(a) / len(a), variance(b) / len(b)
    if of_a + of_b == 0:
        return None
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(of_a + of_b)
    middle = mean(a) - mean(b)
    return middle - half, middle + half


def differences(its: Sequence[Group]) -> list[Difference]:
    """Compare each pair of groups of a world that are finished, the better one with the other."""
    found = []
    known = [each for each in its if each.scores]
    for better, other in combinations(known, 2):
        enough = min(len(better.scores), len(other.scores)) >= FEWEST
        interval = welch(better.values, other.values) if enough else None
        found.append(Difference(better, other, mean(better.values) - mean(other.values), interval))
    return found


def verdict(its: Sequence[Group], estimated: Sequence[str] = ()) -> list[str]:
    """Say in words which group of a world is the best, by how much, and whether that is told.

    Args:
        its: the groups, the highest mean first.
        estimated: what is known by data alone, said where nothing else is.
    """
    known = [each for each in its if each.scores]
    if not known:
        is_scored = any(learner.latest is not None for each in its for _, learner in each.members)
        if estimated and not is_scored:
            return ["No policy was played in an environment. By data alone:", *estimated]
        return [
            "No run is finished: there is no final score to compare yet."
            if is_scored
            else "No policy was evaluated: there is no score, see what is held out."
        ]
    if len(known) == 1:
        one = known[0]
        return [f"{one.label}: {scored(one)}."]
    lines = ["; ".join(f"{each.label}: {scored(each)}" for each in known) + "."]
    best = known[0]
    against = [each for each in differences(known) if each.better is best]
    told = [each for each in against if each.is_told]
    open_ = [each for each in against if each.interval is not None and not each.is_told]
    if told:
        than = "; ".join(f"than {each.other.label} by {_by(each)}" for each in told)
        lines.insert(0, f"{best.label} is better {than}.")
    if len({_steps(each) for each in known}) > 1:
        its_steps = "; ".join(f"{each.label}: {_steps(each)}" for each in known)
        lines.insert(0, f"Not after as many steps: {its_steps}.")
    if open_:
        them = "; ".join(f"{each.other.label}: the difference is {_by(each)}" for each in open_)
        lines.append(f"{best.label} can not be told apart from {them}. More seeds narrow it.")
    if any(each.interval is None and min(_seeds(each)) >= FEWEST for each in against):
        lines.append("Between seeds that are all alike there is no spread, and no interval.")
    return lines


def scored(its: Group) -> str:
    """Write the mean score, its interval, and the number of seeds."""
    number = len(its.scores)
    seeds = "one seed" if number == 1 else f"{number} seeds"
    seeds += ", all alike" if number > 1 and len(set(its.values)) == 1 else ""
    interval = "" if its.half is None else f" ± {rounded(its.half)}"
    return f"{rounded(its.mean)}{interval} ({seeds})"


def _steps(its: Group) -> str:
    """Write how many steps those have taken that are scored."""
    taken = sorted({learner.step for run, learner in its.members if run.state == "finished"})
    return " and ".join(f"{steps:,}" for steps in taken)


def _seeds(its: Difference) -> tuple[int, int]:
    return len(its.better.scores), len(its.other.scores)


def _by(its: Difference) -> str:
    assert its.interval is not None
    low, high = its.interval
    seeds = f"{len(its.better.scores)} and {len(its.other.scores)} seeds"
    return f"{rounded(its.mean)} (95% interval {rounded(low)} to {rounded(high)}, {seeds})"
