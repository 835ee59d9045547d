"""Losses on small networks, and the same by hand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchrl.objectives as torchrl_objectives
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key, unravel_key_list
from torch import Tensor, nn
from torch.testing import assert_close
from torchrl.data import OneHot
from torchrl.modules import ProbabilisticActor

from torchrl_iql import DiscreteIQLLoss, IQLLoss, models

KINDS = ("continuous", "categorical", "one-hot")
OBS, ACT, CHOICES, BATCH, HIDDEN = 3, 2, 4, 16, (16, 16)
EXPECTILE, TEMPERATURE, CLIP, GAMMA = 0.7, 3.0, 100.0, 0.99

try:
    import torchrl._torchrl as torchrl_extension
except ImportError:  # built for another version of torch
    torchrl_extension = None


# --- Builders ---------------------------------------------------------------------------------------


class OwnCritic(nn.Module):
    """A critic of the user's own: the losses vmap it, where they stack those of ``models``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)


def own_critics(critics: list[TensorDictModule]) -> list[TensorDictModule]:
    return [TensorDictModule(OwnCritic(q.module), q.in_keys, q.out_keys) for q in critics]


class Sizes(NamedTuple):
    """Of observations, of actions, of the number of discrete actions, and of hidden layers."""

    observation: int = OBS
    action: int = ACT
    choices: int = CHOICES
    hidden: tuple[int, ...] = HIDDEN


SIZES = Sizes()


def networks(
    kind: str = "continuous", num: int = 2, dropout: float = 0.0, sizes: Sizes = SIZES
) -> dict:
    """Make the arguments of a loss: a policy, a list of ``num`` Q networks and V.

    Those of the kind one-hot are critics of one's own.
    """
    observation, action, choices, hidden = sizes
    if kind == "continuous":
        policy = models.gaussian_policy(observation, action, hidden_sizes=hidden, dropout=dropout)
        q = models.qvalue_ensemble(observation, action, num=num, hidden_sizes=hidden)
    else:
        actions = OneHot(choices) if kind == "one-hot" else choices
        make = partial(models.categorical_policy, hidden_sizes=hidden, dropout=dropout)
        policy = make(observation, actions)
        make = partial(models.discrete_qvalue_network, hidden_sizes=hidden)
        q = [make(observation, actions) for _ in range(num)]
    if kind == "one-hot":
        q = own_critics(q)
    return {
        "actor_network": policy,
        "qvalue_network": q,
        "value_network": models.value_network(observation, hidden_sizes=hidden),
        "num_qvalue_nets": num,
    }


def renamed(
    kind: str, nets: dict, td: TensorDict, keys: Mapping[str, NestedKey]
) -> tuple[dict, TensorDict]:
    """Return the same networks, and the same batch, with some of their entries under other keys.

    Args:
        kind: of the actions.
        nets: of :func:`networks`.
        td: a batch.
        keys: the new keys by the names of ``set_keys``, or of ``"observation"``.
    """
    new = {key: key for key in ("observation", "action", "state_action_value")} | dict(keys)
    policy = nets["actor_network"]
    inputs = [new["observation"]]
    networks = {
        **nets,
        "actor_network": ProbabilisticActor(
            TensorDictModule(policy[0].module, in_keys=inputs, out_keys=policy[0].out_keys),
            in_keys=policy[1].in_keys,
            out_keys=[new["action"]],
            distribution_class=policy[1].distribution_class,
        ),
        "qvalue_network": [
            TensorDictModule(
                network.module,
                in_keys=inputs + [new["action"]] * (kind == "continuous"),
                out_keys=[new["state_action_value"]],
            )
            for network in nets["qvalue_network"]
        ],
        "value_network": TensorDictModule(
            nets["value_network"].module,
            in_keys=inputs,
            out_keys=[keys.get("value", "state_value")],
        ),
    }
    td = td.copy()
    for name, key in keys.items():
        if name in ("observation", "action", "priority_weight") and name in td.keys():
            td.rename_key_(name, key)
        if name in ("observation", "reward", "done", "terminated"):
            td.rename_key_(("next", name), unravel_key(("next", key)))
    return networks, td


def iql_loss(kind: str = "continuous", nets: dict | None = None, **kwargs) -> IQLLoss:
    nets = networks(kind) if nets is None else nets
    if kind == "continuous":
        return IQLLoss(**nets, **kwargs)
    return DiscreteIQLLoss(**nets, action_space=kind, **kwargs)


def torchrl_loss(kind: str, nets: dict, **kwargs) -> torchrl_objectives.IQLLoss:
    """Make TorchRL's loss with the paper's defaults."""
    kwargs = {
        "loss_function": "l2",
        "expectile": EXPECTILE,
        "temperature": TEMPERATURE,
        **kwargs,
    }
    if kind == "continuous":
        return torchrl_objectives.IQLLoss(**nets, **kwargs)
    return torchrl_objectives.DiscreteIQLLoss(**nets, action_space=kind, **kwargs)


def transitions(
    kind: str = "continuous", batch: tuple[int, ...] = (BATCH,), sizes: Sizes = SIZES
) -> TensorDict:
    if kind == "continuous":
        action = 1.6 * torch.rand(*batch, sizes.action) - 0.8
    else:
        action = torch.randint(sizes.choices, batch)
        if kind == "one-hot":
            action = F.one_hot(action, sizes.choices)
    terminated = torch.rand(*batch, 1) < 0.3
    return TensorDict(
        {
            "observation": torch.randn(*batch, sizes.observation),
            "action": action,
            "next": {
                "observation": torch.randn(*batch, sizes.observation),
                "reward": torch.randn(*batch, 1),
                "done": terminated | (torch.rand(*batch, 1) < 0.2),
                "terminated": terminated,
            },
        },
        batch_size=batch,
    )


def as_kwargs(td: TensorDict, keys: list) -> dict[str, Tensor]:
    """Return the entries of a batch as the keyword arguments of a TensorDict module."""
    return {
        key if isinstance(key, str) else "_".join(key): td[key] for key in unravel_key_list(keys)
    }


def cast(td: TensorDict, dtype: torch.dtype) -> TensorDict:
    return td.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)


@torch.no_grad()
def by_hand(
    nets: dict,
    td: TensorDict,
    *,
    log_prob: Tensor | None = None,
    discount: float | Tensor = GAMMA,
    target: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the paper's losses of each transition, calling the networks as ordinary modules."""

    def q_of_action(q: Tensor) -> Tensor:
        if q.shape[-1] == 1:
            return q.squeeze(-1)
        chosen = td["action"].argmax(-1) if td["action"].shape == q.shape else td["action"]
        return q.gather(-1, chosen.reshape(*q.shape[:-1], 1)).squeeze(-1)

    q = torch.stack(
        [q_of_action(net(td.copy())["state_action_value"]) for net in nets["qvalue_network"]]
    )
    v = nets["value_network"](td.copy())["state_value"].squeeze(-1)
    if log_prob is None:
        log_prob = nets["actor_network"].get_dist(td.copy()).log_prob(td["action"])
    if target is None:
        next_v = nets["value_network"](td["next"].copy())["state_value"].squeeze(-1)
        alive = ~td["next", "terminated"].squeeze(-1)
        target = td["next", "reward"].squeeze(-1) + discount * torch.where(alive, next_v, 0.0)
    advantage = q.min(0).values - v
    weight = torch.exp(TEMPERATURE * advantage).clamp(max=CLIP)
    return {
        "loss_actor": -weight * log_prob,
        "loss_qvalue": (q - target).square().sum(0),
        "loss_value": torch.where(
            advantage > 0, EXPECTILE * advantage**2, (1 - EXPECTILE) * advantage**2
        ),
        "entropy": -log_prob,
        "advantage": advantage,
        "value": v,
        "qvalue": q.mean(0),
        "clip_fraction": (weight >= CLIP).to(weight.dtype),
        "td_error": (q - target).square().max(0).values,
    }


def mean_by_hand(*args, **kwargs) -> dict[str, Tensor]:
    per_transition = by_hand(*args, **kwargs)
    del per_transition["td_error"]
    return {key: value.mean() for key, value in per_transition.items()}


def assert_entries(out, expected, **tolerance) -> None:
    """Check that every entry of ``expected`` is in ``out``, with its value."""
    for key, value in expected.items():
        assert_close(out[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def total(out: TensorDict) -> Tensor:
    return sum(value for key, value in out.items() if key.startswith("loss_"))


def gradients(loss: IQLLoss, td: TensorDict) -> dict[str, Tensor]:
    loss.zero_grad()
    total(loss(td.copy())).backward()
    return {name: parameter.grad.clone() for name, parameter in loss.named_parameters()}


def perturb(parameters) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


class Concatenate(nn.Module):
    """A linear network of several inputs."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(sizes), 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        observation, *others = inputs
        others = [x.reshape(*observation.shape[:-1], -1).to(observation.dtype) for x in others]
        return self.linear(torch.cat([observation, *others], -1))


def built(
    architecture: models.Architecture, statistics: models.Statistics | None = None, num: int = 2
) -> tuple[TensorDictModule, list[TensorDictModule], TensorDictModule]:
    """Build policy, Q networks and V, in the order of the losses' arguments."""
    policy = architecture.policy_network(statistics)
    qvalues = [architecture.qvalue_network(statistics) for _ in range(num)]
    return policy, qvalues, architecture.value_network(statistics)
