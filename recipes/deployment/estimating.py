"""What policies are worth by data alone, in words, and ranked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gymnasium.spaces import flatdim
from tensordict.nn import TensorDictModuleBase
from tqdm import tqdm

from torchrl_iql import OfflineDataset, checkpoint, load_policy
from torchrl_iql.acting import Acting
from torchrl_iql.data.logs import is_logs
from torchrl_iql.estimation import SWEEPS, DataReturn, FittedQ, fitted_q, importance_sampling
from torchrl_iql.models import Architecture
from torchrl_iql.nested import texts
from torchrl_iql.training import NonFiniteError
from torchrl_iql_recipes.deployment.settings import Estimation
from torchrl_iql_recipes.experiment import build, progress
from torchrl_iql_recipes.experiment.networks import sizes
from torchrl_iql_recipes.experiment.schema import RunError, SettingsError, written
from torchrl_iql_recipes.experiment.settings import Compute, Data
from torchrl_iql_recipes.experiment.validation import SEED
from torchrl_iql_recipes.files import whole

__all__ = ["Judged", "data_for", "estimate", "ranked", "run", "summary", "told", "verdict"]

OF_THE_POLICY = ("observation_keys", "action_space", "maze", "env")
"""Settings of the data that have to be as they were in the run."""

OTHERWISE = 0.99
"""The discount, if no run has one."""

APART = 2.0
"""Standard deviations from which on two estimates are told apart."""

FAR = 1.0
"""Distance from the data's actions of a policy that always takes their mean."""

CLIPPED = 0.1
"""Share of targets at their bounds, from which on the networks diverge."""


@dataclass(frozen=True)
class Judged:
    """A policy, and what it is worth.

    Attributes:
        path: of its checkpoint.
        policy: of it.
        architecture: of its networks.
        config: the settings of its run, empty if it has none.
    """

    path: str
    policy: TensorDictModuleBase
    architecture: Architecture
    config: Mapping[str, Any]

    @classmethod
    def load(cls, path: str) -> Judged:
        """Load a policy that acts by the present observation alone.

        Raises:
            SettingsError: there is none, or it acts by more.
        """
        try:
            policy, architecture = load_policy(path), checkpoint.load_architecture(path)
            config = checkpoint.load_metadata(path).get("config") or {}
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise SettingsError(f"checkpoint={path}: {error}") from error
        if list(policy.in_keys) != ["observation"]:
            raise SettingsError(
                f"checkpoint={path}: a {architecture.policy.replace('_', ' ')} acts by more than the present "
                "observation, and a Q of it says nothing of that: give another checkpoint"
            )
        return cls(path, policy, architecture, config)

    def q_architecture(self, hidden_sizes: Sequence[int]) -> Architecture:
        """Return that of the networks that are fitted to it: they see what it sees, normalised."""
        is_seen = bool(self.architecture.images)
        return replace(
            self.architecture, hidden_sizes=hidden_sizes, normalize_observation=not is_seen
        )


def run(settings: Estimation, compute: Compute) -> dict[str, FittedQ]:
    """Estimate what the settings ask for, and print it.

    Raises:
        SettingsError: there is no such policy or data set, or they do not fit each other.
    """
    build.set_up(compute)
    judged = [Judged.load(path) for path in dict.fromkeys(settings.checkpoints)]
    discount = settings.discount or _agreed("discount", judged, OTHERWISE)
    if discount == 1:
        raise SettingsError(
            "discount=1, that of the runs, has no values without an end: give discount=0.99"
        )
    dataset = data_for(settings, judged)
    for each in judged:
        _require_fit(each, dataset)
    print(_of_data(settings, dataset), flush=True)
    found: dict[str, FittedQ] = {}
    try:
        for number, each in enumerate(judged, start=1):
            title = "fitting" if len(judged) == 1 else f"fitting {number} of {len(judged)}"
            with progress.bar(title, 0, settings.steps, leave=False) as bar:
                found[each.path] = estimate(each, dataset, discount, settings, compute, bar.update)
            if len(judged) > 1:
                its = found[each.path]
                tqdm.write(f"{each.path}: {its.value:.4g} ± {its.spread:.2g}")
    except KeyboardInterrupt:
        kept = settings.output if found and settings.output is not None else "nothing"
        done = f"{len(found)} of {len(judged)} policies judged"
        tqdm.write(f"Interrupted: {done}; {kept} has what was found", file=sys.stderr)
        raise
    finally:
        if settings.output is not None and found:
            _write(Path(settings.output), found, dataset, discount, settings)
    lines = ranked(found, discount) if len(judged) > 1 else told(*found.values(), discount)
    if settings.log_prob is not None:
        lines += [_weighted(each, dataset, settings.log_prob, discount) for each in judged]
    print("\n".join(lines))
    return found


def estimate(
    judged: Judged,
    dataset: OfflineDataset,
    discount: float,
    settings: Estimation,
    compute: Compute,
    progress: Any = None,
) -> FittedQ:
    """Fit Q to a policy."""
    try:
        return fitted_q(
            judged.policy,
            dataset,
            discount=discount,
            networks=settings.networks,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            target_rate=settings.target_rate,
            architecture=judged.q_architecture(settings.hidden_sizes),
            seed=settings.seed,
            device=compute.device,
            execution=compute.execution,
            streaming=compute.streaming,
            progress=progress,
        )
    except NonFiniteError as error:
        raise RunError(
            f"checkpoint={judged.path}: Q is no longer finite, {error}; give a smaller learning_rate"
        ) from error


def data_for(settings: Estimation, judged: Sequence[Judged]) -> OfflineDataset:
    """Return the data to judge by, as the runs of the policies read them, with rewards as recorded.

    Raises:
        SettingsError: the runs had different ones, and none are given; or they can not be read.
    """
    known = [each for each in judged if each.config]
    values = {name: _agreed(name, known, None) for name in OF_THE_POLICY}
    values["dataset"] = settings.dataset or _agreed("dataset", known, None)
    if values["dataset"] is None:
        raise SettingsError(
            f"checkpoint={judged[0].path} does not name its data: give dataset=<id>"
        )
    values["layout"] = settings.layout
    if settings.layout is None and all(is_logs(each, {}) for each in texts(values["dataset"])):
        values["layout"] = _agreed("layout", known, None)
    values["columns"] = [] if settings.log_prob is None else [settings.log_prob]
    values["episodes"] = settings.episodes or _agreed("episodes", known, "as_stored")
    if any(":" in text for text in texts(values["env"])) and not settings.trust_env:
        raise SettingsError(
            f"checkpoint={judged[0].path}: the env stored there may bring in code: if you trust who made "
            "it, add trust_env=true"
        )
    data = Data.of({**values, "trust_env": settings.trust_env})
    try:
        dataset = build.dataset_for(data, played=False)
    except SettingsError as error:
        if settings.dataset is not None:
            raise
        raise SettingsError(
            f"{error}; that is what the run of {judged[0].path} learned from: where it is elsewhere, give "
            "dataset=<it>"
        ) from error
    if settings.fit_on == "all":
        return dataset
    share = _agreed("validation", known, 0.0)
    if not share:
        raise SettingsError(
            f"fit_on={settings.fit_on}: the run of {judged[0].path} held nothing out (validation=0), give "
            "fit_on=all"
        )
    learned, held_out = dataset.split(share, seed=SEED)
    return learned if settings.fit_on == "learned" else held_out


def _agreed(name: str, judged: Sequence[Judged], otherwise: Any) -> Any:
    """Return what a setting was in all runs that have it."""
    its = [(each.path, each.config[name]) for each in judged if each.config.get(name) is not None]
    for path, value in its[1:]:
        if written(value) != written(its[0][1]):
            raise SettingsError(
                f"{name} was {written(its[0][1])} in the run of {its[0][0]} and {written(value)} in that of "
                f"{path}: give one{'' if name in Estimation.model_fields else ' checkpoint at a time'}"
            )
    return its[0][1] if its else otherwise


def _require_fit(judged: Judged, dataset: OfflineDataset) -> None:
    act: Acting = judged.policy.act  # pyright: ignore
    known = sizes(flatdim(act.observation_space), act.action_space)
    given = sizes(dataset.transitions["observation"].shape[-1], dataset.action_space)
    if known != given:
        raise SettingsError(
            f"the policy of {judged.path} is for {known}, but {dataset.name} has {given}: give "
            "another dataset"
        )


# --- In words ------------------------------------------------------------------------------------------


def _of_data(settings: Estimation, dataset: OfflineDataset) -> str:
    what = {"all": "all", "learned": "those learned from", "held_out": "those held out"}[
        settings.fit_on
    ]
    ends = "" if dataset.episode_rule == "as_stored" else ", until success"
    episodes, transitions = len(dataset.episode_lengths), len(dataset.transitions)
    return f"{dataset.name}: {what} episodes, {episodes:,} with {transitions:,} transitions{ends}"


def told(its: FittedQ, discount: float) -> list[str]:
    """Write what was found of one policy."""
    spread = f"{its.value:>10.4g} ± {its.spread:.2g}"
    return [
        f"{'estimate':<12}{spread}  of the return, discounted by {discount:g}, from where episodes begin",
        _data_line(its.of_data),
        f"{'distance':<12}{its.distance:>10.2g}  of its actions from the data's, over the spread of these",
        verdict(its),
    ]


def _data_line(its: DataReturn) -> str:
    if not its.episodes:
        return f"{'data':<12}{'-':>10}  every episode is cut before its return is known"
    figures = f"{its.value:>10.4g} ± {its.stderr:.2g}"
    known = f"the {its.episodes:,} episodes whose return is known; the best {its.best:.4g}"
    if its.cut:
        known += f"; {its.cut:,} are cut before, at {its.paid_until_cut:.4g} until then"
    return f"{'data':<12}{figures}  of {known}"


def _weighted(judged: Judged, dataset: OfflineDataset, log_prob: str, discount: float) -> str:
    """Write what importance sampling says, or why it says nothing."""
    title = f"importance sampling, {judged.path}:"
    try:
        its = importance_sampling(judged.policy, dataset, log_prob=log_prob, discount=discount)
    except ValueError as error:
        return f"{title} {error}"
    return f"{title} {its.value:.4g} ± {its.stderr:.2g}, of {its.effective_episodes:.1f} effective episodes"


def verdict(its: FittedQ) -> str:
    """Say what an estimate tells, and whether it does."""
    if its.clip_fraction > CLIPPED:
        low, high = its.bounds
        return (
            f"Not to be trusted: Q diverges, {its.clip_fraction:.0%} of the targets are beyond the bounds of "
            f"what is possible, {low:.4g} to {high:.4g}."
        )
    if its.sweeps < SWEEPS:
        return (
            f"Not to be trusted: steps times target_rate times (1 - discount) is {its.sweeps:.2g}, "
            f"expected at least {SWEEPS:g}; give more steps."
        )
    if not its.is_converged:
        return (
            f"Not to be trusted: not converged, it moved by {its.drift:.2g} in the last fifth of the "
            "steps; give more steps."
        )
    far = ""
    if its.distance > FAR:
        far = " It does what the data hardly show: this is an extrapolation, whatever the networks agree on."
    data = its.of_data
    if not data.episodes:
        return f"There is nothing in the data to compare it with.{far}"
    name = "the data's episodes that end" if data.cut else "the data"
    error = math.hypot(*(0.0 if math.isnan(each) else each for each in (its.spread, data.stderr)))
    difference = its.value - data.value
    if its.value > data.best and data.episodes > 1:
        said = "Above every episode of the data: better than all of them, or, more often, too high."
    elif abs(difference) <= APART * error:
        said = f"As good as {name}, as far as this can tell."
    else:
        said = f"{'Better' if difference > 0 else 'Worse'} than {name}, by {abs(difference):.2g}."
    return said + far


def ranked(found: Mapping[str, FittedQ], discount: float) -> list[str]:
    """Write what was found of several policies, the best first, and which of them are told apart."""
    order = sorted(found, key=lambda path: -found[path].value)
    best = found[order[0]]
    lines = [f"Return, discounted by {discount:g}, from where episodes begin:"]
    width = max(map(len, order))
    alike, doubtful = [], False
    for place, path in enumerate(order, start=1):
        its = found[path]
        notes = [f"distance {its.distance:.2f}"]
        if its.clip_fraction > CLIPPED:
            notes.append("diverges")
        elif not its.is_converged:
            notes.append("not converged")
        doubtful |= len(notes) > 1
        figures = f"{its.value:>10.4g} ± {its.spread:<8.2g}"
        lines.append(f"{place:>3}. {path:<{width}}{figures}{', '.join(notes)}")
        difference = best.members - its.members  # on the same draws of episodes
        if place > 1 and not difference.mean() > APART * difference.std():
            alike.append(place)
    lines.append(_data_line(best.of_data))
    lines += [f"{place:>3}. {verdict(found[path])}" for place, path in enumerate(order, start=1)]
    if doubtful:
        lines.append("Which is the best is not known before all of them can be trusted.")
    elif alike:
        lines.append(
            f"Not told apart from the first, by {APART:g} standard deviations of the difference: "
            f"{', '.join(map(str, alike))}."
        )
    else:
        lines.append(
            f"The first is apart from all others, by more than {APART:g} standard deviations."
        )
    return lines


def _write(
    file: Path,
    found: Mapping[str, FittedQ],
    dataset: OfflineDataset,
    discount: float,
    settings: Estimation,
) -> None:
    """Write the results, of what is there."""
    policies = [
        {"checkpoint": path, **summary(its), "verdict": verdict(its)}
        for path, its in sorted(found.items(), key=lambda each: -each[1].value)
    ]
    content = {
        "dataset": dataset.name,
        "fit_on": settings.fit_on,
        "discount": discount,
        "steps": settings.steps,
        "data": _plain(asdict(next(iter(found.values())).of_data)),
        "policies": policies,
    }
    with whole(file) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")


def summary(its: FittedQ) -> dict[str, Any]:
    """Return the figures of an estimate, as JSON holds them."""
    return _plain(
        {
            "value": its.value,
            "spread": its.spread,
            "members": its.members.tolist(),
            "drift": its.drift,
            "converged": its.is_converged,
            "clip_fraction": its.clip_fraction,
            "distance": its.distance,
        }
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return them with null for NaN."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
