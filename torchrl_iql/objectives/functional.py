"""Implicit Q-Learning as pure functions: the equations of the paper, one function each.

"Offline Reinforcement Learning with Implicit Q-Learning", Kostrikov, Nair, Levine, 2021
(https://arxiv.org/abs/2110.06169); and, of the same parts, AWAC and fitted Q
evaluation. Tensors in, tensors out, one value per transition: ``[*B]`` is any batch shape and ``[N, *B]``
adds the N networks of the Q ensemble. Nothing here reduces over the batch, knows of keys or networks, or
synchronises with the device, so the functions can be compiled, captured, and batched over independent
learners; but for :func:`return_bounds`, which is of the rewards of all data.
"""

from __future__ import annotations

from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DISTANCES",
    "AWACOutputs",
    "Distance",
    "Outputs",
    "actor_loss",
    "advantage_weight",
    "awac_losses",
    "conservative_gap",
    "expectile_loss",
    "fitted_q_loss",
    "losses",
    "min_q",
    "qvalue_loss",
    "return_bounds",
    "td_target",
    "value_loss",
]

Distance = Literal["l2", "l1", "smooth_l1"]
DISTANCES: tuple[str, ...] = get_args(Distance)


class Outputs(NamedTuple):
    """The network outputs that the losses of a batch ``[*B]`` are made of.

    Attributes:
        log_prob: log pi(a | s), or minus the squared error of a deterministic policy, ``[*B]``.
        target_q: the target Q networks at the actions of the data, ``[N, *B]``, without gradients.
        q: the Q networks there, ``[N, *B]``.
        v: V(s), ``[*B]``.
        td_target: r + gamma (1 - terminated) V(s'), ``[*B]``, without gradients.
    """

    log_prob: Tensor
    target_q: Tensor
    q: Tensor
    v: Tensor
    td_target: Tensor


def losses(
    outputs: Outputs,
    *,
    expectile: float | Tensor,
    temperature: float | Tensor,
    weight_clip: float,
    distance: Distance,
) -> dict[str, Tensor]:
    """Compute IQL: equations 5, 6 and 7 from the same parameters, and what is worth watching.

    Args:
        outputs: of the networks.
        expectile: of :func:`value_loss`.
        temperature: of :func:`advantage_weight`.
        weight_clip: of :func:`advantage_weight`.
        distance: of :func:`qvalue_loss`.

    Returns:
        one value per transition, ``[*B]``, of ``loss_actor``, ``loss_qvalue`` and ``loss_value``; and,
        detached, ``td_error`` (squared, the largest of the ensemble), ``advantage``, ``value``,
        ``qvalue``, ``clip_fraction`` (1 where the weight is clipped) and ``entropy`` (minus log pi).
    """
    log_prob, target_q, q, v, target = outputs
    advantage = (min_q(target_q) - v).detach()
    weight = advantage_weight(advantage, temperature, weight_clip)
    return {
        "loss_actor": actor_loss(log_prob, weight),
        "loss_qvalue": qvalue_loss(q, target, distance),
        "loss_value": value_loss(target_q, v, expectile),
        **_watched(log_prob, q, target, v, advantage, weight, weight_clip),
    }


def _watched(
    log_prob: Tensor,
    q: Tensor,
    target: Tensor,
    value: Tensor,
    advantage: Tensor,
    weight: Tensor,
    weight_clip: float,
) -> dict[str, Tensor]:
    """Return what is worth watching of a weighted regression, one value per transition, detached."""
    watched = {
        "td_error": (q - target).square().amax(dim=0),
        "advantage": advantage,
        "value": value,
        "qvalue": q.mean(dim=0),
        "clip_fraction": (weight >= weight_clip).to(weight.dtype),
        "entropy": -log_prob,
    }
    return {name: its.detach() for name, its in watched.items()}


class AWACOutputs(NamedTuple):
    """The network outputs that AWAC's losses of a batch ``[*B]`` are made of.

    Attributes:
        log_prob: log pi(a | s) at the actions of the data, ``[*B]``.
        q: the Q networks there, ``[N, *B]``.
        policy_q: the Q networks at an action of the policy, ``[N, *B]``, without gradients.
        td_target: r + gamma (1 - terminated) min_i Q_i(s', a') of the target networks at an action of the
            policy, ``[*B]``, without gradients.
    """

    log_prob: Tensor
    q: Tensor
    policy_q: Tensor
    td_target: Tensor


def awac_losses(
    outputs: AWACOutputs,
    *,
    temperature: float | Tensor,
    weight_clip: float,
    distance: Distance,
) -> dict[str, Tensor]:
    """Compute AWAC: the weighted regression of IQL with A = min_i Q_i(s, a) - min_i Q_i(s, a~), a~ of pi.

    Args:
        outputs: of the networks.
        temperature: of :func:`advantage_weight`, one over the paper's lambda.
        weight_clip: of :func:`advantage_weight`.
        distance: of :func:`qvalue_loss`.

    Returns:
        one value per transition, ``[*B]``, of ``loss_actor`` and ``loss_qvalue``; and what
        :func:`losses` returns to be watched, where ``value`` is min_i Q_i(s, a~).
    """
    log_prob, q, policy_q, target = outputs
    value = min_q(policy_q).detach()
    advantage = min_q(q).detach() - value
    weight = advantage_weight(advantage, temperature, weight_clip)
    return {
        "loss_actor": actor_loss(log_prob, weight),
        "loss_qvalue": qvalue_loss(q, target, distance),
        **_watched(log_prob, q, target, value, advantage, weight, weight_clip),
    }


def conservative_gap(
    q: Tensor, log_density: Tensor, data_q: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Compute CQL's :math:`\log \sum_a e^{Q(s, a)} - Q(s, a_D)` from drawn actions.

    Args:
        q: the Q networks at K drawn actions of each state, ``[N, K, *B]``.
        log_density: of each draw, ``[K, *B]``, by which the sum is estimated.
        data_q: the Q networks at the actions of the data, ``[N, *B]``.
        temperature: of the exponential.

    Returns:
        ``[N, *B]``; at temperature 1 log K, a constant, above an estimate of the integral. At others the
        density is divided by the temperature, too, as in the official code.
    """
    scaled = (q - log_density.detach()) / temperature
    return temperature * scaled.logsumexp(dim=1) - data_q


def min_q(q: Tensor) -> Tensor:
    """Return the pessimistic value of a Q ensemble, min_i Q_i(s, a): ``[N, *B] -> [*B]``."""
    return q.min(dim=0).values


def expectile_loss(u: Tensor, expectile: float | Tensor) -> Tensor:
    r"""Compute the asymmetric square :math:`L_2^\tau(u) = |\tau - 1(u < 0)| u^2` (section 4.1).

    Args:
        u: differences, any shape.
        expectile: :math:`\tau` in (0, 1]. 0.5 is half the ordinary square; towards 1 the minimiser of
            the mean loss goes from the mean of the samples to their maximum.

    Returns:
        the loss of each element, in the shape of ``u``.
    """
    below = (u < 0).to(u.dtype)
    weight = below * (1 - expectile) + (1 - below) * expectile
    return (weight * u.square()).to(u.dtype)


def value_loss(target_q: Tensor, v: Tensor, expectile: float | Tensor) -> Tensor:
    r"""Compute the value objective :math:`L_2^\tau(\min_i \hat Q_i(s, a) - V(s))` (equation 5).

    Args:
        target_q: the target ensemble at the actions of the data, ``[N, *B]``, detached here.
        v: V(s), ``[*B]``; the only input that receives gradients.
        expectile: :math:`\tau` in (0, 1].

    Returns:
        ``[*B]``.
    """
    return expectile_loss(min_q(target_q).detach() - v, expectile)


def td_target(
    reward: Tensor, next_v: Tensor, terminated: Tensor, discount: float | Tensor
) -> Tensor:
    r"""Compute the one-step target :math:`r + \gamma (1 - terminated) V(s')` of equation 6.

    Args:
        reward: ``[*B]``; for an n-step transition the discounted sum of its n rewards.
        next_v: V(s'), ``[*B]``, detached here. Where ``terminated``, it is not read: it may be NaN.
        terminated: bool, ``[*B]``. A truncation (time limit) is not a termination: it bootstraps.
        discount: :math:`\gamma`; :math:`\gamma^n`, ``[*B]``, for n-step transitions.

    Returns:
        ``[*B]``.
    """
    return reward + discount * next_v.detach().masked_fill(terminated, 0.0)


def qvalue_loss(q: Tensor, target: Tensor, distance: Distance = "l2") -> Tensor:
    """Sum the distances of each Q network to the shared TD target over the ensemble (equation 6).

    Args:
        q: Q_i(s, a), ``[N, *B]``.
        target: ``[*B]``, detached here.
        distance: ``"l2"`` is the paper's squared error.

    Returns:
        ``[*B]``.
    """
    target = target.detach().expand_as(q)
    if distance == "l2":
        loss = F.mse_loss(q, target, reduction="none")
    elif distance == "l1":
        loss = F.l1_loss(q, target, reduction="none")
    elif distance == "smooth_l1":
        loss = F.smooth_l1_loss(q, target, reduction="none")
    else:
        raise ValueError(f"distance must be one of {DISTANCES}, got {distance!r}")
    return loss.sum(dim=0)


def advantage_weight(advantage: Tensor, temperature: float | Tensor, clip: float) -> Tensor:
    r"""Compute the weight of an action in policy extraction, :math:`\min(e^{\beta A}, clip)`.

    Args:
        advantage: :math:`A = \min_i \hat Q_i(s, a) - V(s)`, ``[*B]``.
        temperature: :math:`\beta \ge 0`, an inverse temperature: 0 clones the behaviour, and the
            larger it is, the greedier the policy.
        clip: the largest weight, 100 in the official code.

    Returns:
        ``[*B]``, positive.
    """
    return torch.exp(temperature * advantage).clamp_max(clip)


def actor_loss(log_prob: Tensor, weight: Tensor) -> Tensor:
    r"""Compute advantage-weighted regression, :math:`-\min(e^{\beta A}, clip) \log \pi(a | s)` (equation 7).

    Args:
        log_prob: :math:`\log \pi(a | s)` at the actions of the data, ``[*B]``; for a deterministic
            policy minus the squared error of its action.
        weight: :func:`advantage_weight`, ``[*B]``, detached here: the policy never moves Q or V.

    Returns:
        ``[*B]``.
    """
    return -weight.detach() * log_prob


def fitted_q_loss(q: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum the squared errors of networks that each have a target of their own over the ensemble.

    Args:
        q: Q_i(s, a), ``[N, *B]``.
        target: of each, ``[N, *B]``, detached here.
        weight: of each, ``[N, *B]``; None for 1.

    Returns:
        ``[*B]``.
    """
    squares = (q - target.detach()).square()
    return (squares if weight is None else weight * squares).sum(dim=0)


def return_bounds(reward: Tensor, terminated: Tensor, discount: float) -> tuple[float, float]:
    r"""Return the lowest and the highest discounted return that rewards like those of some data can come to.

    With rewards in :math:`[r_{min}, r_{max}]` where episodes go on, and in :math:`[t_{min}, t_{max}]` where
    they end, :math:`\max(t_{max}, r_{max} / (1 - \gamma))`: to go on for ever, or to end at once, is best,
    and anything between lies between. The lowest likewise.

    Args:
        reward: ``[n]``, of single steps.
        terminated: bool, ``[n]``.
        discount: :math:`\gamma` in [0, 1).

    Raises:
        ValueError: there are no rewards, one is not finite, or the discount is out of range.
    """
    if not (isinstance(discount, Real) and 0 <= discount < 1):
        raise ValueError(f"discount must be in [0, 1), got {discount!r}")
    if not len(reward) or not bool(reward.isfinite().all()):
        raise ValueError(f"expected finite rewards, got {len(reward)}, not all of them finite")
    low, high = [], []
    for rewards, factor in ((reward[terminated], 1.0), (reward[~terminated], 1 / (1 - discount))):
        if len(rewards):
            low.append(rewards.min().item() * factor)
            high.append(rewards.max().item() * factor)
    return min(low), max(high)
