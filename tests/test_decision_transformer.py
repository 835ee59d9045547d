"""The Decision Transformer, its windows and its loss, against loops in code and TorchRL's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl import objectives
from torchrl.modules import DTActor

from episodes import record, write
from runs import rows
from torchrl_iql import Evaluator, OfflineDataset, TrainStep, checkpoint, load_policy, models
from torchrl_iql.data import Minibatches
from torchrl_iql.decision_transformer import ReturnConditioned
from torchrl_iql.objectives import DTLoss
from torchrl_iql.training import warm_up
from torchrl_iql_recipes.behaviors import collection
from torchrl_iql_recipes.behaviors.settings import Collection
from torchrl_iql_recipes.experiment import offline
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

K, D, A = 4, 3, 2
LENGTHS = (5, 1, 3, 9, 2)


def policy(seed: int = 0, **options: Any) -> ReturnConditioned:
    """Make one whose outputs depend on all of its inputs: GPT-2's initial weights are small."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "context": K,
        "episode_length": 12,
        "hidden_sizes": (16, 16),
        "heads": 2,
    }
    its = models.decision_transformer(D, A, **{**sizes, "target_return": 2.0, **options})
    for parameter in its.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return its


def windows(batch: int = 6) -> TensorDict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, K, *shape, generator=generator)

    columns = {"observation": normal(D), "action": normal(A).tanh(), "return_to_go": normal(1)}
    time = torch.randint(0, 9, (batch, 1), generator=generator) + torch.arange(K)
    return TensorDict({**columns, "time": time}, [batch, K])


def actions(its: ReturnConditioned, batch: TensorDict) -> Tensor:
    with torch.no_grad():
        return its.eval().on_windows()(batch.copy())["action"]


# --- The network ---------------------------------------------------------------------------------------


def test_it_is_torchrls_actor_where_that_has_all_it_needs() -> None:
    """Without time, scale and bounds, on the same parameters."""
    its = policy(return_scale=1.0).eval()
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 64, "activation": "relu"}
    config |= {"n_positions": 3 * K, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    theirs = DTActor(D, A, config).eval()
    own = its.module.state_dict()
    theirs.load_state_dict({key: own[key] for key in theirs.state_dict()})
    torch.nn.init.zeros_(its.module.embed_time.weight)
    batch = windows()
    with torch.no_grad():
        expected = theirs(*(batch[key] for key in ("observation", "action", "return_to_go")))
    torch.testing.assert_close(actions(its, batch), expected.tanh(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", range(K))
def test_the_future_changes_no_action(step: int) -> None:
    """Nor does the action of the step itself; the past, its return and its observation do."""
    its, batch = policy(), windows()
    before = actions(its, batch)
    for key in batch.keys():
        first = step if key == "action" else step + 1
        for future in (True, False):
            other = batch.clone()
            rows = other[key][:, first:] if future else other[key][:, :first]
            rows.copy_((rows + 5) % 12 if key == "time" else torch.randn_like(rows) * 9)
            after = actions(its, other)
            if future:
                assert after[:, : step + 1].equal(before[:, : step + 1]), key
            elif first:
                assert (after[:, step] - before[:, step]).abs().amin(0).gt(0).all(), key


def test_actions_and_observations_have_their_own_units() -> None:
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 10.0])
    mean, std = torch.tensor([1.0, -2.0, 5.0]), torch.tensor([2.0, 0.5, 3.0])
    plain = policy()
    options = {"context": K, "episode_length": 12, "hidden_sizes": (16, 16), "heads": 2}
    bounds = models.Bounded(low=low, high=high)
    scaled = models.decision_transformer(
        D,
        bounds,
        target_return=2.0,
        return_scale=50.0,
        observation_statistics=(mean, std),
        **options,  # pyright: ignore
    )
    known = {k: v for k, v in plain.state_dict().items() if k in dict(plain.named_parameters())}
    scaled.load_state_dict(known, strict=False)
    batch = windows()
    other = batch.clone()
    other["observation"] = batch["observation"] * std + mean
    other["action"] = (high + low) / 2 + batch["action"] * (high - low) / 2
    other["return_to_go"] = batch["return_to_go"] * 50
    expected = (high + low) / 2 + actions(plain, batch) * (high - low) / 2
    torch.testing.assert_close(actions(scaled, other), expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_where_it_is_asked_for_and_nowhere_else() -> None:
    """TorchRL's configuration has none for the embeddings, of which a tenth is dropped whatever it says."""
    batch = windows()
    for dropout in (0.0, 0.5):
        network = policy(dropout=dropout).train().on_windows()
        first, second = (network(batch.copy())["action"] for _ in range(2))
        assert first.equal(second) == (dropout == 0)
    config = {**DTActor.default_config().__dict__, "n_embd": 16, "resid_pdrop": 0, "attn_pdrop": 0}
    theirs = DTActor(D, A, config)
    inputs = [batch[key] for key in ("observation", "action", "return_to_go")]
    assert not theirs(*inputs).equal(theirs(*inputs))


def test_times_after_the_longest_episode_are_its_last() -> None:
    its, batch = policy(), windows()
    late = batch.clone()
    batch["time"], late["time"] = torch.full_like(batch["time"], 11), batch["time"] + 100
    assert actions(its, late).equal(actions(its, batch))


def test_layers_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_sizes must all be the same width, got \[8, 16\]"):
        policy(hidden_sizes=(8, 16))


def test_without_its_package_the_network_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'torchrl-iql\[dt\]'"):
        policy()


# --- The loss ------------------------------------------------------------------------------------------


def mask_in_code(time: Tensor) -> np.ndarray:
    """Walk through each window until its first episode is over."""
    mask = np.zeros(time.shape, bool)
    for row, times in enumerate(time.tolist()):
        for k, t in enumerate(times):
            if k and t != times[k - 1] + 1:
                break
            mask[row, k] = True
    return mask


def test_torchrls_loss_is_the_mean_squared_error() -> None:
    """Of every entry, in float64; with a mask, of those that it leaves: there is nothing to mend there."""
    network, batch = policy().eval().on_windows(), windows()
    error = (actions(policy(), batch) - batch["action"]).double().square().numpy()
    loss = objectives.DTLoss(network)
    assert loss(batch)["loss"].item() == pytest.approx(error.mean(), rel=1e-6)
    mask = torch.rand(batch.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    loss.loss_mask_key = "mask"
    masked = loss(batch.copy().set("mask", mask))["loss"].item()
    assert masked == pytest.approx(error[mask.numpy()].mean(), rel=1e-6)


def test_the_loss_counts_the_episode_that_a_window_begins_in() -> None:
    its, batch = policy(), windows()
    batch["time"] = torch.tensor(
        [[0, 1, 2, 3], [3, 4, 0, 1], [7, 0, 0, 1], [4, 0, 1, 2], [0, 0, 1, 2], [8, 8, 8, 8]]
    )
    mask = mask_in_code(batch["time"])
    assert mask.sum(1).tolist() == [4, 2, 1, 1, 1, 1]
    error = (actions(its, batch) - batch["action"]).double().square().numpy()
    loss = DTLoss(its.eval().on_windows())
    before = batch.clone()
    found = loss(batch)
    assert list(found.keys()) == loss.out_keys == ["loss_actor"]
    assert found["loss_actor"].item() == pytest.approx(error[mask].mean(), rel=1e-6)
    assert (batch == before).all() and batch.keys() == before.keys()


def test_what_lies_behind_the_end_of_an_episode_changes_no_gradient() -> None:
    batch = windows()
    batch["time"] = torch.tensor([[5, 6, 0, 1]] * 6)
    gradients = []
    for other in (batch, batch.clone()):
        if gradients:
            for key in ("observation", "action", "return_to_go"):
                other[key][:, 2:] = 7.0
        its = policy()
        DTLoss(its.eval().on_windows())(other)["loss_actor"].backward()
        gradients.append([p.grad for p in its.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_the_training_step_is_adamw_with_a_warm_up_and_a_limited_gradient() -> None:
    """As torch has them, number for number."""
    batches = [windows() for _ in range(5)]
    plain, ours = (DTLoss(policy(dropout=0.0).on_windows()).double() for _ in range(2))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    step = TrainStep(
        ours,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.25,
        schedule={"actor_network": warm_up(4)},
    )
    for t, batch in enumerate(batches):
        doubles = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
        step(doubles)
        optimizer.zero_grad()
        plain(doubles)["loss_actor"].backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.25)
        optimizer.param_groups[0]["lr"] = 1e-2 * min((t + 1) / 4, 1)
        optimizer.step()
    assert step.entries == ("loss_actor",)
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=1e-6, atol=1e-8)


# --- Windows of the data -------------------------------------------------------------------------------


def dataset(reward_rule: Any = "none") -> OfflineDataset:
    """Make episodes in which every number tells where it is from."""
    rng = np.random.default_rng(0)
    episodes = [
        {
            "observations": np.stack([np.full(n + 1, e), np.arange(n + 1)], 1).astype(np.float32),
            "actions": rng.uniform(-1, 1, (n, A)),
            "rewards": rng.normal(size=n),
            "terminations": np.arange(n) == n - 1,
        }
        for e, n in enumerate(LENGTHS)
    ]
    return OfflineDataset.from_episodes(
        "numbers",
        episodes,
        observation_space=Box(-np.inf, np.inf, (2,)),
        action_space=Box(-1, 1, (A,)),
        reward_rule=reward_rule,
    )


@pytest.mark.parametrize("rule", ["none", "minus_one", "return_range", "unit_rms"])
def test_returns_to_go_are_of_the_rewards_that_were_paid(rule: Any) -> None:
    raw = dataset().transitions["next", "reward"].double().flatten().tolist()
    expected, first = [], 0
    for n in LENGTHS:
        expected += [sum(raw[first + t : first + n]) for t in range(n)]
        first += n
    its = dataset(rule).windows(K)
    found = its.transitions["return_to_go"]
    assert (found.shape, found.dtype) == ((sum(LENGTHS), 1), torch.float32)
    np.testing.assert_allclose(found.flatten(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[its.episode_starts, 0], its.episode_returns, atol=1e-5)
    assert its.transitions["time"].tolist() == [t for n in LENGTHS for t in range(n)]


@pytest.mark.parametrize("streaming", [False, True])
def test_minibatches_are_the_windows_that_begin_at_the_transitions_drawn(streaming: bool) -> None:
    data = dataset()
    cut, single = data.windows(K), data.minibatches(5, seeds=[3, 4])
    assert cut.transitions["observation"].data_ptr() == data.transitions["observation"].data_ptr()
    rows, n = single(2)[1], len(data.transitions)
    with cut.minibatches(5, seeds=[3, 4], streaming=streaming) as minibatches:
        source, indices = minibatches(2)
        assert indices.shape == (100, 2, 5, K)
        found = source[indices]
        for t in (0, 42, 99):
            for r, b in np.ndindex(2, 5):
                first = int(rows[t, r, b])
                each = [min(first + k, n - 1) for k in range(K)]
                assert (found[t, r, b] == cut.transitions[each]).all()
                assert minibatches.rows(200 + t)[r, b].tolist() == each


def test_the_windows_of_all_transitions_cover_each_episode_and_nothing_else() -> None:
    data = dataset().windows(K)
    source, rows = data.transitions, torch.arange(len(data.transitions)).unsqueeze(-1)
    time = source["time"][(rows + torch.arange(K)).clamp_max(len(rows) - 1)]
    left = data.episode_lengths.repeat_interleave(data.episode_lengths) - source["time"]
    assert mask_in_code(time).sum(1).tolist() == left.clamp_max(K).tolist()


def test_windows_that_can_not_be_are_refused() -> None:
    data = dataset()
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        data.windows(0)
    with pytest.raises(ValueError, match=r"numbers: there are columns \['return_to_go', 'time'\]"):
        data.windows(2).windows(2)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Minibatches(data.transitions, 4, window=0)
    stopped = OfflineDataset.from_arrays(
        "slices",
        observations=np.arange(8.0)[:, None],
        actions=np.zeros((8, 1)),
        rewards=np.ones(8),
        terminals=np.zeros(8),
        next_observations=np.arange(8.0)[:, None] + 1 + 10 * (np.arange(8) % 2)[:, None],
    )
    with pytest.raises(ValueError, match="slices: returns to go: a statistic of whole episodes"):
        stopped.windows(2)


# --- Acting --------------------------------------------------------------------------------------------


class Numbers(gymnasium.Env):
    """Observes the seed, the step and the last action; pays half the step less the action."""

    observation_space = Box(-np.inf, np.inf, (D,))
    action_space = Box(-1, 1, (A,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.seed, self.t = seed, 0
        return np.array([self.seed, 0, 0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        observation = np.array([self.seed, self.t, action[0]], np.float32)
        return observation, self.t / 2 - float(action[1]), False, self.t == 6 + self.seed, {}


def test_in_an_environment_it_sees_its_last_steps_and_the_return_that_is_left() -> None:
    """As the official evaluation: a list of all steps, of which the last K go through the network."""
    its = policy().eval()
    spec = EnvSpec("Numbers-v0", entry_point=Numbers, disable_env_checker=True)
    with Evaluator(spec, episodes=3) as evaluate:
        found = evaluate(its, keep_trajectories=True)
    assert found.lengths.tolist() == [6, 7, 8]  # longer than K
    for seed in range(3):
        env, over, steps = Numbers(), False, []
        observation, _ = env.reset(seed=seed)
        trajectory, left = [observation], 2.0
        while not over:
            steps.append((observation, np.zeros(A, np.float32), [left], len(steps)))
            last = steps[-K:]
            columns = [
                torch.tensor(np.array([step[c] for step in last], np.float32))[None]
                for c in range(3)
            ]
            time = torch.tensor([[step[3] for step in last]])
            with torch.no_grad():
                action = its.module(*columns, time)[0, -1].numpy()
            steps[-1] = (observation, action, [left], len(steps) - 1)
            observation, reward, _, over, _ = env.step(action)
            left -= reward
            trajectory.append(observation)
        np.testing.assert_allclose(found.trajectories[seed], trajectory, rtol=1e-4, atol=1e-4)  # pyright: ignore


def test_an_episode_that_begins_in_the_midst_of_others_is_as_one_of_its_own() -> None:
    its, generator = policy().eval(), torch.Generator().manual_seed(0)

    def play(begins: list[list[bool]], observations: Tensor, rewards: Tensor) -> Tensor:
        td, taken = None, []
        for t, first in enumerate(begins):
            now = {"observation": observations[t], "reward": rewards[t]}
            now["is_init"] = torch.tensor(first).unsqueeze(-1)
            before = {} if td is None else {"context": td["next", "context"]}
            td = its(TensorDict({**now, **before}, [len(first)]))
            taken.append(td["action"])
        return torch.stack(taken)

    observations = torch.randn(11, 2, D, generator=generator)
    rewards = torch.randn(11, 2, 1, generator=generator)
    with torch.no_grad():
        begins = [[t == 0, t in (0, 3, 9)] for t in range(11)]
        together = play(begins, observations, rewards)
        for first, end in ((0, 3), (3, 9), (9, 11)):
            part = slice(first, end)
            alone = play(
                [[t == 0] for t in range(end - first)], observations[part, 1:], rewards[part, 1:]
            )
            torch.testing.assert_close(together[part, 1:], alone)
        whole = play([[t == 0] for t in range(11)], observations[:, :1], rewards[:, :1])
        torch.testing.assert_close(together[:, :1], whole)


def test_evaluations_tell_rewards_to_policies_that_read_them() -> None:
    told = []

    def act(observation: Tensor, reward: Tensor) -> Tensor:
        told.append(reward.clone())
        return torch.zeros(len(observation), A)

    module = TensorDictModule(act, in_keys=["observation", "reward"], out_keys=["action"])
    spec = EnvSpec("Numbers-v0", entry_point=Numbers, disable_env_checker=True)
    with Evaluator(spec, episodes=1) as evaluate:
        evaluate(module)
    assert torch.cat(told).tolist() == [[t / 2] for t in range(6)]


# --- The algorithm -------------------------------------------------------------------------------------

PAID = "dt/paid-v0"


class Paid(gymnasium.Env):
    """Pays the action, ten times; what is observed is noise."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        return self._observation(), float(action[0]), False, self.t == 10, {}

    def _observation(self) -> np.ndarray:
        return self.np_random.normal(size=2).astype(np.float32)


@pytest.fixture(scope="module")
def paid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Store episodes of actions around a mean of their own, with returns from -8 to 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        gymnasium.register("test/Paid-v0", "test_decision_transformer:Paid")
        env, rng = gymnasium.make("test/Paid-v0"), np.random.default_rng(0)
        means = np.linspace(-0.8, 0.8, 200)

        def around(mean: float) -> Any:
            return lambda _: np.clip(mean + rng.normal(0, 0.1, 1), -1, 1).astype(np.float32)

        episodes = [record(env, seed, around(mean)) for seed, mean in enumerate(means)]
        write(*episodes, dataset_id=PAID, env=env)
        yield PAID
        del gymnasium.registry["test/Paid-v0"]


SMALL = ["hidden_sizes=[16,16]", "context=5", "warm_up_steps=10", "batch_size=32", "dropout=0"]
SMALL += ["compute.execution=eager", "compute.threads=1", "normalize_observation=false"]


def small(dataset: str, *overrides: str) -> Any:
    return OFFLINE.settings(["algorithm=dt", f"dataset={dataset}", *SMALL, *overrides])


def test_a_larger_return_to_aim_at_is_a_larger_return(paid: str, tmp_path: Path) -> None:
    """In the range of the data; the best of them without a setting; and from where it began."""
    settings = small(
        *(paid, "learning_rate=3e-3", "steps=300", "eval_interval=300", "eval_episodes=4"),
        "log_interval=20",
    )
    scores = offline.run(settings, tmp_path)["replicas"][0]
    losses = [float(row["loss_actor"]) for row in rows(tmp_path) if row["loss_actor"]]
    assert losses[-1] < 0.03  # the variance of the actions is 0.22, that of the noise 0.01
    architecture = checkpoint.load_architecture(tmp_path / "last.ckpt")
    torch.manual_seed(0)
    start, its = architecture.policy_network(), load_policy(tmp_path / "last.ckpt")
    best = architecture.policy_options["target_return"]
    assert best == pytest.approx(8, abs=1)
    with Evaluator("test/Paid-v0", episodes=4) as evaluate:
        assert abs(evaluate(start).returns - best).min() > 4
        assert scores["return"] == pytest.approx(best, abs=1)
        for target in (-7, -3, 0, 3, 7):
            its.target_return = float(target)
            assert evaluate(its).returns == pytest.approx(target, abs=1)


def test_the_return_that_is_aimed_at_is_a_setting_in_the_units_of_the_environment(
    paid: str, tmp_path: Path
) -> None:
    settings = small(paid, "target_return=-2.5", "reward=minus_one", "steps=1", "eval_episodes=0")
    offline.run(settings, tmp_path)
    assert load_policy(tmp_path / "last.ckpt").target_return == -2.5
    known = checkpoint.load_architecture(tmp_path / "last.ckpt").policy_options
    assert (known["context"], known["episode_length"]) == (5, 10)
    assert known["return_scale"] == pytest.approx(8, abs=1)  # not 18, after the rule
    with pytest.raises(SettingsError, match=r"target_return: the checkpoint has networks of its"):
        OFFLINE.settings([f"checkpoint={tmp_path}/last.ckpt", "target_return=5"])
    with pytest.raises(SettingsError, match=r"algorithm=dt: it learns from whole episodes, and is"):
        ONLINE.settings([f"checkpoint={tmp_path}/last.ckpt"])
    asked = Collection.of(
        {"env": "test/Paid-v0", "policy": f"{tmp_path}/last.ckpt", "id": "dt/more-v0"}
    )
    with pytest.raises(SettingsError, match="a Decision Transformer acts by its rewards and"):
        collection.run(asked, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("policy=squashed", "policy=squashed: without effect"),
        ("hidden_sizes=[8,16]", r"hidden_sizes=\[8, 16\]: expected the width of the transformer"),
    ],
)
def test_networks_that_it_can_not_have_are_refused(
    given: str, message: str, paid: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        offline.run(small(paid, given, "steps=1", "eval_episodes=0"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_it_can_not_learn_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="n_steps=3: DT has no rewards to sum"):
        small(PAID, "n_steps=3")
    for more in (["dataset=null", "env=test/Paid-v0"], []):
        with pytest.raises(SettingsError, match=r"algorithm=dt: .* and is for offline\.py"):
            ONLINE.settings(["algorithm=dt", *more])
