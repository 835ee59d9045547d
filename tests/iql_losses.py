"""Losses on small networks, and the same by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchrl.objectives as torchrl_objectives
from tensordict import TensorDict
from tensordict.nn import (
    TensorDictModule,
)
from tensordict.utils import unravel_key_list
from torch import Tensor, nn
from torch.testing import assert_close
from torchrl.data import (
    OneHot,
)

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


def networks(kind: str = "continuous", num: int = 2, dropout: float = 0.0) -> dict:
    """Make the arguments of a loss: a policy, a list of ``num`` Q networks and V.

    Those of the kind one-hot are critics of one's own.
    """
    if kind == "continuous":
        policy = models.gaussian_policy(OBS, ACT, hidden_sizes=HIDDEN, dropout=dropout)
        q = models.qvalue_ensemble(OBS, ACT, num=num, hidden_sizes=HIDDEN)
    else:
        actions = OneHot(CHOICES) if kind == "one-hot" else CHOICES
        policy = models.categorical_policy(OBS, actions, hidden_sizes=HIDDEN, dropout=dropout)
        q = [models.discrete_qvalue_network(OBS, actions, hidden_sizes=HIDDEN) for _ in range(num)]
    if kind == "one-hot":
        q = own_critics(q)
    return {
        "actor_network": policy,
        "qvalue_network": q,
        "value_network": models.value_network(OBS, hidden_sizes=HIDDEN),
        "num_qvalue_nets": num,
    }


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


def transitions(kind: str = "continuous", batch: tuple[int, ...] = (BATCH,)) -> TensorDict:
    if kind == "continuous":
        action = 1.6 * torch.rand(*batch, ACT) - 0.8
    else:
        action = torch.randint(CHOICES, batch)
        if kind == "one-hot":
            action = F.one_hot(action, CHOICES)
    terminated = torch.rand(*batch, 1) < 0.3
    return TensorDict(
        {
            "observation": torch.randn(*batch, OBS),
            "action": action,
            "next": {
                "observation": torch.randn(*batch, OBS),
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
        "clip_fraction": (weight >= CLIP).float(),
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
