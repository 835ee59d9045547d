"""The contract of every algorithm of the recipes; one that is added has to pass it as it is."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

from runs import SMALL, rows
from test_mdp import ACTIONS, GAMMA, STATES, behaviour_value, data_set, entries, random_mdp, table
from torchrl_iql import TrainStep, checkpoint, load_dataset, load_policy
from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.algorithms.iql import IQL
from torchrl_iql_recipes.algorithms.onestep import OneStep
from torchrl_iql_recipes.experiment import build, offline, online
from torchrl_iql_recipes.experiment.choices import CONFIG, of_task, tasks
from torchrl_iql_recipes.experiment.networks import architecture_for
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

EVERY = pytest.mark.parametrize("name", algorithms())
SOME = pytest.mark.parametrize(
    "name",
    [n if n in ("iql", "dt") else pytest.param(n, marks=pytest.mark.slow) for n in algorithms()],
)
ONE = pytest.mark.parametrize(
    "name", [n if n == "bc" else pytest.param(n, marks=pytest.mark.slow) for n in algorithms()]
)
"""Of what takes long: some or one by default, all with ``-m slow``."""


def config(name: str, maze_id: str, *overrides: str) -> Settings:
    given = [f"algorithm={name}", f"dataset={maze_id}", *SMALL, "dropout=0.1", *overrides]
    # One learner, whatever the family has several of.
    axes = algorithms()[name].axes()
    return OFFLINE.settings([*given, *(["temperature=3"] if "temperature" in axes else [])])


def same(one: Path, other: Path) -> bool:
    policies = (load_policy(path / "last.ckpt").state_dict() for path in (one, other))
    one_state, other_state = policies
    return all(torch.equal(value, other_state[key]) for key, value in one_state.items())


def step_of(settings: Settings) -> tuple[TrainStep, Any]:
    dataset = settings.algorithm.data(build.dataset_for(settings.data))
    described = architecture_for(settings.networks, dataset, settings.algorithm)
    architecture = settings.algorithm.architecture(described, dataset)
    step = build.step_for(settings.learners, architecture, dataset, settings.compute, 60)
    return step, dataset.minibatches(32, seeds=[each.seed for each in settings.learners])


@EVERY
def test_its_step_warns_of_nothing(
    name: str, maze_id: str, recwarn: pytest.WarningsRecorder
) -> None:
    step, minibatches = step_of(config(name, maze_id))
    step.run(minibatches, 2)
    assert [str(each.message) for each in recwarn] == []


@EVERY
def test_it_has_a_title_and_a_file_of_settings_by_family(name: str) -> None:
    assert algorithms()[name].title
    assert (CONFIG / "algorithm" / f"{name}.yaml").exists()


@EVERY
def test_a_run_leaves_scores_and_a_policy_that_loads_alone(
    name: str, maze_id: str, tmp_path: Path
) -> None:
    settings = config(name, maze_id, "seeds=[1,2]")
    scores = offline.run(settings, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert (scores["version"], scores["algorithm"]) == (2, name)
    assert scores["summary"][0]["seeds"] == 2
    axes = {*algorithms()[name].axes(), "seed", "title", "score", "best", "steps", "interrupted"}
    assert axes <= scores["replicas"][0].keys()
    observation = load_dataset(maze_id).transitions["observation"][:5]
    policy = load_policy(tmp_path / "seed=2/last.ckpt")
    with torch.no_grad():
        action = policy(TensorDict({"observation": observation}, [5]))["action"]
    assert action.shape == (5, 2)
    recorded = checkpoint.load_metadata(tmp_path / "seed=2/last.ckpt")["config"]
    assert (recorded["algorithm"], recorded["seeds"]) == (name, 2)
    (learner,) = Settings.of(recorded).learners
    assert learner.algorithm == settings.learners[1].algorithm


@SOME
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, maze_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(name, maze_id)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = offline.run(settings, whole)
    save = checkpoint.save

    def save_and_die(*arguments: Any, **more: Any) -> None:
        save(*arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        offline.run(settings, parts)
    monkeypatch.undo()
    assert offline.run(settings, parts) == expected
    assert rows(parts) == rows(whole)
    assert same(parts, whole)


@ONE
def test_many_learners_are_single_runs(name: str, maze_id: str, tmp_path: Path) -> None:
    offline.run(config(name, maze_id, "seeds=[3,4]"), tmp_path / "many")
    for seed in (3, 4):
        offline.run(config(name, maze_id, f"seeds={seed}"), tmp_path / f"{seed}")
        assert same(tmp_path / f"{seed}", tmp_path / f"many/seed={seed}")
        assert rows(tmp_path / f"{seed}") == rows(tmp_path / f"many/seed={seed}")


@ONE
def test_compiled_is_eager(name: str, maze_id: str) -> None:
    """With the random numbers of eager code, which compiled code else draws in its own way; no dropout."""
    steps = {}
    for execution in ("eager", "compiled"):
        overrides = ["dropout=0", f"compute.execution={execution}"]
        step, minibatches = step_of(config(name, maze_id, *overrides))
        with torch._inductor.config.patch(fallback_random=True):
            step.run(minibatches, 30)
        assert step.execution == execution
        steps[execution] = step.losses[0].state_dict()
    for key, value in steps["eager"].items():
        torch.testing.assert_close(steps["compiled"][key], value, rtol=1e-4, atol=1e-5)


# --- What is particular to one -------------------------------------------------------------------------


def test_percent_bc_learns_from_the_best_episodes(maze_id: str) -> None:
    settings = config("percent_bc", maze_id, "share=0.25")
    dataset = build.dataset_for(settings.data)
    best = settings.algorithm.data(dataset)
    number = len(best.episode_returns)
    assert number == round(0.25 * len(dataset.episode_returns))
    ranked = dataset.episode_returns.sort(descending=True).values
    assert sorted(best.episode_returns, reverse=True) == list(ranked[:number])


def test_cloning_is_iql_at_temperature_0(maze_id: str) -> None:
    losses: dict[str, LossModule] = {}
    for name, given in (("bc", []), ("iql", ["temperature=0"])):
        settings = config(name, maze_id, "learning_rate=1e-2", "seeds=3", "dropout=0")
        if given:
            algorithm = settings.algorithm.model_copy(update={"temperature": 0.0})
            learner = dataclasses.replace(settings.learners[0], algorithm=algorithm)
            settings = dataclasses.replace(settings, learners=(learner,))
        step, minibatches = step_of(settings)
        step.run(minibatches, 60)
        losses[name] = step.losses[0]
    policies = (losses[n].get_stateful_net("actor_network").parameters() for n in losses)
    for cloned, other in zip(*policies, strict=True):
        torch.testing.assert_close(cloned, other, rtol=1e-4, atol=1e-5)


class Tables:
    """Networks with one free entry for each state and action."""

    discrete = True

    def policy(self) -> ProbabilisticActor:
        return ProbabilisticActor(
            TensorDictModule(table(ACTIONS), in_keys=["observation"], out_keys=["logits"]),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
        )

    def qvalues(self, number: int) -> list[TensorDictModule]:
        keys = {"in_keys": ["observation"], "out_keys": ["state_action_value"]}
        return [TensorDictModule(table(ACTIONS), **keys) for _ in range(number)]

    def value(self) -> ValueOperator:
        return ValueOperator(table(1), in_keys=["observation"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_onestep_learns_the_values_of_sarsa(seed: int) -> None:
    """Q of the policy that collected the data, which SARSA learns, solved exactly for a random MDP."""
    mdp = random_mdp(seed)
    torch.manual_seed(seed)
    loss = OneStep(discount=GAMMA).loss(Tables())  # pyright: ignore
    batch = data_set(mdp, "categorical")
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.9 * STATES)
    target = SoftUpdate(loss, tau=0.5)
    for _ in range(300):
        losses = loss(batch)
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        target.step()
    v = behaviour_value(mdp)
    sarsa = mdp.q(v)
    learned = entries(loss.qvalue_network_params).mT.numpy().reshape(STATES, ACTIONS)
    np.testing.assert_allclose(learned[mdp.seen], sarsa[mdp.seen], rtol=0, atol=1e-3)
    np.testing.assert_allclose(entries(loss.value_network_params)[0].numpy(), v, atol=1e-3)


def test_an_algorithm_with_columns_of_its_own_is_not_fine_tuned(
    maze_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is collected does not have them."""

    def data(self: IQL, dataset: Any) -> Any:
        more = dataset.transitions.clone().set("weight", torch.ones(len(dataset.transitions), 1))
        return dataclasses.replace(dataset, transitions=more)

    monkeypatch.setattr(IQL, "data", data)
    settings = ONLINE.settings([f"dataset={maze_id}", "temperature=3", "steps=10"])
    with pytest.raises(SettingsError, match=r"algorithm=iql learns from \['weight'\]"):
        online.data_for(settings)


@EVERY
def test_on_discrete_actions_it_learns_or_says_that_it_does_not(name: str, tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 200
    observations = rng.normal(size=(n + 1, 3)).astype(np.float32)
    np.savez(
        tmp_path / "log.npz",
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=rng.integers(3, size=n),
        rewards=rng.normal(size=n),
        terminals=np.arange(n) % 20 == 19,
    )
    quick = ["steps=3", "eval_episodes=0", "seeds=0", "batch_size=16", "compute.execution=eager"]
    settings = OFFLINE.settings(
        [f"algorithm={name}", f"dataset={tmp_path / 'log.npz'}", "action_space=3", *quick]
    )
    if name in ("awac", "td3bc", "cql", "dt"):
        with pytest.raises(SettingsError, match=r"discrete.* give another algorithm"):
            offline.run(settings, tmp_path / "run")
        return
    assert offline.run(settings, tmp_path / "run")["replicas"][0]["steps"] == 3
    policy = load_policy(tmp_path / "run/last.ckpt")
    taken = policy(TensorDict({"observation": torch.tensor(observations)}, [n + 1]))["action"]
    assert set(taken.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "policy"),
    [("awac", "gaussian"), ("cql", "heteroscedastic"), ("td3bc", "deterministic")],
)
def test_it_has_a_policy_that_it_can_train_in_every_task(name: str, policy: str) -> None:
    """Also where a task has one of its own, which is IQL's."""
    default = "gaussian"
    assert {task: of_task(task, name).get("policy", default) for task in tasks()} == dict.fromkeys(
        tasks(), policy
    )


def test_weights_may_have_no_bound() -> None:
    assert OFFLINE.settings(["weight_clip=inf"]).algorithm.weight_clip == math.inf  # pyright: ignore
    for value in ("nan", "0", "true", "text"):
        with pytest.raises(SettingsError, match=r"weight_clip=.*: expected a number above 0"):
            OFFLINE.settings([f"weight_clip={value}"])
