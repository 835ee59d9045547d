"""What the command line says is what runs: every setting, on every way in, takes effect or is refused.

Effect: the parameters after a few steps are those of a plain loop that is given the value itself (a loss,
torch's Adam, TorchRL's SoftUpdate), and not those with the value from before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tensordict import TensorDict
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torchrl.objectives import BCLoss, SoftUpdate

from episodes import record, write
from online_envs import diary
from runs import rows
from torchrl_iql import AWACLoss, IQLLoss, OfflineDataset, TrainStep, checkpoint, load_dataset
from torchrl_iql.models import Architecture
from torchrl_iql.objectives import CQLLoss, DTLoss, TD3BCLoss
from torchrl_iql.online import Experience, behavior, collecting, environment, transitions
from torchrl_iql_recipes.algorithms import algorithms
from torchrl_iql_recipes.experiment import build, offline, online, plots
from torchrl_iql_recipes.experiment.networks import architecture_for, architecture_of
from torchrl_iql_recipes.experiment.schema import SettingsError, written
from torchrl_iql_recipes.experiment.settings import PARTS, Settings
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

DATASET = "effect/diary-v0"

BASE: dict[str, Any] = {
    "dataset": DATASET,
    "reward": "none",
    "episodes": "as_stored",
    "n_steps": 1,
    "validation": 0.0,
    "policy": "gaussian",
    "action_bounds": "space",
    "hidden_sizes": [16],  # as wide as the stack, whose dropout draws as many numbers
    "dropout": 0.0,
    "normalize_observation": False,
    "steps": 10,
    "seeds": 0,
    "batch_size": 16,
    "learning_rate": 0.01,
    "decay_steps": None,
}
OF_IQL = {"discount": 0.9, "target_rate": 0.05, "temperature": 0.3, "weight_clip": 1.2}
OF_ALGORITHM: dict[str, dict[str, Any]] = {
    "iql": {**OF_IQL, "expectile": 0.7, "num_qvalue_nets": 2},
    "onestep": {**OF_IQL, "num_qvalue_nets": 1},
    "bc": {},
    "percent_bc": {"share": 0.5},
    "dt": {"context": 3, "warm_up_steps": 4, "weight_decay": 0.5, "max_grad_norm": 0.02},
    "awac": {**OF_IQL, "num_qvalue_nets": 2},
    "td3bc": {
        **{"discount": 0.9, "target_rate": 0.05, "alpha": 2.5},
        **{"policy_noise": 0.2, "noise_clip": 0.5, "policy_interval": 2},
    },
    "cql": {
        **{"discount": 0.9, "target_rate": 0.05, "alpha": 2.0, "policy_learning_rate": 0.02},
        **{"gap": None, "num_random": 4, "max_q_backup": False},
    },
}
POLICIES = {"td3bc": "deterministic", "cql": "heteroscedastic"}
"""What some algorithms need."""
OF_COLLECTION = {"env_steps": 20, "updates_per_frame": 1.0, "exploration": 1.0}
OF_COLLECTION |= {"offline_share": None, "anneal_steps": None, "collector.frames_per_batch": 10}

CHANGED: dict[str, Any] = {
    "dataset": [DATASET, DATASET],
    "reward": "minus_one",
    "episodes": "until_success",
    "n_steps": 3,
    "validation": 0.4,
    "policy": "squashed",
    "action_bounds": "data",
    "hidden_sizes": [6, 5],
    "dropout": 0.5,
    "normalize_observation": True,
    "steps": 14,
    "seeds": 5,
    "batch_size": 8,
    "learning_rate": 0.03,
    "decay_steps": 5,
    "discount": 0.5,
    "target_rate": 0.5,
    "expectile": 0.9,
    "temperature": 0.1,
    "weight_clip": 0.8,
    "num_qvalue_nets": 3,
    "share": 0.2,
    "context": 5,
    "warm_up_steps": 0,
    "weight_decay": 3.0,
    "max_grad_norm": 0.1,
    "alpha": 0.5,
    "policy_noise": 0.8,
    "noise_clip": 0.01,
    "policy_interval": 3,
    "policy_learning_rate": 0.005,
    "gap": 0.5,
    "num_random": 7,
    "max_q_backup": True,
    "env_steps": 10,
    "updates_per_frame": 0.5,
    "exploration": 0.5,
    "offline_share": 0.25,
    "anneal_steps": 15,
    "collector.frames_per_batch": 5,
}
"""Every setting that parameters depend on, and another value than in ``BASE`` and so on."""

ELSEWHERE = {
    "env": "test_recipe.py::test_the_environment_is_an_id_with_arguments",
    "trust_env": "test_trust.py",
    "maze": "test_antmaze.py",
    "encoder": "test_images.py::test_the_recipes_train_on_images",
    "layout": "test_logs.py::test_the_recipe_trains_on_logs",
    "observation_keys": "test_recipe.py::test_what_is_observed_and_kept_is_as_asked",
    "action_space": "test_recipe.py::test_the_bounds_of_actions_are_as_asked",
    "columns": "test_recipe.py::test_what_is_observed_and_kept_is_as_asked",
    "target_return": "test_decision_transformer.py::test_the_return_that_is_aimed_at_is_a_setting_in_the_"
    "units_of_the_environment",
    "checkpoint": "here: a way in",
    "log_interval": "test_what_is_watched_is_as_asked",
    "on_nonfinite": "test_nonfinite.py::test_an_offline_run_ends_with_one_line_and_goes_on_without_the_step",
    "checkpoint_interval": "test_life.py::test_checkpoints_are_apart_from_evaluations",
    "on_eval_failure": "test_life.py::test_an_evaluation_that_failed_can_end_the_run",
    "eval_interval": "test_what_is_watched_is_as_asked",
    "eval_episodes": "test_what_is_watched_is_as_asked",
    "eval_workers": "test_what_is_watched_is_as_asked",
    "best_by": "test_held_out.py",
    "compute.device": "test_what_can_not_be_computed_changes_no_settings",
    "compute.execution": "test_how_it_is_computed_is_as_asked",
    "compute.streaming": "test_how_it_is_computed_is_as_asked",
    "compute.threads": "test_how_it_is_computed_is_as_asked",
    "compute.matmul_precision": "test_how_it_is_computed_is_as_asked",
    "logger.backend": "test_a_logger_is_told",
    "collector.backend": "test_online.py::test_every_collector_collects_the_same_kind_of_data",
    "collector.sync": "test_online.py::test_every_collector_collects_the_same_kind_of_data",
    "collector.num_collectors": "test_online.py::test_every_collector_collects_the_same_kind_of_data",
    "collector.backend_options": "test_online.py::test_ray_collects_the_same_kind_of_data",
}
"""Every other setting, and the test that shows what it does."""

NETWORKS = {"policy", "action_bounds", "hidden_sizes", "dropout", "normalize_observation"}
NETWORKS |= {"gap", "num_qvalue_nets", "context"}
OFFLINE_ONLY = {"n_steps", "steps", "decay_steps"}
EXTENDS = {"steps", "decay_steps", "env_steps"}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Store a small data set; and draw no pictures, which take most of the time of such runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        patch.setattr(plots, "learning_curves", lambda *_, **__: None)
        env, rng = gymnasium.make(diary(success_at=5)), np.random.default_rng(0)
        walks = [
            record(env, seed, lambda _: rng.uniform(-0.9, 0.8, 1).astype(np.float32))
            for seed in range(12)
        ]
        write(*walks, dataset_id=DATASET, env=env)
        gymnasium.register(
            "test/Diary-v0", "online_envs:Diary"
        )  # or the data set could not name it
        yield
        del gymnasium.registry["test/Diary-v0"]


def given(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={written(value)}" for name, value in values.items()]


QUICK = ["compute.execution=eager", "compute.threads=1"]


def base_of(algorithm: str) -> dict[str, Any]:
    return {**BASE, "policy": POLICIES.get(algorithm, BASE["policy"])}


def started(algorithm: str, **changed: Any) -> Settings:
    """Return the settings of a new offline run."""
    values = {**base_of(algorithm), **OF_ALGORITHM[algorithm], **changed}
    return OFFLINE.settings([f"algorithm={algorithm}", "eval_episodes=0", *QUICK, *given(values)])


def changed(settings: Settings, change: Mapping[str, Any]) -> Settings:
    """Return settings with others, as the command line gives them, which takes half a second."""
    values = dict(settings.values)
    for name, value in change.items():
        group, _, key = name.rpartition(".")
        values |= {group: {**values[group], key: value}} if group else {key: value}
    return Settings.of(values)


def check_given(door: Any, overrides: list[str], change: Mapping[str, Any]) -> None:
    """Check that the command line gives these, and leaves the others."""
    before = door.settings(overrides)
    assert door.settings([*overrides, *given(change)]) == changed(before, change)


# --- The plain loop ------------------------------------------------------------------------------------


BOUNDS = torch.tensor([-1.0]), torch.tensor([1.0])


def awac(policy: Any, qvalues: Any, values: Mapping[str, Any]) -> Any:
    given = {name: values[name] for name in ("temperature", "weight_clip", "num_qvalue_nets")}
    return AWACLoss(policy, qvalues, bounds=BOUNDS, **given)


def td3bc(policy: Any, qvalues: Any, values: Mapping[str, Any]) -> Any:
    given = {name: values[name] for name in ("alpha", "policy_noise", "noise_clip")}
    return TD3BCLoss(policy, qvalues, bounds=BOUNDS, **given)


def cql(policy: Any, qvalues: Any, values: Mapping[str, Any]) -> Any:
    given = {name: values[name] for name in ("num_random", "max_q_backup")}
    if values["gap"] is not None:
        given |= {"with_lagrange": True, "lagrange_thresh": values["gap"]}
    own = {"bounds": BOUNDS, "min_q_weight": values["alpha"], "target_entropy": -1.0}
    return CQLLoss(policy, qvalues, **own, **given)


ACTOR_CRITICS = {"awac": awac, "td3bc": td3bc, "cql": cql}


class Plain:
    """A loop in code, given values of settings."""

    def __init__(
        self, algorithm: str, values: Mapping[str, Any], start: Plain | None = None
    ) -> None:
        self.algorithm, self.values = algorithm, values
        rules = {"reward": values["reward"], "episodes": values["episodes"]}
        self.dataset = load_dataset(values["dataset"], **rules)
        if values["validation"]:
            self.dataset, _ = self.dataset.split(values["validation"])
        if "share" in values:
            self.dataset = self.dataset.best_episodes(values["share"])
        if "context" in values:
            self.dataset = self.dataset.windows(values["context"])
        if values["n_steps"] > 1:
            self.dataset = self.dataset.n_step(values["n_steps"], values["discount"])
        self.architecture = start.architecture if start else self._architecture()
        torch.manual_seed(values["seeds"])
        statistics = self.dataset.observation_statistics()
        make = self.architecture
        policy = make.policy_network(statistics)
        if "context" in values:
            self.loss: Any = DTLoss(policy.on_windows())  # pyright: ignore
            self.target = None
        elif algorithm in ACTOR_CRITICS:
            networks = [
                make.qvalue_network(statistics) for _ in range(values.get("num_qvalue_nets", 2))
            ]
            self.loss = ACTOR_CRITICS[algorithm](policy, networks, values)
            self.loss.make_value_estimator(gamma=values["discount"])
            self.target = SoftUpdate(self.loss, tau=values["target_rate"])
        elif "num_qvalue_nets" not in values:
            self.loss = BCLoss(policy)
            self.target = None
        else:
            n = values["num_qvalue_nets"]
            qvalues = [make.qvalue_network(statistics) for _ in range(n)]
            self.loss = IQLLoss(policy, qvalues, make.value_network(statistics), num_qvalue_nets=n)
            self.set(values)
            self.target = SoftUpdate(self.loss, tau=values["target_rate"])
        if start is not None:
            learned = start.learned()
            self.loss.load_state_dict({**self.loss.state_dict(), **learned})
        named = list(self.loss.named_parameters())
        actor = [parameter for name, parameter in named if name.startswith("actor")]
        others = [parameter for name, parameter in named if not name.startswith("actor")]
        groups = [{"params": its} for its in (actor, others) if its]
        if "policy_learning_rate" in values:
            alone = [its for its in others if its is getattr(self.loss, "log_alpha", None)]
            groups[1]["params"] = [its for its in others if its is not alone[0]]
            groups.append({"params": alone, "lr": values["policy_learning_rate"]})
        self.taken = 0
        decay = values.get("weight_decay", 0.0)
        self.optimizer = torch.optim.AdamW(groups, lr=values["learning_rate"], weight_decay=decay)

    def _architecture(self) -> Architecture:
        values, actions = self.values, self.dataset.transitions["action"]
        bounds = {
            "space": ([-1.0], [1.0]),
            "data": (actions.amin(0).tolist(), actions.amax(0).tolist()),
        }
        names = ("policy", "hidden_sizes", "dropout", "normalize_observation")
        own = {name: values[name] for name in names}
        if "context" in values:
            options = {"context": values["context"], "episode_length": 7, "target_return": 28.0}
            own |= {
                "policy": "decision_transformer",
                "policy_options": {**options, "return_scale": 28},
            }
        return Architecture(
            observation_size=3,
            action_size=1,
            action_bounds=bounds[values["action_bounds"]],
            **own,
        )

    def set(self, values: Mapping[str, Any]) -> None:
        """Set what the loss computes with."""
        self.loss.expectile = values.get("expectile", 0.5)
        self.loss.temperature, self.loss.weight_clip = values["temperature"], values["weight_clip"]
        self.loss.make_value_estimator(gamma=values["discount"])

    def step(self, batch: TensorDict) -> None:
        losses = self.loss(batch)
        self.optimizer.zero_grad()
        entries = [
            key for key in losses.keys() if key.startswith("loss_") and key != "loss_actor_bc"
        ]
        sum(losses[key] for key in entries).backward()
        self.taken += 1
        is_due = self.taken % self.values.get("policy_interval", 1) == 0
        if not is_due:
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None
        if "max_grad_norm" in self.values:
            clip_grad_norm_(self.loss.parameters(), self.values["max_grad_norm"])
        self.optimizer.step()
        if self.target is not None and is_due:
            self.target.step()

    def offline(self) -> Plain:
        """Take the steps of an offline run; its minibatches and noise depend on the seed."""
        values, data = self.values, self.dataset.transitions
        seeds = np.random.SeedSequence(values["seeds"], spawn_key=(0,))
        size = 100, values["batch_size"]
        indices = torch.from_numpy(np.random.default_rng(seeds).integers(len(data), size=size))
        indices = self._with_those_that_follow(indices)
        length = values["steps"] if values["decay_steps"] is None else values["decay_steps"]
        rise = values.get("warm_up_steps") or 1
        rate = values.get("policy_learning_rate", values["learning_rate"])
        torch.manual_seed(values["seeds"])
        for t in range(values["steps"]):
            factor = 0.5 * (1 + math.cos(math.pi * min(t / length, 1))) if length else 1.0
            factor *= min((t + 1) / rise, 1)
            self.optimizer.param_groups[0]["lr"] = rate * factor
            self.step(data[indices[t]])
        return self

    def _with_those_that_follow(self, indices: Tensor) -> Tensor:
        if "context" not in self.values:
            return indices
        each = [indices + k for k in range(self.values["context"])]
        return torch.stack(each, -1).clamp(max=len(self.dataset.transitions) - 1)

    def online(self, changed: Mapping[str, Any]) -> Plain:
        """Go on in the environment under changed settings, with the same moments."""
        values = {**self.values, **OF_COLLECTION, **changed}
        its = Plain(self.algorithm, values, self)
        its.optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))
        for group in its.optimizer.param_groups:
            group["lr"] = values["learning_rate"]
        dataset = its.dataset
        mix = {key: values[key] for key in ("offline_share", "anneal_steps")}
        experience = Experience(dataset, values["env_steps"], values["batch_size"], **mix)
        policy = self.architecture.policy_network().eval()
        trained = its.loss.get_stateful_net("actor_network")
        policy.load_state_dict(trained.state_dict())
        rules = {"reward_transform": dataset.reward_transform, "episode_rule": dataset.episode_rule}
        acting = behavior(policy, Box(-1, 1, (1,)), noise=values["exploration"])
        updates = 0
        with collecting(
            partial(environment, dataset.env_spec, **rules),
            acting,
            total_frames=values["env_steps"],
            explore=values["exploration"] > 0,
            seed=values["seeds"],
            backend="direct",
            frames_per_batch=values["collector.frames_per_batch"],
        ) as collector:
            (seed,) = np.random.SeedSequence([values["seeds"], 0]).generate_state(1)
            torch.manual_seed(int(seed))
            collector.set_seed(int(seed))
            collector.reset()
            for batch in collector:
                experience.extend(transitions(batch, dataset.transitions))
                while updates < int(len(experience) * values["updates_per_frame"]):
                    its.step(experience.sample())
                    updates += 1
                policy.load_state_dict(trained.state_dict())
                collector.update_policy_weights_()
        return its

    def learned(self) -> dict[str, Tensor]:
        own = {name for name, _ in self.loss.named_parameters()}
        state = self.loss.state_dict().items()
        return {k: v.clone() for k, v in state if "_params." in k or k in own}

    def learned_by(self, folder: Path) -> dict[str, Tensor]:
        """Read what a run with the same networks has learned."""
        its = deepcopy(self)
        checkpoint.load_learner(folder / "last.ckpt", TrainStep(its.loss))
        return its.learned()


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-5, atol=1e-5, msg=key)


def assert_differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert any(
        one[key].shape != other[key].shape or (one[key] - other[key]).abs().max() > 1e-4
        for key in one.keys() & other.keys()
    )


# --- All settings --------------------------------------------------------------------------------------


def names_of(*parts: Any) -> set[str]:
    return {name for part in parts for name in part.names()}


def test_every_setting_is_here() -> None:
    every = names_of(*PARTS.values(), *algorithms().values())
    assert {*CHANGED, *ELSEWHERE} == every
    assert not CHANGED.keys() & ELSEWHERE.keys()
    assert OF_ALGORITHM.keys() == algorithms().keys()
    for name, schema in algorithms().items():
        own = names_of(schema) - ELSEWHERE.keys()
        assert {*OF_ALGORITHM[name], "learning_rate", "decay_steps"} == own
    for shown in ELSEWHERE.values():
        file, _, test = shown.rpartition("::")
        if shown.endswith(".py"):
            assert Path(__file__).with_name(shown).exists()
        elif test.startswith("test_"):
            assert f"def {test}(" in Path(__file__).with_name(file or "test_effect.py").read_text()


# --- A new run -----------------------------------------------------------------------------------------

NEW = [("iql", name) for name in BASE] + [
    (a, name) for a, its in OF_ALGORITHM.items() for name in its
]


@pytest.fixture(scope="module")
def new() -> dict[str, Settings]:
    return {algorithm: started(algorithm) for algorithm in OF_ALGORITHM}


@pytest.fixture(scope="module")
def plain() -> dict[str, Plain]:
    return {
        name: Plain(name, {**base_of(name), **own}).offline() for name, own in OF_ALGORITHM.items()
    }


@pytest.mark.parametrize(("algorithm", "name"), NEW)
def test_of_a_new_run(
    algorithm: str,
    name: str,
    new: dict[str, Settings],
    plain: dict[str, Plain],
    tmp_path: Path,
) -> None:
    settings = changed(new[algorithm], {name: CHANGED[name]})
    scores = offline.run(settings, tmp_path)
    values = {**plain[algorithm].values, name: CHANGED[name]}
    expected = Plain(algorithm, values).offline()
    assert_same(expected.learned_by(tmp_path), expected.learned())
    assert_differ(expected.learned(), plain[algorithm].learned())
    assert settings.values[name] == CHANGED[name]  # and is recorded
    if name in scores["replicas"][0]:
        assert scores["replicas"][0][name] == CHANGED[name]


@pytest.mark.parametrize("algorithm", OF_ALGORITHM)
def test_the_command_line_gives_a_new_run_its_settings(algorithm: str) -> None:
    its = {**base_of(algorithm), **OF_ALGORITHM[algorithm]}
    change = {name: CHANGED[name] for name in its if name != "n_steps" or "discount" in its}
    check_given(OFFLINE, [f"algorithm={algorithm}", *given(its)], change)


# --- A run that goes on --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(new: dict[str, Settings], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {algorithm: tmp_path_factory.mktemp(algorithm) for algorithm in OF_ALGORITHM}
    for algorithm, folder in folders.items():
        offline.run(new[algorithm], folder)
    return folders


@pytest.mark.parametrize("algorithm", OF_ALGORITHM)
def test_of_a_run_that_goes_on(algorithm: str, finished: dict[str, Path]) -> None:
    folder = finished[algorithm]
    stored, file = OFFLINE.stored(folder), (folder / "config.yaml").read_text()
    its = {**base_of(algorithm), **OF_ALGORITHM[algorithm]}
    fixed = {name: CHANGED[name] for name in its if name not in EXTENDS}
    if "discount" not in its:
        del fixed["n_steps"]  # refused for another reason
    for change in (fixed, {k: v for k, v in fixed.items() if k not in NETWORKS}):
        with pytest.raises(SettingsError) as error:
            OFFLINE.resumed(folder, given(change))
        theirs = {name: stored.values[name] for name in sorted(change)}
        asked = given({name: change[name] for name in sorted(change)})
        remedy = "begin a new run, of another name="
        if change is not fixed:
            from_it = f"checkpoint={folder}/last.ckpt {' '.join(asked)}"
            remedy += f"; {from_it} begins it with the networks of this one"
        run_with = f"{folder} holds a run with {', '.join(given(theirs))}, not {', '.join(asked)}"
        assert str(error.value) == f"{run_with}: {remedy}"
    assert (folder / "config.yaml").read_text() == file
    assert OFFLINE.resumed(folder, given({name: stored.values[name] for name in its})) == stored
    extended = OFFLINE.resumed(folder, given({"steps": 14, "decay_steps": 5}))
    assert (extended.training.steps, extended.algorithm.decay_steps) == (14, 5)


@pytest.mark.parametrize("more", [{}, {"decay_steps": 20}, {"decay_steps": None}])
def test_a_longer_run_is_the_one_that_would_have_been(
    more: dict[str, Any],
    new: dict[str, Settings],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offline.run(new["iql"], tmp_path)
    settings = OFFLINE.resumed(tmp_path, ["resume=x", *given({"steps": 16, **more})])
    length = {"": 10, "20": 20, "None": 16}["".join(map(str, more.values()))]
    assert (f"decay_steps={length}: " in capsys.readouterr().out) == (not more)
    scores = offline.run(settings, tmp_path)
    assert scores["replicas"][0]["steps"] == 16
    recorded = OFFLINE.stored(tmp_path).values
    assert (recorded["steps"], recorded["decay_steps"]) == (16, length)
    expected = Plain("iql", {**BASE, **OF_ALGORITHM["iql"]})
    if not more:
        expected.values = {**expected.values, "steps": 16, "decay_steps": 10}
        assert_same(expected.offline().learned_by(tmp_path), expected.learned())
    assert OFFLINE.resumed(tmp_path, []) == settings
    with pytest.raises(SettingsError, match="steps=15: 16 are done, expected at least as many"):
        offline.run(OFFLINE.resumed(tmp_path, ["steps=15"]), tmp_path)
    assert OFFLINE.stored(tmp_path) == settings


def test_what_is_no_setting_of_the_run_is_refused_when_it_goes_on(
    finished: dict[str, Path],
) -> None:
    for change, message in {
        "expectil=0.5": "did you mean expectile",
        "share=0.5": "share is a setting of percent_bc",
        "algorithm=bc": "holds a run with algorithm=iql, ",
        "task=antmaze/umaze": "holds a run with task=own, not task=antmaze/umaze",
        "checkpoint=x": "holds a run with checkpoint=null, not checkpoint=x: begin a new run",
        "hydra.run.dir=x": "goes on with one run, in its folder",
        "steps=20,30": "goes on with one run, in its folder",
        "steps=no": "steps=no: expected an integer",
    }.items():
        with pytest.raises(SettingsError, match=re.escape(message)):
            OFFLINE.resumed(finished["iql"], [change])


def test_a_folder_of_another_kind_of_run_is_not_taken_over(
    new: dict[str, Settings], finished: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("behavior: hopper\n")
    (tmp_path / "metrics.csv").touch()
    for folder, other in ((tmp_path, "behavior"), (finished["percent_bc"], "share")):
        with pytest.raises(SettingsError, match=f"holds another kind of run, with {other}: give"):
            build.claim(folder, new["iql"])


def test_settings_that_were_edited_are_not_what_was_trained_with(
    new: dict[str, Settings], tmp_path: Path
) -> None:
    offline.run(new["iql"], tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("expectile: 0.7", "expectile: 0.8"))
    with pytest.raises(SettingsError, match=r"with expectile=0\.7, not expectile=0\.8"):
        offline.run(OFFLINE.resumed(tmp_path, ["steps=20"]), tmp_path)


# --- A run that begins with a checkpoint ---------------------------------------------------------------


KEPT = [each for each in NEW if each[1] not in NETWORKS]


OF_ONLINE = [name for a, name in KEPT if a == "iql" and name not in OFFLINE_ONLY]


@pytest.fixture(scope="module")
def begun(finished: dict[str, Path]) -> dict[str, Settings]:
    """Return the settings of offline runs that begin with the checkpoints."""
    return {
        algorithm: OFFLINE.settings([f"checkpoint={folder}/last.ckpt", *QUICK])
        for algorithm, folder in finished.items()
    }


@pytest.fixture(scope="module")
def tuned(finished: dict[str, Path]) -> Settings:
    """Return the settings of an online run."""
    start = f"checkpoint={finished['iql']}/last.ckpt"
    return ONLINE.settings([start, *QUICK, *given(OF_COLLECTION)])


@pytest.mark.parametrize("algorithm", OF_ALGORITHM)
def test_a_checkpoint_gives_what_the_command_line_does_not(
    algorithm: str, begun: dict[str, Settings], finished: dict[str, Path]
) -> None:
    path = finished[algorithm] / "last.ckpt"
    its = {**base_of(algorithm), **OF_ALGORITHM[algorithm], "checkpoint": str(path)}
    assert {key: begun[algorithm].values[key] for key in its} == its
    change = {n: CHANGED[n] for a, n in KEPT if a == algorithm or (a == "iql" and n in BASE)}
    if "discount" not in its:
        del change["n_steps"]
    check_given(OFFLINE, [f"checkpoint={path}"], change)
    if algorithms()[algorithm].is_offline:
        with pytest.raises(SettingsError, match=f"algorithm={algorithm}: .* is for offline"):
            ONLINE.settings([f"checkpoint={path}"])
        return
    change = {name: value for name, value in change.items() if name not in OFFLINE_ONLY}
    check_given(
        ONLINE, [f"checkpoint={path}"], {**change, **{n: CHANGED[n] for n in OF_COLLECTION}}
    )


def test_the_networks_of_a_checkpoint_are_not_changed(finished: dict[str, Path]) -> None:
    names = sorted(NETWORKS & {*BASE, *OF_ALGORITHM["iql"]})
    overrides = [f"checkpoint={finished['iql']}/last.ckpt"]
    change = given({name: CHANGED[name] for name in names})
    message = (
        f"{', '.join(names)}: the checkpoint has networks of its own, with action_bounds=space"
    )
    same = given({name: its for name, its in BASE.items() if name in NETWORKS})
    for door in (OFFLINE, ONLINE):
        with pytest.raises(SettingsError, match=message):
            door.settings([*overrides, *change])
        assert door.settings([*overrides, *same]) == door.settings(overrides)


@pytest.mark.parametrize(("algorithm", "name"), [*KEPT, ("iql", "")])
def test_of_an_offline_run_from_a_checkpoint(
    algorithm: str,
    name: str,
    begun: dict[str, Settings],
    plain: dict[str, Plain],
    tmp_path: Path,
) -> None:
    change = {name: CHANGED[name]} if name else {}
    offline.run(changed(begun[algorithm], change), tmp_path)
    expected = Plain(algorithm, {**plain[algorithm].values, **change}, plain[algorithm]).offline()
    assert_same(expected.learned_by(tmp_path), expected.learned())
    kept = Plain(algorithm, plain[algorithm].values, plain[algorithm])
    assert_differ(expected.learned(), (kept.offline() if name else kept).learned())
    assert OFFLINE.stored(tmp_path) == changed(begun[algorithm], change)


@pytest.mark.parametrize("name", [*OF_ONLINE, *OF_COLLECTION])
def test_of_an_online_run_from_a_checkpoint(
    name: str, tuned: Settings, plain: dict[str, Plain], tmp_path: Path
) -> None:
    share = {"offline_share": 0.25} if name == "anneal_steps" else {}
    change = {name: CHANGED[name], **share}
    online.run(changed(tuned, change), tmp_path)
    expected = plain["iql"].online(change)
    assert_same(expected.learned_by(tmp_path), expected.learned())
    assert_differ(expected.learned(), plain["iql"].online(share).learned())
    assert ONLINE.stored(tmp_path) == changed(tuned, change)


def test_what_an_online_run_from_a_checkpoint_has_no_use_for(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    start = f"checkpoint={finished['iql']}/last.ckpt"
    with pytest.raises(SettingsError, match="n_steps=3: transitions are collected one by one"):
        online.run(ONLINE.settings([start, "n_steps=3"]), tmp_path)
    idle = "decay_steps, steps: without effect, there is no offline phase"
    with pytest.raises(SettingsError, match=idle):
        ONLINE.settings([start, "steps=14", "decay_steps=5"])


def test_of_an_online_run_that_goes_on(finished: dict[str, Path], tmp_path: Path) -> None:
    start = f"checkpoint={finished['iql']}/last.ckpt"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    frames = ["env_steps=20", "eval_interval=10", "collector.frames_per_batch=10"]
    online.run(ONLINE.settings([start, *QUICK, *frames]), whole)
    online.run(ONLINE.settings([start, *QUICK, *frames, "env_steps=10"]), parts)
    names = names_of(*PARTS.values(), algorithms()["iql"]) - {"env_steps", "n_steps"}
    change = given({name: CHANGED[name] for name in sorted(names & CHANGED.keys())})
    with pytest.raises(SettingsError) as error:
        ONLINE.resumed(parts, change)
    assert f", not {', '.join(change)}: begin a new run" in str(error.value)
    with pytest.raises(SettingsError, match="env_steps=5: 10 are done"):
        online.run(ONLINE.resumed(parts, ["env_steps=5"]), parts)
    scores = online.run(ONLINE.resumed(parts, ["env_steps=20"]), parts)
    assert scores["replicas"][0]["frames"] == 20
    assert ONLINE.stored(parts) == ONLINE.stored(whole)


def test_an_offline_phase_is_extended_as_long_as_it_lasts(tmp_path: Path) -> None:
    values = {**BASE, **OF_ALGORITHM["iql"], **OF_COLLECTION}
    settings = ONLINE.settings([*QUICK, "eval_episodes=0", *given(values)])
    online.run(settings, tmp_path)
    for change in ("steps=20", "decay_steps=5"):
        with pytest.raises(SettingsError, match=f"not {change}: begin a new run"):
            ONLINE.resumed(tmp_path, [change])
    for path in (tmp_path / "last.ckpt", *(tmp_path / "checkpoints").iterdir()):
        path.unlink()  # as if it had been killed at the switch
    scores = online.run(ONLINE.resumed(tmp_path, ["steps=14"]), tmp_path)
    assert scores["replicas"][0]["steps"] == 14 + 20
    for its in (ONLINE.stored(tmp_path), OFFLINE.stored(tmp_path / "offline")):
        assert (its.values["steps"], its.values["decay_steps"]) == (14, 10)


def test_from_scratch_there_is_no_offline_phase() -> None:
    for change in ("steps=14", "decay_steps=5"):
        with pytest.raises(SettingsError, match="without effect, there is no offline phase"):
            ONLINE.settings(["dataset=null", "env=Pendulum-v1", change])


def test_what_no_run_can_begin_with_is_refused(finished: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "some.ckpt").write_text("no checkpoint")
    last = finished["iql"] / "last.ckpt"
    for door in (OFFLINE, ONLINE):
        for overrides, message in {
            (f"checkpoint={finished['iql']}",): r"is a folder: give the file, as .*/last\.ckpt",
            (f"checkpoint={tmp_path}/none.ckpt",): "there is no checkpoint at",
            (f"checkpoint={tmp_path}/some.ckpt",): "is no checkpoint",
            (f"checkpoint={last}", "algorithm=bc"): "algorithm=bc: the checkpoint is of iql",
            (f"checkpoint={last}", "seeds=[0,1]"): "one learner begins with a checkpoint",
            (f"checkpoint={last}", "temperature=[0,1]"): "one learner begins with a checkpoint",
        }.items():
            with pytest.raises(SettingsError, match=message):
                door.settings(overrides)


def test_data_that_do_not_fit_the_networks_are_refused(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    other = OfflineDataset.empty("CartPole-v1")
    sizes = "holds observations of 4 numbers and actions of 2 choices, but the networks of"
    with pytest.raises(SettingsError, match=f"{sizes} .* observations of 3 .* of 1 numbers"):
        architecture_of(finished["iql"] / "last.ckpt", other, PARTS["networks"]())  # pyright: ignore
    start = f"checkpoint={finished['iql']}/last.ckpt"
    env = gymnasium.make("MountainCarContinuous-v0")
    env.action_space.seed(0)
    write(record(env, 0, lambda _: env.action_space.sample()), dataset_id="effect/car-v0", env=env)
    with pytest.raises(SettingsError, match=r"effect/car-v0 holds observations of 2 numbers"):
        offline.run(OFFLINE.settings([start, *QUICK, "dataset=effect/car-v0"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_actions_out_of_a_checkpoints_reach_are_refused(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    last = finished["iql"] / "last.ckpt"
    given = [f"checkpoint={last}", *QUICK, "eval_episodes=0", "steps=2"]
    told = re.escape(f"the policy of {last} takes actions from [-1.0] to [1.0], but")
    wider = OFFLINE.settings([*given, "action_space=[-2,2]"])
    with pytest.raises(
        SettingsError, match=rf"{told} those of .* lie in .*: give action_space=\[\["
    ):
        offline.run(wider, tmp_path / "wider")
    same = OFFLINE.settings([*given, "action_space=[-1,[1]]"])
    assert offline.run(same, tmp_path / "same")["replicas"][0]["steps"] == 2
    dataset = build.dataset_for(same.data)
    dataset.transitions["action"][0] = 1.5
    with pytest.raises(SettingsError, match=rf"{told} .*% of those of .* lie outside"):
        architecture_of(last, dataset, same.networks)


@pytest.mark.parametrize("change", ["policy=squashed", "action_bounds=data"])
def test_discrete_actions_have_their_own_policy(change: str) -> None:
    settings = OFFLINE.settings([change])
    with pytest.raises(SettingsError, match=f"{change}: without effect, the actions of CartPole"):
        empty = OfflineDataset.empty("CartPole-v1")
        architecture_for(settings.networks, empty, settings.algorithm)


@pytest.mark.parametrize("name", ["awac", "td3bc", "cql", "dt"])
def test_discrete_actions_are_refused_before_a_policy_that_nobody_asked_for(name: str) -> None:
    settings = OFFLINE.settings([f"algorithm={name}"])
    with pytest.raises(SettingsError, match=r"continuous actions, those of CartPole-v1 are discr"):
        empty = OfflineDataset.empty("CartPole-v1")
        architecture_for(settings.networks, empty, settings.algorithm)


def test_an_action_that_can_not_change_is_refused_by_name() -> None:
    settings = OFFLINE.settings(["algorithm=td3bc"])
    n, bounds = 4, Box(np.float32([-1, 0]), np.float32([1, 0]))
    data = OfflineDataset.from_arrays(
        "still",
        observations=np.arange(4.0)[:, None],
        next_observations=np.arange(4.0)[:, None] + 1,
        actions=np.zeros((n, 2)),
        rewards=np.ones(n),
        terminals=np.arange(n) == n - 1,
        action_space=bounds,
    )
    with pytest.raises(
        SettingsError, match=r"action 1 of still can only be 0, .*: give data without"
    ):
        architecture_for(settings.networks, data, settings.algorithm)


# --- What no parameters depend on ----------------------------------------------------------------------


WATCHED = {"log_interval": 4, "eval_interval": 5, "eval_episodes": 2, "eval_workers": 1}


def check_watched(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Evaluations(build.Evaluations):
        def __init__(
            self, make: Any, architecture: Any, seeds: Any, workers: int, **more: Any
        ) -> None:
            made.append((make.keywords["episodes"], workers))  # and starts none, which takes long
            super().__init__(make, architecture, seeds, 0, **more)

    first = max((int(row["step"]) for row in rows(folder)), default=0) if folder.exists() else 0
    with monkeypatch.context() as patch:
        patch.setattr(build, "Evaluations", Evaluations)
        offline.run(settings, folder)
    after = [row for row in rows(folder) if int(row["step"]) > first]
    logged = [int(row["step"]) for row in after if row["loss_actor"]]
    evaluated = [int(row["step"]) for row in after if row["eval/score"]]
    end = settings.training.steps
    assert logged == [t for t in range(first + 1, end + 1) if t % 4 == 0 or t == end]
    assert evaluated == [t for t in range(first + 1, end + 1) if t % 5 == 0 or t == end]
    assert made == [(2, 1)]


def test_what_is_watched_is_as_asked(
    new: dict[str, Settings],
    begun: dict[str, Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_watched(tmp_path / "new", changed(new["iql"], WATCHED), monkeypatch)
    check_watched(tmp_path / "begun", changed(begun["iql"], WATCHED), monkeypatch)
    offline.run(new["iql"], tmp_path / "again")
    longer = OFFLINE.resumed(tmp_path / "again", given({"steps": 22, **WATCHED}))
    check_watched(tmp_path / "again", longer, monkeypatch)


COMPUTED = {"threads": 2, "matmul_precision": "medium", "streaming": True, "execution": "auto"}


def test_how_it_is_computed_is_as_asked(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, bool]] = []

    class Seen(Exception):
        """Enough is known: what runs has been built."""

    def train(settings: Settings, step: TrainStep, minibatches: Any, *_: Any) -> None:
        built.append((step._executor._may_fall_back, minibatches._stream is not None))
        raise Seen

    monkeypatch.setattr(offline, "train", train)
    monkeypatch.setattr("torchrl_iql.training.execution._fastest", lambda _: ("eager", "a test"))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    change = [f"compute.{each}" for each in given(COMPUTED)]
    start = [f"checkpoint={finished['iql']}/last.ckpt"]
    new = OFFLINE.settings(["eval_episodes=0", *given({**BASE, **OF_ALGORITHM["iql"]}), *change])
    try:
        for name, settings in {
            "new": new,
            "resumed": OFFLINE.resumed(finished["iql"], change),
            "begun": OFFLINE.settings([*start, *change]),
        }.items():
            torch.set_num_threads(1)
            torch.set_float32_matmul_precision("highest")
            with pytest.raises(RuntimeError, match="Seen"):
                offline.run(settings, finished["iql"] if name == "resumed" else tmp_path / name)
            assert torch.get_num_threads() == 2
            assert torch.get_float32_matmul_precision() == "medium"
            assert built.pop() == (True, True)
            assert {key: settings.values["compute"][key] for key in COMPUTED} == COMPUTED
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_products_are_by_default_as_exact_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor, which may have products of bfloat16."""
    precision = torch.get_float32_matmul_precision()
    try:
        build.set_up(OFFLINE.settings([]).compute)
        a, b = torch.randn(2, 512, 512)
        error = (a @ b).double() - a.double() @ b.double()
        assert error.norm() < 1e-6 * (a.double() @ b.double()).norm()
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        build.set_up(OFFLINE.settings([]).compute)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_what_can_not_be_computed_changes_no_settings(finished: dict[str, Path]) -> None:
    folder = finished["iql"]
    before = (folder / "config.yaml").read_text()
    with pytest.raises(
        SettingsError, match=r"compute\.device=gpu can not be used, give compute=cpu: "
    ):
        offline.run(OFFLINE.resumed(folder, ["compute.device=gpu", "steps=20"]), folder)
    assert (folder / "config.yaml").read_text() == before


def test_a_choice_of_a_group_is_that_file_and_what_is_given_beside_it(
    finished: dict[str, Path],
) -> None:
    stored = OFFLINE.stored(finished["iql"]).values["compute"]
    one = OFFLINE.resumed(finished["iql"], ["compute.streaming=true"]).values["compute"]
    assert one == {**stored, "streaming": True}
    all_ = OFFLINE.resumed(finished["iql"], ["compute=gpu", "compute.threads=3"]).values["compute"]
    assert all_ == {**OFFLINE.settings(["compute=gpu"]).values["compute"], "threads": 3}


def test_a_logger_is_told(finished: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    start = f"checkpoint={finished['iql']}/last.ckpt"
    offline.run(OFFLINE.settings([start, *QUICK, "logger=tensorboard"]), tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents*"))
    offline.run(OFFLINE.resumed(tmp_path, ["logger=csv", "steps=12"]), tmp_path)
    assert OFFLINE.stored(tmp_path).logger.backend == ""
