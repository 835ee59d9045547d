"""What a loss makes of transitions, without an environment: of those that it was not trained on, how it went.

Errors, values and weights, in the units of the rewards after the reward rule. None of them is a score:
what they tell of one, and what not, is on the page of the recipes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.spaces import Box, Discrete
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.objectives.common import LossModule

from torchrl_iql.data import OfflineDataset
from torchrl_iql.data.bins import share_at_bounds
from torchrl_iql.data.rewards import check_discount
from torchrl_iql.objectives import functional
from torchrl_iql.objectives.base import AdvantageWeightedLoss, is_deterministic

__all__ = ["Validation", "Validator", "return_is_known"]

ROWS = 20_000
"""Transitions that are looked at, evenly over the data."""

BATCH = 1_000
"""Of them at a time."""

REST = 0.05
"""What a reward beyond the end of the record may count at most, where a return is taken for complete."""

FEWEST = 30
"""Transitions whose return is known, below which Q is not compared with it."""

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Validation:
    """What was found.

    Attributes:
        metrics: by name, means over the transitions: every scalar of the loss; and, of what there is,

            - ``td_error``: root mean square, of the network that is furthest off (of
              :class:`~torchrl_iql.objectives.FQELoss` the mean square, as the loss says it);
            - ``action_error``: of the policy's mean action, each dimension in units of its standard
              deviation in the data, root mean square over transitions and dimensions; or for discrete
              actions the share that are others;
            - ``actions_explained``: the share of the variance of the actions, in the dimension where it is
              least, that follows from the observations by the policy's mean action; below 0 if the mean
              of the data would be nearer;
            - ``actions_at_bounds``: the share of the policy's actions, each dimension by itself, within a
              hundredth of the range of one of their bounds;
            - ``log_likelihood``: of the actions;
            - ``initial_value``: V(s) where episodes begin, else min_i Q_i(s, pi(s));
            - ``q_bias`` and ``q_correlation``: Q(s, a) less the discounted return that followed, and
              Spearman's rank correlation of the two, where the whole return is known, of at least 30
              transitions;
            - ``advantage_10``, ``_50``, ``_90``: its quantiles, in percent;
            - ``effective_sample_size``: of the weights w, (sum w)^2 / (n sum w^2), a share.
        q: Q(s, a), mean of the networks, ``[n]``, where the return is known, if it is of at least 30.
        returns: the discounted return that followed, ``[n]``.
    """

    metrics: dict[str, float]
    q: Tensor
    returns: Tensor


class Validator:
    """Looks at the same transitions every time.

    Args:
        dataset: what a loss is tried on; of one with a ``window``, only the loss is.
        discount: of the loss; None if it has none.
        seed: of random numbers that a loss draws, the same every time.
        rows: how many transitions, at most, evenly over the data; with a ``window``, about as many windows as
            a tenth of that.
        n_steps: over which the loss sees them, :meth:`~torchrl_iql.OfflineDataset.n_step`, with ``discount``.

    Raises:
        ValueError: there are no transitions; ``n_steps`` is below 1, or above it without a discount or of
            windows; or the discount is out of range.
    """

    def __init__(
        self,
        dataset: OfflineDataset,
        discount: float | None = None,
        seed: int = 0,
        rows: int = ROWS,
        n_steps: int = 1,
    ) -> None:
        if n_steps < 1 or (n_steps > 1 and (discount is None or dataset.window is not None)):
            raise ValueError(
                f"n_steps={n_steps} must be at least 1, and above it needs the discount of the loss, got "
                f"{discount!r}, and single transitions"
            )
        n = len(dataset.transitions)
        if not n:
            raise ValueError(f"{dataset.name}: there are no transitions to look at")
        self._seed = seed
        self._action_space = dataset.action_space
        self._windows = dataset.window is not None
        self._batches: list[TensorDictBase]
        self._rows = torch.linspace(0, n - 1, min(n, rows)).round().long()
        self._transitions = dataset.transitions
        if self._windows:
            with dataset.minibatches(BATCH // 10, seeds=[seed]) as minibatches:
                source, indices = minibatches(0)
                self._batches = [source[rows] for rows in indices[: max(1, rows // BATCH), 0]]
            return
        read = self._transitions
        if n_steps > 1:
            read = dataset.n_step(n_steps, discount).transitions  # pyright: ignore
        self._batches = [read[rows] for rows in self._rows.split(BATCH)]  # pyright: ignore
        actions = self._transitions["action"][self._rows].double()  # of choices not looked at
        variance = actions.reshape(len(actions), -1).var(dim=0, correction=0)
        self._variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        starts = dataset.episode_starts
        some = torch.linspace(0, len(starts) - 1, min(len(starts), BATCH)).round().long()
        self._initial = self._transitions[starts[some]]
        self._returns = None
        if discount is not None and "steps_to_next_obs" not in self._transitions.keys():
            self._returns = dataset.returns_to_go(discount)[self._rows, 0]
            self._complete = return_is_known(dataset, discount)[self._rows]

    @torch.no_grad()
    def __call__(self, loss: LossModule) -> Validation:
        """Look at them with a loss, which is left as it was."""
        device = next(loss.parameters()).device
        cuda = [device] if device.type == "cuda" else []
        with _evaluated(loss), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self._seed)
            each = [self._of_batch(loss, batch.copy().to(device)) for batch in self._batches]
            found = {key: torch.cat([its[key] for its in each]).double().cpu() for key in each[0]}
            initial = None if self._windows else self._initial_value(loss, device)
        q, returns = torch.empty(0), torch.empty(0)
        more: dict[str, float] = {} if initial is None else {"initial_value": initial}
        if (error := found.pop("squared_td_error", None)) is not None:
            more["td_error"] = error.mean().sqrt().item()
        if (error := found.pop("squared_action_error", None)) is not None:
            by_dimension = error.mean(0) / self._variance
            more["action_error"] = by_dimension.mean().sqrt().item()
            more["actions_explained"] = 1 - by_dimension.max().item()
        if "q" in found and self._returns is not None and self._complete.sum() >= FEWEST:
            q, returns = found["q"][self._complete], self._returns[self._complete].double()
            more["q_bias"] = (q - returns).mean().item()
            if len(q) > 1 and q.std() > 0 and returns.std() > 0:
                from scipy.stats import spearmanr  # takes half a second, before the first step

                more["q_correlation"] = float(spearmanr(q, returns)[0])  # pyright: ignore
        found.pop("q", None)
        if (weight := found.pop("weight", None)) is not None:
            share = weight.sum().square() / (len(weight) * weight.square().sum())
            more["effective_sample_size"] = share.item()
            levels = torch.quantile(found["advantage"], torch.tensor(QUANTILES).double())
            names = (f"advantage_{round(100 * level)}" for level in QUANTILES)
            more |= dict(zip(names, levels.tolist(), strict=True))
        metrics = {key: values.mean().item() for key, values in found.items()}
        return Validation({**metrics, **more}, q, returns)

    def _of_batch(self, loss: LossModule, batch: TensorDictBase) -> dict[str, Tensor]:
        """Return what there is of each transition, or of all of them, once for each."""
        if isinstance(loss, AdvantageWeightedLoss):
            found = loss.equations(loss.evaluate(batch))
            found["squared_td_error"] = found.pop("td_error")
            del found["entropy"]  # minus the log-likelihood
            found["weight"] = functional.advantage_weight(
                found["advantage"], loss.temperature, loss.weight_clip
            )
        else:
            its = loss(batch)
            size = batch.batch_size[:1]
            found = {
                key: value.reshape(()).expand(size)
                for key, value in its.items()
                if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
            }
            error = batch.get(getattr(loss.tensor_keys, "priority", "td_error"), None)
            if error is not None and not self._windows:
                found["squared_td_error"] = error.reshape(-1)
        if self._windows:
            return found
        if (q := _q(loss, batch)) is not None:
            found["q"] = q.mean(0)
        return found | self._of_policy(loss, batch) if _has_policy(loss) else found

    def _of_policy(self, loss: LossModule, batch: TensorDictBase) -> dict[str, Tensor]:
        policy, action = loss.get_stateful_net("actor_network"), batch["action"]
        read = batch.select(*policy.in_keys, strict=False)
        found: dict[str, Tensor] = {}
        if not is_deterministic(policy):
            log_prob = policy.get_dist(read.copy()).log_prob(action)
            found["log_likelihood"] = log_prob.reshape(len(batch))
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            taken = policy(read.copy())["action"]
        if isinstance(self._action_space, Discrete):
            found["action_error"] = (taken.reshape(-1) != action.reshape(-1)).float()
        else:
            found["squared_action_error"] = (taken - action).flatten(1).square()
            if isinstance(space := self._action_space, Box) and space.is_bounded():
                low, high = space.low.ravel(), space.high.ravel()
                share = share_at_bounds(taken.flatten(1).cpu().numpy(), low, high)
                found["actions_at_bounds"] = torch.full((len(batch),), share)
        return found

    def _initial_value(self, loss: LossModule, device: torch.device) -> float | None:
        initial = self._initial.to(device)
        if "value_network_params" in loss._modules:
            value = loss.get_stateful_net("value_network")
            return value(initial.select(*value.in_keys))["state_value"].mean().item()
        if not _has_policy(loss):
            return None
        policy = loss.get_stateful_net("actor_network")
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            read = policy(initial.select(*policy.in_keys))
        initial["action"] = read["action"]
        q = _q(loss, initial)
        return None if q is None else functional.min_q(q).mean().item()


def _has_policy(loss: LossModule) -> bool:
    return "actor_network_params" in loss._modules


def _q(loss: LossModule, batch: TensorDictBase) -> Tensor | None:
    """Return Q_i(s, a) at the actions of the batch, ``[N, B]``; None if there is no Q."""
    if "qvalue_network_params" not in loss._modules:
        return None
    if isinstance(loss, AdvantageWeightedLoss):
        return loss._q(batch)
    network: Any = loss.qvalue_network
    stacked: Any = loss.qvalue_network_params
    values = []
    for params in stacked.unbind(0):
        with params.to_module(network):
            values.append(network(batch.select(*network.in_keys))["state_action_value"])
    return torch.stack(values).reshape(len(values), -1)


def return_is_known(dataset: OfflineDataset, discount: float) -> Tensor:
    """Return whether all of the return that followed is known, but for a little of it, ``[n]``."""
    check_discount(discount)
    lengths = dataset.episode_lengths
    ends = lengths.cumsum(0)
    terminated = dataset.transitions["next", "terminated"][ends - 1, 0]
    left = ends.repeat_interleave(lengths) - torch.arange(int(lengths.sum()))
    far = math.inf if discount == 1 else math.log(REST) / math.log(discount) if discount else 0
    return terminated.repeat_interleave(lengths) | (left > far)


@contextmanager
def _evaluated(loss: LossModule) -> Iterator[None]:
    """Put a loss and its networks, which are not among its children, into evaluation mode."""
    hidden = (each for each in vars(loss).values() if isinstance(each, nn.Module))
    modules = [*loss.modules(), *(each for its in hidden for each in its.modules())]
    before = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
