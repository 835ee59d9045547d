"""Episodes of a policy, what they are worth, and a film of the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, flatdim
from tensordict.nn import TensorDictModuleBase

from torchrl_iql import Evaluation, Evaluator, checkpoint, load_policy
from torchrl_iql.acting import Acting
from torchrl_iql.environments import observing, registered, spaces_of
from torchrl_iql.spaces import matrices, share_outside, sorted_space
from torchrl_iql_recipes.deployment import film
from torchrl_iql_recipes.deployment.settings import Play
from torchrl_iql_recipes.experiment import build
from torchrl_iql_recipes.experiment.networks import sizes
from torchrl_iql_recipes.experiment.schema import SettingsError

__all__ = ["environment_for", "report", "run"]


def run(settings: Play) -> Evaluation:
    """Play what the settings ask for, and print what it is worth.

    Raises:
        SettingsError: there is no such policy or environment, they do not fit each other, or a film is asked
            for that can not be made here.
    """
    assert settings.checkpoint is not None
    try:
        policy = load_policy(settings.checkpoint)
        spec = environment_for(settings, policy)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    if settings.video is not None:
        film.require(Path(settings.video), spec)
    # The reference returns of the data are of their environment.
    metadata = checkpoint.load_metadata(settings.checkpoint)
    references = metadata.get("reference_scores") if settings.env is None else None
    evaluator = Evaluator(
        spec,
        episodes=settings.episodes,
        seed=settings.seed,
        reference_scores=references and tuple(references),
    )
    with evaluator as evaluate:
        evaluation = evaluate(policy)
    print(report(spec.id, settings, evaluation))
    if settings.video is not None:
        film.write(Path(settings.video), spec, policy, settings.seed)
        print(f"The first episode: {settings.video}")
    return evaluation


def environment_for(settings: Play, policy: TensorDictModuleBase) -> EnvSpec:
    """Return the environment to play in, that shows what the policy reads.

    Args:
        settings: which may name it, as the checkpoint may.
        policy: that of the checkpoint.

    Raises:
        SettingsError: there is none, or it is for other policies.
        ValueError: it can not be built, or it is not registered here.
    """
    assert settings.checkpoint is not None
    spec = _own(settings) if settings.env is None else build.environment(settings.env)
    assert spec is not None
    act: Acting = policy.act  # pyright: ignore
    observed, shown = act.observation_space, spaces_of(spec)[0]
    if isinstance(observed, Dict) and isinstance(shown, Dict) and {*observed} < {*shown}:
        spec = observing(spec, list(observed))
    shown, taken = spaces_of(spec)
    known = sizes(flatdim(observed), act.action_space), sizes(flatdim(shown), taken)
    refused = f"the policy of {settings.checkpoint} is for {known[0]}, but {spec.id} has"
    if known[0] != known[1]:
        raise SettingsError(f"{refused} {known[1]}: give env=<id> of another")
    has, shows = matrices(observed), matrices(sorted_space(shown))
    if has and shows and has != shows:
        raise SettingsError(
            f"{refused} observations of {shown}, not of {observed}: give env=<id> of another"
        )
    bounds = checkpoint.load_architecture(settings.checkpoint).action_bounds
    if isinstance(taken, Box) and bounds is not None and share_outside(taken, np.array(bounds)):
        raise SettingsError(
            f"{refused} some in {taken}, and it takes {bounds}: give env=<id> of another"
        )
    return spec


def _own(settings: Play) -> EnvSpec:
    stored = checkpoint.load_metadata(str(settings.checkpoint)).get("env")
    if stored is None:
        raise SettingsError(
            f"checkpoint={settings.checkpoint} does not name an environment: give env=<id>"
        )
    spec = EnvSpec.from_json(stored)
    return spec if settings.trust_env else registered(spec)


def report(name: str, settings: Play, evaluation: Evaluation) -> str:
    """Write means with their standard errors."""
    summary, last = evaluation.summary(), settings.seed + settings.episodes - 1
    played = f"{settings.episodes} episodes, seeds {settings.seed} to {last}"
    lines = [f"{name}, {played if settings.episodes > 1 else f'1 episode, seed {last}'}"]
    for key, title in [
        ("normalized_score", "normalized score"),
        ("success", "success"),
        ("return", "return"),
        ("length", "length"),
    ]:
        if key in summary:
            error = summary.get(f"{key}_stderr")
            digits = 3 if key == "success" else 1
            spread = "" if error is None else f" ± {error:.{digits}f}"
            lines.append(f"{title:<18}{summary[key]:>10.{digits}f}{spread}")
    return "\n".join(lines)
