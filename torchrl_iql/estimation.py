"""What a policy is worth, from data that it did not make: off-policy evaluation, without an environment.

* :func:`fitted_q`: by Q networks that are fitted to the policy; of any policy, on any data.
* :func:`importance_sampling`: by the weights of whole episodes; of policies that draw their actions, where
  the probabilities of the recorded ones are known.

What is estimated is the mean discounted return of episodes that begin as those of the data do, in the rewards
as they were recorded: whatever the reward rule of the data set made of them is undone. What it can tell, and
what not, is on the page of the recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import torch
from gymnasium.spaces import Discrete
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_iql.data import OfflineDataset
from torchrl_iql.data.rewards import UNCHANGED, check_discount
from torchrl_iql.models import Architecture, SeeingTorso, Torso
from torchrl_iql.objectives import FQELoss
from torchrl_iql.objectives.base import is_deterministic
from torchrl_iql.objectives.functional import return_bounds
from torchrl_iql.training import TrainStep, cosine_decay
from torchrl_iql.training.execution import Execution
from torchrl_iql.validation import return_is_known

__all__ = [
    "DataReturn",
    "FittedQ",
    "ImportanceSampled",
    "data_return",
    "fitted_q",
    "importance_sampling",
    "policy_actions",
    "recorded_rewards",
]

ROWS = 10_000
"""Observations that a policy acts for at once."""

LOOKS = 50
"""At the estimate, on the way."""

FEWEST = 5.0
"""Effective episodes, below which an estimate by weights is that of one or two of them."""

RESAMPLES = 1000
"""Of the bootstrap over episodes."""

SWEEPS = 3.0
"""From which on 95% of what an estimate began with is forgotten."""


@dataclass(frozen=True)
class DataReturn:
    """What the episodes of the data came to: the mean discounted return of those whose return is known.

    Attributes:
        value: the mean; NaN if there are none.
        stderr: its standard error; NaN if there is one, or none.
        best: the highest.
        episodes: how many are known: those that end by a termination, or are so long that what would have
            followed counts for less than a twentieth.
        cut: how many are not, as those that end by a time-out: where these are the failures, ``value`` is
            that of the successes.
        paid_until_cut: the mean discounted return of these, up to where they are cut; NaN if there are none.
    """

    value: float
    stderr: float
    best: float
    episodes: int
    cut: int = 0
    paid_until_cut: float = float("nan")


@dataclass(frozen=True)
class FittedQ:
    """What fitted Q evaluation found.

    Attributes:
        history: the estimate of each network, ``[looks, N]`` float64, in the units of the recorded rewards.
        of_data: what the data came to, by the same discount.
        bounds: the lowest and the highest return that there can be, which targets were clipped to.
        clip_fraction: the share of targets that were far beyond them, in the last step: above a few
            hundredths, Q diverges.
        distance: of the policy's actions from the data's in the same states, over the spread of the data's:
            root mean squares; of discrete actions the share that are others.
        sweeps: how often the target networks could catch up: steps times target rate times (1 - discount).
    """

    history: Tensor
    of_data: DataReturn
    bounds: tuple[float, float]
    clip_fraction: float
    distance: float
    sweeps: float

    @property
    def members(self) -> Tensor:
        """The estimate of each network, ``[N]``: the mean over the last tenth of the steps."""
        return self.history[-_tenth(self.history) :].mean(0)

    @property
    def value(self) -> float:
        """The estimate: the mean of the networks."""
        return self.members.mean().item()

    @property
    def spread(self) -> float:
        """The standard deviation of the networks, each on its own draw of episodes; NaN of one."""
        return self.members.std().item() if len(self.members) > 1 else float("nan")

    @property
    def drift(self) -> float:
        """How far the estimate moved in the last fifth of the steps; NaN of one or two steps."""
        tenth = _tenth(self.history)
        before = self.history[-3 * tenth : -2 * tenth].mean()
        return (self.members.mean() - before).item()

    @property
    def is_converged(self) -> bool:
        """Whether there were sweeps enough, and it moved by less than the spread, or a fiftieth of itself."""
        spread = 0.0 if np.isnan(self.spread) else self.spread
        return self.sweeps >= SWEEPS and abs(self.drift) <= max(spread, 0.02 * abs(self.value))


def _tenth(history: Tensor) -> int:
    return max(1, len(history) // 10)


def fitted_q(
    policy: TensorDictModuleBase,
    dataset: OfflineDataset,
    *,
    discount: float = 0.99,
    networks: int = 5,
    steps: int = 10_000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    target_rate: float = 0.05,
    architecture: Architecture | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    execution: Execution = "auto",
    streaming: bool = False,
    progress: Callable[[int], object] | None = None,
) -> FittedQ:
    """Evaluate a policy by Q networks that are fitted to it, :class:`~torchrl_iql.objectives.FQELoss`.

    The policy is what is deployed: without exploration, the mean or the most probable action. Each network
    has its own initialisation and, of more than one, its own draw of as many episodes as there are, with
    replacement. They see
    rewards in units of the returns of the data, begin at the mean of these, and their targets are kept within
    :func:`~torchrl_iql.objectives.functional.return_bounds`. Where an episode is cut, its value goes on;
    where it is terminated, it does not.

    Args:
        policy: reads ``"observation"`` ``[B, D]`` and writes ``"action"``, as that of
            :func:`~torchrl_iql.load_policy`.
        dataset: of single steps, from one policy or many.
        discount: from 0, below 1.
        networks: N, at least 1; of 1 there is no spread.
        steps: of gradient, at least 1; the learning rate falls to 0 by half a cosine.
        batch_size: transitions.
        learning_rate: of Adam.
        target_rate: of the target networks. What they have yet to learn falls by a factor e in 1 /
            (target_rate (1 - discount)) steps, so that it has to be larger than in training.
        architecture: of the Q networks; None: two layers of 256 units on normalised observations.
        seed: of networks, draws and minibatches.
        device: where it is computed.
        execution: how, as of :class:`~torchrl_iql.TrainStep`.
        streaming: whether the device holds some of the transitions at a time instead of all.
        progress: called with the number of steps that were taken since the last call.

    Raises:
        ValueError: an argument is out of range, the policy needs more than an observation, its actions do not
            fit those of the data, or the transitions are not of single steps.
        NonFiniteError: a network is no longer finite.
    """
    if not (isinstance(discount, Real) and 0 <= discount < 1):
        raise ValueError(f"discount must be in [0, 1), got {discount!r}")
    for name, value in (("networks", networks), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    dataset = recorded_rewards(dataset)
    transitions = dataset.transitions.copy()
    action, space = transitions["action"], dataset.action_space
    own = policy_actions(policy, transitions["observation"], action)
    after = transitions["next"].copy()
    after["action"] = policy_actions(policy, after["observation"], action)

    returns = dataset.returns_to_go(discount)[:, 0].double()
    scale = returns.square().mean().sqrt().item() or 1.0
    reward, ended = after["reward"].double(), after["terminated"]
    bounds = return_bounds(reward, ended, discount)
    after["reward"] = (reward / scale).float()
    draws = _draws(len(dataset.episode_lengths), networks, seed)
    transitions["next"] = after
    transitions["bootstrap_weight"] = draws.repeat_interleave(dataset.episode_lengths, dim=0)

    if architecture is None:
        architecture = _architecture(dataset)
    statistics = dataset.observation_statistics() if architecture.normalize_observation else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        members = [architecture.qvalue_network(statistics) for _ in range(networks)]
    for member in members:
        _begin_at(member, returns.mean().item() / scale)
    low, high = (bound / scale for bound in bounds)
    loss = FQELoss(members, discount=discount, bounds=(low, high)).to(device)
    step = TrainStep(
        loss,
        learning_rate=learning_rate,
        schedule={"qvalue_network": cosine_decay(steps)},
        target_rate=target_rate,
        seeds=seed,
        execution=execution,
    )
    starts = dataset.episode_starts
    first = TensorDict(
        {"observation": transitions["observation"][starts], "action": own[starts]}, [len(starts)]
    ).to(device)
    weights = (draws / draws.sum(0)).double()
    minibatches = replace(dataset, transitions=transitions).minibatches(
        batch_size, seeds=[seed], device=device, streaming=streaming
    )
    history, clipped = [], 0.0
    with minibatches:
        for done in np.diff(np.linspace(0, steps, min(LOOKS, steps) + 1).round().astype(int)):
            clipped = step.run(minibatches, int(done))["clip_fraction"].item()
            step.check_finite()
            history.append((weights * _values(loss, first).T).sum(0) * scale)
            if progress is not None:
                progress(int(done))
    distance = _distance(own, action, isinstance(space, Discrete))
    return FittedQ(
        torch.stack(history),
        data_return(dataset, discount),
        bounds,
        clipped,
        distance,
        steps * target_rate * (1 - discount),
    )


@dataclass(frozen=True)
class ImportanceSampled:
    """What weighted importance sampling found.

    Attributes:
        value: the estimate, in the units of the recorded rewards.
        stderr: its standard error, by a bootstrap over episodes.
        effective_episodes: (sum w)^2 / sum w^2 of the weights of whole episodes.
    """

    value: float
    stderr: float
    effective_episodes: float


@torch.no_grad()
def importance_sampling(
    policy: TensorDictModuleBase,
    dataset: OfflineDataset,
    *,
    log_prob: str,
    discount: float = 0.99,
    seed: int = 0,
) -> ImportanceSampled:
    r"""Evaluate a policy by weighting what was recorded by how much more likely it is under the policy.

    Weighted per-decision importance sampling (Precup, Sutton, Singh, 2000): with
    :math:`w_{e,t} = \prod_{k \le t} \pi(a_{e,k} | s_{e,k}) / b(a_{e,k} | s_{e,k})`,

    .. math::
        \sum_t \gamma^t \, \sum_e w_{e,t} r_{e,t} / \sum_e w_{e,t},

    where an episode that is over keeps its weight, and is paid nothing more. The policy is the stochastic
    one, which draws its actions, and not its mean; an episode that is cut is over.

    Args:
        policy: with ``get_dist``, as that of :func:`~torchrl_iql.load_policy`.
        dataset: of single steps, with a column of log-probabilities, ``columns=[log_prob]`` when it is
            loaded.
        log_prob: the name of that column, ``[n]`` or ``[n, 1]``: the logarithm of the probability, or density
            in the units of the data's actions, of each action under who took it.
        discount: from 0 to 1.
        seed: of the bootstrap.

    Raises:
        ValueError: the discount is out of range; there is no such column, or it is not finite; the policy is
            deterministic; or fewer than 5 episodes are effective.
    """
    check_discount(discount)
    dataset = recorded_rewards(dataset)
    transitions = dataset.transitions
    behaviour = transitions.get(log_prob, None)
    if behaviour is None:
        raise ValueError(
            f"{dataset.name} has no column {log_prob!r}, the log-probability of each action under who took "
            f"it: load it with columns=[{log_prob!r}], or use fitted Q, which needs none"
        )
    behaviour = behaviour.double().reshape(len(transitions), -1)
    if behaviour.shape[1] != 1 or not behaviour.isfinite().all():
        raise ValueError(
            f"{dataset.name}: column {log_prob!r} holds more than one finite number each"
        )
    if is_deterministic(policy):  # pyright: ignore
        raise ValueError(
            "the policy is deterministic: no recorded action has a probability under it"
        )
    device = next((parameter.device for parameter in policy.parameters()), None)
    before, own = policy.training, []
    policy.eval()
    for rows in torch.arange(len(transitions)).split(ROWS):
        read = TensorDict({"observation": transitions["observation"][rows].to(device)}, [len(rows)])
        its = policy.get_dist(read).log_prob(transitions["action"][rows].to(device))  # pyright: ignore
        own.append(its.double().cpu().reshape(-1))
    policy.train(before)
    ratios = (torch.cat(own) - behaviour[:, 0]).numpy()

    lengths = dataset.episode_lengths.numpy()
    rewards = transitions["next", "reward"][:, 0].double().numpy()
    logs, paid = _by_episode(ratios, rewards, lengths)
    weights = np.exp(logs[:, -1] - logs[:, -1].max())
    effective = float(weights.sum() ** 2 / np.square(weights).sum())
    if not effective >= FEWEST:
        raise ValueError(
            f"{effective:.1f} of {len(lengths):,} episodes are effective, expected at least {FEWEST:g}: the "
            "policy does something else than the data, and what it would come to is not in them"
        )
    value = _weighted_return(logs, paid, discount)
    drawn = np.random.default_rng(seed).integers(len(lengths), size=(RESAMPLES, len(lengths)))
    resampled = [_weighted_return(logs[rows], paid[rows], discount) for rows in drawn]
    return ImportanceSampled(value, float(np.std(resampled, ddof=1)), effective)


def _by_episode(
    ratios: np.ndarray, rewards: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logarithm of the weights so far, and the rewards, ``[E, longest]``.

    After the end of an episode its weight stays, and rewards are 0.
    """
    shape = len(lengths), int(lengths.max())
    logs, paid = np.zeros(shape), np.zeros(shape)
    inside = np.arange(shape[1]) < lengths[:, None]
    logs[inside], paid[inside] = ratios, rewards
    return logs.cumsum(axis=1), paid


def _weighted_return(logs: np.ndarray, paid: np.ndarray, discount: float) -> float:
    weights = np.exp(logs - logs.max(axis=0))
    means = (weights * paid).sum(axis=0) / weights.sum(axis=0)
    return float(means @ discount ** np.arange(len(means)))


def recorded_rewards(dataset: OfflineDataset) -> OfflineDataset:
    """Return a data set with its rewards as they were recorded, before its reward rule.

    Raises:
        ValueError: its rewards are sums over several steps, or its minibatches are windows.
    """
    if "steps_to_next_obs" in dataset.transitions.keys() or dataset.window is not None:
        raise ValueError(f"{dataset.name}: expected single transitions, not n-step ones or windows")
    if not len(dataset.transitions):
        raise ValueError(f"{dataset.name}: there are no transitions")
    if dataset.reward_transform == UNCHANGED:
        return dataset
    transitions = dataset.transitions.copy()
    rewards = dataset.reward_transform.undone(transitions["next", "reward"])
    transitions["next"] = transitions["next"].copy().set("reward", rewards.float())
    return replace(dataset, transitions=transitions, reward_rule="none", reward_transform=UNCHANGED)


def data_return(dataset: OfflineDataset, discount: float) -> DataReturn:
    """Return what the episodes of a data set came to, in its rewards as they are."""
    starts = dataset.episode_starts
    known = return_is_known(dataset, discount)[starts]
    paid = dataset.returns_to_go(discount)[starts, 0].double()
    returns, cut = paid[known], paid[~known]
    number = len(returns)
    of_cut = len(cut), cut.mean().item()
    if not number:
        return DataReturn(float("nan"), float("nan"), float("nan"), 0, *of_cut)
    error = returns.std().item() / number**0.5 if number > 1 else float("nan")
    return DataReturn(returns.mean().item(), error, returns.max().item(), number, *of_cut)


@torch.no_grad()
def policy_actions(policy: TensorDictModuleBase, observations: Tensor, like: Tensor) -> Tensor:
    """Return what a policy does without exploration, as rows of data sets.

    Args:
        policy: reads ``"observation"`` and writes ``"action"``.
        observations: ``[n, D]``.
        like: actions of the data, ``[n, A]`` or ``[n]``.

    Raises:
        ValueError: it needs more than an observation, or its actions are of another kind or shape.
    """
    if list(policy.in_keys) != ["observation"]:
        raise ValueError(
            f"{type(policy).__name__} acts by {', '.join(map(str, policy.in_keys))}: what it does depends on "
            "more than the present observation, and can not be evaluated by a Q of it"
        )
    device = next((parameter.device for parameter in policy.parameters()), None)
    before = policy.training
    policy.eval()
    found = []
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for rows in observations.split(ROWS):
            batch = TensorDict({"observation": rows.to(device)}, [len(rows)])
            found.append(policy(batch)["action"].cpu())
    policy.train(before)
    actions = torch.cat(found)
    if like.is_floating_point() != actions.is_floating_point():
        raise ValueError(
            f"the policy's actions are {actions.dtype}, and those of the data {like.dtype}"
        )
    if not like.is_floating_point() and actions.ndim == 2 and actions.shape[1] == 1:
        actions = actions[:, 0]
    if actions.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"the policy's actions have shape {list(actions.shape)}, and those of the data {list(like.shape)}"
        )
    return actions.to(like.dtype)


def _draws(episodes: int, networks: int, seed: int) -> Tensor:
    """Draw episodes with replacement, for each network as many: how often each was, ``[E, N]``."""
    if networks == 1:
        return torch.ones(episodes, 1)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(episodes, np.full(episodes, 1 / episodes), size=networks)
    return torch.from_numpy(drawn.T.copy()).float()


def _architecture(dataset: OfflineDataset) -> Architecture:
    space, width = dataset.action_space, dataset.transitions["observation"].shape[-1]
    if isinstance(space, Discrete):
        return Architecture(
            observation_size=width,
            action_size=int(space.n),
            policy="categorical",
            normalize_observation=True,
        )
    low, high = (torch.as_tensor(bound).flatten() for bound in (space.low, space.high))  # pyright: ignore
    if not (low.isfinite() & high.isfinite()).all():
        rows = dataset.transitions["action"]
        low, high = rows.amin(0), torch.maximum(rows.amax(0), rows.amin(0) + 1e-6)
    return Architecture(
        observation_size=width,
        action_size=len(low),
        action_bounds=(low.tolist(), high.tolist()),
        normalize_observation=True,
    )


@torch.no_grad()
def _begin_at(network: TensorDictModule, value: float) -> None:
    """Let a fresh Q network put out about this: what it begins with, it has to unlearn."""
    torso = network.module
    torso = torso.torso if isinstance(torso, SeeingTorso) else torso
    assert isinstance(torso, Torso)
    torso.layers[-1].weight.mul_(0.1)
    torso.layers[-1].bias.fill_(value)


@torch.no_grad()
def _values(loss: FQELoss, first: TensorDictBase) -> Tensor:
    return torch.cat([loss.values(rows) for rows in first.split(ROWS)], dim=1).double().cpu()  # pyright: ignore


def _distance(own: Tensor, of_data: Tensor, discrete: bool) -> float:
    if discrete:
        return (own != of_data).double().mean().item()
    own, of_data = own.double(), of_data.double()
    spread = of_data.var(dim=0, correction=0).mean()
    return ((own - of_data).square().mean() / spread.clamp_min(1e-12)).sqrt().item()
