"""The page: what is shown of runs, in one file that needs no other."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from torchrl_iql import __version__
from torchrl_iql_recipes.experiment.curves import Curve, unit
from torchrl_iql_recipes.experiment.schema import is_installed, rounded, written
from torchrl_iql_recipes.reporting import compare, figures
from torchrl_iql_recipes.reporting.compare import Group
from torchrl_iql_recipes.reporting.gather import OWN_PICTURES, Run
from torchrl_iql_recipes.reporting.pictures import embedded

__all__ = ["LIMIT", "TooLargeError", "page"]

LIMIT = 5_000_000
"""Bytes of a page."""

OF_TEXT = 0.6
"""Share of them that figures of all kinds may have before pictures; what is left is for these."""

REFRESH = 10
"""Seconds after which a page that is made anew is loaded anew."""

WORLDS = 12
"""Tasks whose curves of training are drawn."""

WIDTHS = {"value_map.png": 560, "calibration.png": 480}
FILM = 1200
"""Pixels of a picture's width."""

NONE = "\N{EN DASH}"

ESTIMATED_ON = {
    "all": "all episodes",
    "learned": "the episodes learned from",
    "held_out": "the episodes held out",
}

KINDS = {"value_map.png": "value map", "calibration.png": "calibration"}


class TooLargeError(ValueError):
    """There are so many runs that words and numbers alone are larger than a page may be."""


@dataclass
class Room:
    """How many bytes are left for what can be left out."""

    left: int
    left_out: dict[str, int] = field(default_factory=dict)

    def take(self, kind: str, make: Callable[[], str]) -> Markup | None:
        """Make something if there is room; None, and noted, if there is none."""
        made = make() if self.left > 0 else ""
        size = len(made.encode())
        if not made or size > self.left:
            self.left_out[kind] = self.left_out.get(kind, 0) + 1
            return None
        self.left -= size
        return Markup(made)


def page(
    runs: Sequence[Run], *, made_by: str, left: Sequence[str] = (), watching: bool = False
) -> str:
    """Write the page.

    Args:
        runs: at least one.
        made_by: the command.
        left: what was found beside them, a line each.
        watching: whether it is made anew while runs go on, and loads itself anew.

    Raises:
        TooLargeError: even without figures it would be larger than 5 MB.
    """
    for share in (1.0, 0.5, 0.0):
        html = _page(runs, made_by=made_by, left=left, watching=watching, limit=int(share * LIMIT))
        if len(html.encode()) <= LIMIT:
            return html
    size = len(html.encode()) / 1e6
    raise TooLargeError(
        f"the page of {len(runs)} runs would have {size:.1f} MB, more than {LIMIT / 1e6:g}: give fewer"
    )


def _page(
    runs: Sequence[Run], *, made_by: str, left: Sequence[str], watching: bool, limit: int
) -> str:
    groups = compare.groups(runs)
    series = {label: i for i, label in enumerate(dict.fromkeys(each.label for each in groups))}
    by_world = compare.worlds(groups)
    room = Room(int(OF_TEXT * limit))
    parts: dict[str, Any] = {
        "worlds": [_world(name, its, series, room) for name, its in by_world.items()],
        "aggregates": _aggregates(by_world, room),
        "data": _data(runs, room),
        "validation": _metrics(by_world, series, room, "validation/"),
        "training": _metrics(by_world, series, room, ""),
    }
    room.left += int((0.9 - OF_TEXT) * limit)
    parts["pictures"] = _pictures(runs, room)
    parts["estimates"] = _estimates(runs)
    notes = _notes(runs, groups)
    keys = compare.varied([run.settings for run in runs])
    html = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            **parts,
            runs=[_summary(run) for run in runs],
            title=_title(runs),
            legend=[(label, _key(index)) for label, index in series.items()],
            notes=notes,
            few=any(0 < len(group.scores) < compare.FEWEST for group in groups),
            left=left,
            left_out=room.left_out,
            differ=[(key, [_shown(run, key) for run in runs]) for key in keys],
            same=[
                (key, [_shown(run, key) for run in runs])
                for key in sorted({key for run in runs for key in run.settings})
            ],
            made=datetime.now().astimezone(),
            made_by=made_by,
            version=__version__,
            python=platform.python_version(),
            refresh=REFRESH if watching else None,
        )
    )
    pieces = enumerate(html.split("<svg "))
    return "<svg ".join(piece.replace(figures.PLACE, f"f{i}-") for i, piece in pieces)


def _environment() -> jinja2.Environment:
    its = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    its.filters |= {"figure": _figure, "count": _count, "duration": _duration, "plain": _value}
    return its


def _title(runs: Sequence[Run]) -> str:
    worlds = list(dict.fromkeys(run.world for run in runs))
    titles = list(dict.fromkeys(its.title for run in runs for its in run.learners))
    where = worlds[0] if len(worlds) == 1 else f"{len(worlds)} tasks"
    *first, last = titles or ["Runs"]
    what = f"{', '.join(first)} and {last}" if first else last
    if len(titles) > 3:
        what = f"{len(titles)} algorithms"
    return f"{what} on {where}"


def _key(index: int) -> Markup:
    """Draw the line of a series, for the legend."""
    dashes = figures.DASHES[(index + index // figures.SERIES) % len(figures.DASHES)]
    pattern = f' stroke-dasharray="{" ".join(f"{2 * its:g}" for its in dashes)}"' if dashes else ""
    return Markup(
        f'<svg class="key" viewBox="0 0 28 8" aria-hidden="true"><line x1="1" x2="27" y1="4" y2="4" '
        f'stroke="var(--series-{index % figures.SERIES + 1})" stroke-width="3"{pattern}/></svg>'
    )


# --- Scores ----------------------------------------------------------------------------------------------


def _world(
    name: str, its: Sequence[Group], series: Mapping[str, int], room: Room
) -> dict[str, Any]:
    members = [(run, learner) for group in its for run, learner in group.members]
    score_name = members[0][0].score_name
    lines = {series[group.label]: _of(group, "eval/score") for group in its}
    lines = {index: found for index, found in lines.items() if found}
    switch, x = _phases([run for run, _ in members])
    curve = None
    if lines:
        curve = room.take(
            "curves",
            partial(
                figures.curves,
                lines,
                name=f"{score_name} on {name} over {x}",
                unit=score_name,
                x=x,
                switch=switch,
            ),
        )
    known = [(series[group.label], group) for group in its]
    interval = None
    if any(group.scores for group in its):
        draw = partial(figures.intervals, known, name=f"final scores on {name}", unit=score_name)
        interval = room.take("comparisons", draw)
    return {
        "name": name,
        "score_name": score_name,
        "verdict": compare.verdict(its, _by_data_alone(its)),
        "groups": [(group, _key(series[group.label])) for group in its],
        "differences": sorted(
            compare.differences(its), key=lambda each: each.better.label != known[0][1].label
        ),
        "curve": curve,
        "intervals": interval,
        "before": [
            (group.label, before, after)
            for group in its
            if (before := _mean_of(group, "before")) is not None
            and (after := _mean_of(group, "after")) is not None
        ],
        "noise": _noise([run for run, _ in members]),
    }


def _mean_of(group: Group, key: str) -> float | None:
    found = [its.outcome.get(key) for run, its in group.members if run.state == "finished"]
    scores = [each["score"] for each in found if isinstance(each, dict) and "score" in each]
    return float(np.mean(scores)) if scores else None


def _noise(runs: Sequence[Run]) -> str | None:
    """Say how exactly a single learner's score is known, from the episodes that it played."""
    errors = [
        float(its.outcome[key])
        for run in runs
        for its in run.learners
        for key in [f"{run.score_name.replace(' ', '_')}_stderr"]
        if isinstance(its.outcome.get(key), int | float)
    ]
    episodes = sorted(
        {str(run.settings["eval_episodes"]) for run in runs if run.settings.get("eval_episodes")}
    )
    if not errors or not episodes:
        return None
    return (
        f"Each score is a mean over {' or '.join(episodes)} episodes, known to about ±{rounded(max(errors))} "
        "(largest standard error). The intervals are over seeds, whose episodes have many starts in common: "
        "that part of the chance they do not contain."
    )


def _of(group: Group, metric: str) -> list[Curve]:
    """Return the curves of a metric of all seeds, with the offline phase before."""
    found = []
    for run, learner in group.members:
        curve = learner.curves.get(metric)
        if run.offline is not None and metric in run.offline[0]:
            earlier = run.offline[0][metric]
            none = np.zeros(0), np.zeros(0)
            curve = tuple(
                np.concatenate([a[earlier[0] < run.offline[1]], b])
                for a, b in zip(earlier, curve or none, strict=True)
            )
        if curve is not None and len(curve[0]):
            finite = np.isfinite(curve[1])
            found.append((curve[0][finite], curve[1][finite]))
    return [each for each in found if len(each[0])]


def _phases(runs: Sequence[Run]) -> tuple[float | None, str]:
    """Return the step where the online phase begins, if all agree, and what the steps are."""
    online = [run for run in runs if run.script == "online"]
    if not online:
        return None, "gradient steps"
    switches = {_switch(run) for run in online}
    switch = switches.pop() if len(switches) == 1 else None
    are_frames = all(run.settings.get("updates_per_frame", 1.0) == 1 for run in online)
    of_frames = "also environment steps" if are_frames else "online"
    if switch == 0 and len(online) == len(runs):
        return None, "environment steps" if are_frames else "gradient steps"
    return switch, f"gradient steps; past the line {of_frames}"


def _switch(run: Run) -> float:
    if run.offline is not None:
        return run.offline[1]
    scores = run.learners[0].curves.get(
        "eval/score"
    )  # the first one is before anything is collected
    return 0.0 if scores is None or not len(scores[0]) else float(scores[0][0])


def _aggregates(by_world: Mapping[str, Sequence[Group]], room: Room) -> dict[str, Any] | None:
    """Take several tasks together, by rliable: those that all that are there more than once have finished."""
    normal = {
        world: {its.label: its for its in groups if its.scores}
        for world, groups in by_world.items()
        if groups[0].members[0][0].score_name == "normalized score"
    }
    often = [label for its in normal.values() for label in its]
    shared = [label for label in dict.fromkeys(often) if often.count(label) > 1]
    normal = {world: its for world, its in normal.items() if all(label in its for label in shared)}
    if len(normal) < 2 or len(shared) < 2:
        return None
    if not is_installed("rliable"):
        return {"missing": True}
    from torchrl_iql_recipes.comparison.aggregates import over

    its = over({task: {label: of[label].values for label in shared} for task, of in normal.items()})
    means = dict(reversed(its.means.items()))
    draw = partial(
        figures.ranges,
        means,
        name="interquartile mean of the normalized score",
        unit="interquartile mean of the normalized score",
    )
    return {
        "missing": False,
        "tasks": its.tasks,
        "seeds": its.seeds,
        "best": next(iter(means)),
        "means": means,
        "better": its.improvement,
        "figure": room.take("comparisons", draw),
    }


# --- Curves ----------------------------------------------------------------------------------------------


def _metrics(
    by_world: Mapping[str, Sequence[Group]], series: Mapping[str, int], room: Room, prefix: str
) -> list[dict[str, Any]]:
    """Draw all metrics of what is held out, or of training, a panel for each."""
    drawn = []
    for world, groups in list(by_world.items())[:WORLDS]:
        names = dict.fromkeys(
            name
            for group in groups
            for _, learner in group.members
            for name in learner.curves
            if not name.endswith("_stderr") and _is_of(name, prefix)
        )
        switch, x = _phases([run for group in groups for run, _ in group.members])
        panels = []
        for name in names:
            lines = {series[group.label]: _of(group, name) for group in groups}
            lines = {index: found for index, found in lines.items() if found}
            title = name.removeprefix(prefix).replace("_", " ")
            if not lines:
                continue
            draw = partial(
                figures.curves,
                lines,
                name=f"{title} on {world}",
                unit=unit(name),
                x=x,
                switch=switch,
            )
            panels.append((title, room.take("curves", draw)))
        if panels:
            drawn.append({"name": world, "panels": panels})
    if len(by_world) > WORLDS:
        room.left_out["tasks with curves of training"] = len(by_world) - WORLDS
    return drawn


def _is_of(name: str, prefix: str) -> bool:
    return name.startswith(prefix) if prefix else "/" not in name


# --- Data ------------------------------------------------------------------------------------------------


def _data(runs: Sequence[Run], room: Room) -> list[dict[str, Any]]:
    """Show each of the data once, with the runs that learn from them."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(run.data or {**run.rules, "dataset": run.dataset}), []).append(
            run
        )
    return [_of_data(its, room) for its in found.values()]


def _of_data(runs: Sequence[Run], room: Room) -> dict[str, Any]:
    data, run = runs[0].data, runs[0]
    shown: dict[str, Any] = {"name": run.dataset, "runs": [each.label for each in runs]}
    known = data or run.rules
    said_already = ("learned_transitions", "recorded_transitions", "held_out_episodes")
    shown["facts"] = [
        (word, known[key])
        for key, word in {
            "environment": "environment",
            "transitions": "transitions",
            "learned_transitions": "learned from",
            "recorded_transitions": "recorded",
            "episodes": "episodes",
            "held_out_episodes": "episodes held out",
            "terminated": "episodes that terminate",
            "observation": "shape of an observation",
            "reward": "reward rule",
            "reward_transform": "rewards are made",
        }.items()
        if known.get(key) is not None
        and not (data is None and key == "episodes")
        and not (key in said_already and known[key] in (0, known.get("transitions")))
    ]
    shown["panels"], shown["has_summary"] = [], data is not None
    if data is None:
        return shown
    try:
        shown["panels"] = _histograms(data, run.dataset, room)
    except (KeyError, TypeError, ValueError, AttributeError):
        shown["has_summary"] = False
    return shown


def _histograms(data: Mapping[str, Any], name: str, room: Room) -> list[tuple[str, Markup | None]]:
    panels = []
    for key, (title, x, y) in {
        "returns": ("return of an episode, as recorded", "sum of raw rewards", "episodes"),
        "lengths": ("length of an episode", "steps", "episodes"),
        "rewards": ("reward of a step, after the rule", "reward", "steps"),
    }.items():
        its = data[key]
        draw = partial(
            figures.histogram,
            its["counts"],
            its["edges"],
            name=f"{title} in {name}",
            x=x,
            y=y,
        )
        low, high, mean = (_plain(its[key]) for key in ("lowest", "highest", "mean"))
        figures_of = f"{low} to {high}, mean {mean}"
        panels.append((f"{title}: {figures_of}", room.take("histograms", draw)))
    actions = data["actions"]
    if "categories" in actions:
        counts, first = actions["categories"], actions["first"]
        edges = [first - 0.5, first + len(counts) - 0.5]
        draw = partial(
            figures.histogram, counts, edges, name=f"actions in {name}", x="action", y="steps"
        )
        return [*panels, ("actions taken", room.take("histograms", draw))]
    for i, its in enumerate(actions["columns"]):
        at = "no bounds" if its["bounds"] is None else f"{its['at_bounds']:.0%} at its bounds"
        draw = partial(
            figures.histogram,
            its["counts"],
            its["edges"],
            name=f"action {i} in {name}",
            bounds=its["bounds"],
        )
        panels.append((f"action {i}: {at}", room.take("histograms", draw)))
    return panels


# --- Estimates -------------------------------------------------------------------------------------------


def _estimates(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Show what policies are worth by data alone, each by the run that it is of, if that is shown."""
    labels = {
        (run.path / its.name).resolve(): f"{run.label}, {its.name}" if its.name else run.label
        for run in runs
        for its in run.learners
    }

    def of(checkpoint: str) -> str:
        path = Path(checkpoint)
        label = labels.get(path.resolve().parent)
        if label is None:
            return checkpoint
        return label if path.name == "last.ckpt" else f"{label}, {path.name}"

    return [
        {
            "dataset": its.get("dataset"),
            "episodes": ESTIMATED_ON.get(str(its.get("fit_on")), "episodes"),
            "discount": written(its.get("discount")),
            "data": [its["data"].get(key) for key in ("value", "stderr", "best")],
            "policies": [
                (
                    of(str(each.get("checkpoint"))),
                    *(each.get(key) for key in ("value", "spread", "distance")),
                    each.get("verdict") or NONE,
                )
                for each in its["policies"]
            ],
        }
        for run in runs
        for its in run.estimates
    ]


def _by_data_alone(its: Sequence[Group]) -> list[str]:
    """Write what the policies of a world are worth by data alone, the best first."""
    runs = list({run.path: run for each in its for run, _ in each.members}.values())
    found = [
        (float(value), f"{policy}: {value:.4g} ± {spread:.2g}, the data {data:.4g}. {said}")
        for each in _estimates(runs)
        for data in each["data"][:1]
        for policy, value, spread, _, said in each["policies"]
        if None not in (value, spread, data)
    ]
    return [line for _, line in sorted(found, reverse=True)]


# --- Pictures, notes, settings -----------------------------------------------------------------------------


def _pictures(runs: Sequence[Run], room: Room) -> list[dict[str, Any]]:
    """Embed value maps, calibrations and films of the first learner of each run, then of the others."""
    wanted = [
        (run, learner, name)
        for kind in ("value_map.png", "calibration.png", "")
        for run in runs
        for learner in run.learners[:1]
        for name in learner.pictures
        if (name == kind if kind else name not in OWN_PICTURES)
    ]
    shown: dict[str, list[dict[str, Any]]] = {}
    for run, learner, name in wanted:
        kind = KINDS.get(name, "film")
        its = embedded(learner.pictures[name], WIDTHS.get(name, FILM))
        source = None if its is None else room.take("pictures", lambda its=its: its[0])
        if its is not None and source is None:
            continue
        more = sum(name in other.pictures for other in run.learners) - 1
        shown.setdefault(kind, []).append(
            {
                "source": source,
                "width": its[1] if its else 0,
                "height": its[2] if its else 0,
                "of": f"{run.label}, {learner.name}" if learner.name else run.label,
                "file": name,
                "more": more,
            }
        )
    return [{"kind": kind, "pictures": its} for kind, its in shown.items()]


def _notes(runs: Sequence[Run], groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return what is wrong, with the runs that it is wrong with."""
    found: dict[str, list[str]] = {}
    for run in runs:
        each: dict[str, list[str]] = {}
        firsts: dict[str, str] = {}
        for learner in run.learners:
            said = learner.outcome.get("diagnosis")
            for name, note in said.items() if isinstance(said, dict) else ():
                # Their figures differ: those of the first learner stand for all.
                each.setdefault(firsts.setdefault(name, str(note)), []).append(learner.name)
            if learner.outcome.get("skipped"):
                note = f"{learner.outcome['skipped']} steps were skipped: they left something NaN or infinite"
                each.setdefault(note, []).append(learner.name)
            failed = learner.curves.get("eval/failed")
            if failed is not None:
                steps = ", ".join(f"{step:.0f}" for step in failed[0][:5])
                each.setdefault(f"the evaluation after {steps} steps failed", []).append(
                    learner.name
                )
        for note, names in each.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            whom = f" ({names[0]}{more})" if len(run.learners) > 1 else ""
            found.setdefault(note, []).append(f"{run.label}{whom}")
        for words in run.words:
            found.setdefault(words.rstrip("."), []).append(run.label)
    for group in groups:
        labels = dict.fromkeys(run.label for run, _ in group.members)
        for note in compare.repeated(group):
            found.setdefault(note, []).append(", ".join(labels))
    return [(note, "; ".join(whom)) for note, whom in found.items()]


def _summary(run: Run) -> dict[str, Any]:
    seeds = [its.seed for its in run.learners if its.seed is not None]
    done = min(its.step for its in run.learners)
    frames = run.learners[0].outcome.get("frames") if run.script == "online" else done
    if run.script == "online" and not isinstance(frames, int | float):
        its = run.learners[0].curves.get("frames")
        frames = None if its is None or not len(its[1]) else int(its[1][-1])
    return {
        "run": run,
        "seeds": ", ".join(map(str, dict.fromkeys(seeds))),
        "done": frames,
        "kind": "environment steps" if run.script == "online" else "gradient steps",
        "latest": [its.latest for its in run.learners if its.latest is not None],
        "speed": _speed(run),
        "versions": next(
            (
                each["versions"]
                for each in reversed(run.times)
                if isinstance(each.get("versions"), dict)
            ),
            None,
        ),
    }


def _speed(run: Run) -> dict[str, Any] | None:
    """Add up the sessions of a run."""
    try:
        seconds = sum(float(each["seconds"]) for each in run.times)
        waited = sum(float(each["waited_for_evaluations"]) for each in run.times)
        steps = sum(int(each["to_step"]) - int(each["from_step"]) for each in run.times)
    except (KeyError, TypeError, ValueError):
        return None
    if not run.times or seconds <= 0:
        return None
    last = run.times[-1]
    return {
        "sessions": len(run.times),
        "seconds": seconds,
        "learners": len(run.learners),
        "updates": steps / (seconds - waited) if seconds > waited else None,
        "waited": waited / seconds,
        "execution": last.get("execution"),
        "device": last.get("device") or run.settings.get("compute.device"),
        "threads": last.get("threads") or run.settings.get("compute.threads"),
    }


def _shown(run: Run, key: str) -> str:
    return written(run.settings[key]) or "''" if key in run.settings else NONE


def _figure(value: Any) -> str:
    """Write a score."""
    return NONE if value is None or value != value else rounded(value)


def _plain(value: float) -> str:
    """Write a number without a power of ten, where that is short."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _value(value: float | None) -> str:
    """Write what may have any unit."""
    return NONE if value is None else _plain(value)


def _count(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds} s"
        if minutes
        else f"{seconds} s"
    )
