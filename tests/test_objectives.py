"""What IQLLoss and DiscreteIQLLoss promise, one section per promise, on networks small enough to check.

Where TorchRL's own loss breaks a promise, the test runs it too, on the same networks and batch: it
documents the difference, and fails once TorchRL has closed it.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchrl.objectives as torchrl_objectives
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    TensorDictModule,
    TensorDictSequential,
    set_composite_lp_aggregate,
)
from tensordict.nn.distributions import Delta as TensorDictDelta
from tensordict.utils import unravel_key_list
from torch import Tensor, nn
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Normal
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.data import (
    Binary,
    Categorical,
    LazyTensorStorage,
    MultiOneHot,
    OneHot,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.data.postprocs import MultiStep
from torchrl.envs import GymEnv
from torchrl.modules import (
    Actor,
    Delta,
    IndependentNormal,
    ProbabilisticActor,
    TanhDelta,
    ValueOperator,
)
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators
from torchrl.objectives.value import TD0Estimator
from torchrl.trainers import (
    DefaultOptimizationStepper,
    ReplayBufferTrainer,
    TargetNetUpdaterHook,
    Trainer,
)

from torchrl_iql import DiscreteIQLLoss, IQLLoss, models
from torchrl_iql.objectives import functional as iql

KINDS = ("continuous", "categorical", "one-hot")
OBS, ACT, CHOICES, BATCH, HIDDEN = 3, 2, 4, 16, (16, 16)
EXPECTILE, TEMPERATURE, CLIP, GAMMA = 0.7, 3.0, 100.0, 0.99

try:
    import torchrl._torchrl as torchrl_extension
except ImportError:  # built for another version of torch
    torchrl_extension = None


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


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
    """The arguments of a loss: a policy, a list of ``num`` Q networks and V.

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
    """TorchRL's loss with the paper's defaults."""
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
    """The entries of a batch as the keyword arguments of a TensorDict module."""
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
    """The losses of the paper for each transition, from the networks called as ordinary modules."""

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
    """Every entry of ``expected`` is in ``out``, with its value."""
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


# --- Each network once ------------------------------------------------------------------------------


def evaluations(loss, td: TensorDict, method: str = "forward") -> Counter:
    """How often each network runs; vmap runs a whole ensemble in one call."""
    calls = Counter()

    def counter(name: str) -> Callable:
        def count(module: nn.Module, args: tuple) -> None:
            label = name
            if name == "Q" and not torch.is_grad_enabled():
                label = "target Q"
            if name == "V":
                label = "V(s)" if torch.equal(args[0], td["observation"]) else "V(s')"
            calls[label] += 1

        return count

    handles = []
    for name, attribute in (("policy", "actor"), ("Q", "qvalue"), ("V", "value")):
        network = getattr(loss, f"{attribute}_network")
        first = next(m for m in network.modules() if isinstance(m, nn.Linear))
        handles.append(first.register_forward_pre_hook(counter(name)))
    getattr(loss, method)(td.copy())
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize(
    "method, expected",
    [
        ("forward", ["policy", "target Q", "Q", "V(s)", "V(s')"]),
        ("actor_loss", ["policy", "target Q", "V(s)"]),
        ("value_loss", ["target Q", "V(s)"]),
        ("qvalue_loss", ["Q", "V(s')"]),
    ],
)
def test_each_network_is_evaluated_once(kind, method, expected):
    """Every loss evaluates what it needs, once per input; TorchRL's forward evaluates Q and V again."""
    nets, td = networks(kind), transitions(kind)
    assert evaluations(iql_loss(kind, nets), td, method) == Counter(expected)
    if method == "forward":
        assert evaluations(torchrl_loss(kind, nets), td).total() == 7


@pytest.mark.parametrize("name", ["actor", "value", "qvalue"])
def test_a_loss_alone_equals_that_of_forward(kind, name):
    """``actor_loss``, ``value_loss`` and ``qvalue_loss`` need only their own entries and write nothing."""
    loss, td = iql_loss(kind), transitions(kind)
    own = td.select("observation", "action", *(["next"] if name == "qvalue" else []))
    keys = set(own.keys(True, True))
    alone, info = getattr(loss, f"{name}_loss")(own)
    out = loss(td)
    assert torch.equal(alone, out[f"loss_{name}"])
    assert set(own.keys(True, True)) == keys
    if name == "qvalue":
        assert info["td_error"].shape == (2, BATCH)
        assert torch.equal(info["td_error"].max(0).values, td["td_error"])


# --- Masks, n steps, importance weights -------------------------------------------------------------


VALID = torch.arange(BATCH) % 3 > 0


def with_mask(td: TensorDict, key, shape: tuple[int, ...] = (BATCH,)) -> TensorDict:
    """The batch with a mask, and garbage where it is False."""
    spoilt = td.apply(lambda x: 50 * x if x.is_floating_point() else x)
    spoilt = TensorDict.where(td, VALID, spoilt)
    return spoilt.set(key, VALID.reshape(shape))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)], ids=str)
@pytest.mark.parametrize("key", [("collector", "mask"), "shifted_valid"], ids=str)
def test_masked_transitions_do_not_count(kind, key, shape, reduction):
    """Losses, entropy, diagnostics and gradients are those of the valid transitions alone."""
    loss, td = iql_loss(kind, reduction=reduction), transitions(kind)
    masked = with_mask(td, key, shape)
    assert_entries(loss(masked.copy()), loss(td[VALID]))
    assert_entries(gradients(loss, masked), gradients(loss, td[VALID]))


def test_masked_transitions_are_zero_without_reduction(kind):
    """``reduction="none"`` keeps the shape of the batch and zeroes what the mask leaves out."""
    nets, td = networks(kind), transitions(kind)
    loss = iql_loss(kind, nets, reduction="none", scalar_output_mode="exclude")
    out = loss(with_mask(td, "shifted_valid"))
    expected = by_hand(nets, td)
    for key in ("loss_actor", "loss_qvalue", "loss_value"):
        assert_close(out[key], torch.where(VALID, expected[key], 0.0))


def test_the_mask_can_be_named_or_ignored(kind):
    """TorchRL's ``loss_mask_key``: the name of a mask, or None for no mask."""
    loss, td = iql_loss(kind), transitions(kind)
    masked = with_mask(td, ("my", "valid"))
    loss.loss_mask_key = ("my", "valid")
    assert_entries(loss(masked.copy()), loss(td[VALID]))
    loss.loss_mask_key = None
    assert_entries(loss(masked.copy()), loss(masked.exclude("my")))


def test_torchrl_forgets_the_mask():
    """In TorchRL's loss_qvalue and entropy the masked transitions count."""
    td = transitions()
    theirs = torchrl_loss("continuous", networks())
    masked = with_mask(td, "shifted_valid")
    out, unmasked, valid = (
        theirs(masked.clone()),
        theirs(masked.exclude("shifted_valid")),
        theirs(td[VALID]),
    )
    assert_close(out["loss_value"], valid["loss_value"])
    for forgotten in ("loss_qvalue", "entropy"):
        assert torch.equal(out[forgotten], unmasked[forgotten])
        assert not torch.isclose(out[forgotten], valid[forgotten], rtol=0.1)


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)], ids=str)
def test_n_step_transitions_bootstrap_with_their_own_discount(kind, shape):
    """The target of an n-step transition holds gamma^n V(s'); in TorchRL's loss gamma^1."""
    nets, td = networks(kind), transitions(kind)
    steps = torch.randint(1, 6, (BATCH,))
    td["steps_to_next_obs"] = steps.reshape(shape)
    expected = mean_by_hand(nets, td, discount=GAMMA**steps)
    one_step = mean_by_hand(nets, td)
    assert not torch.isclose(expected["loss_qvalue"], one_step["loss_qvalue"], rtol=1e-3)
    assert_entries(iql_loss(kind, nets)(td.clone()), expected)
    assert_close(torchrl_loss(kind, nets)(td.clone())["loss_qvalue"], one_step["loss_qvalue"])


def test_multi_step_of_torchrl():
    """Trajectories through TorchRL's MultiStep give the n-step targets of the trajectory."""
    gamma, n, length = 0.9, 3, 6
    nets, td = networks(), transitions(batch=(1, length))
    for key in ("done", "terminated"):
        td["next", key] = torch.zeros(1, length, 1, dtype=torch.bool)
    reward = td["next", "reward"].flatten()
    next_v = nets["value_network"](td["next"].copy())["state_value"].flatten().detach()
    target = torch.stack(
        [
            sum(gamma**i * reward[t + i] for i in range(min(n, length - t)))
            + gamma ** min(n, length - t) * next_v[min(t + n, length) - 1]
            for t in range(length)
        ]
    )
    batch = MultiStep(gamma=gamma, n_steps=n)(td.clone())
    loss = iql_loss(nets=nets).make_value_estimator(gamma=gamma)
    assert_close(loss(batch)["loss_qvalue"], by_hand(nets, td, target=target)["loss_qvalue"].mean())


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_importance_weights(kind, masked, shape):
    """``priority_weight`` weighs all three losses (a weighted mean); TorchRL's loss does not read it."""
    nets, td = networks(kind), transitions(kind)
    weight = torch.rand(BATCH) + 0.1
    counted = weight * VALID if masked else weight
    expected = by_hand(nets, td)
    td["priority_weight"] = weight.reshape(shape)
    if masked:
        td["shifted_valid"] = VALID
    for reduction, reduce in (
        ("mean", lambda x: (counted * x).sum() / counted.sum()),
        ("sum", lambda x: (counted * x).sum()),
        ("none", lambda x: counted * x),
    ):
        loss = iql_loss(kind, nets, reduction=reduction, scalar_output_mode="exclude")
        out = loss(td.clone())
        for key in ("loss_actor", "loss_qvalue", "loss_value"):
            assert_close(out[key], reduce(expected[key]))
    if not masked:
        theirs = torchrl_loss(kind, nets)(td.clone())
        assert_close(theirs["loss_value"], expected["loss_value"].mean())


def test_the_key_of_the_importance_weights_can_be_nested(kind):
    """``set_keys(priority_weight=...)`` takes a nested key, and weights are optional."""
    loss, td = iql_loss(kind), transitions(kind)
    td["priority_weight"] = torch.rand(BATCH)
    expected, unweighted = loss(td.clone()), loss(td.exclude("priority_weight"))
    loss.set_keys(priority_weight=("buffer", "weight"))
    assert_entries(loss(td.exclude("priority_weight")), unweighted)
    td.rename_key_("priority_weight", ("buffer", "weight"))
    assert_entries(loss(td), expected)


# --- The Q ensemble ---------------------------------------------------------------------------------


def heads(loss, given: nn.Module, name: str) -> Tensor:
    """The N copies of one parameter of the given Q network."""
    return loss.qvalue_network_params.get(tuple(name.split("."))).detach()


def test_a_single_q_network_keeps_its_initialisation(kind):
    """Head 0 is the given network, the others differ, and orthogonal weights stay so; TorchRL redraws."""
    nets = networks(kind)
    given = nets["qvalue_network"] = nets["qvalue_network"][0]
    nets["num_qvalue_nets"] = 3
    before = copy.deepcopy(given.state_dict())
    ours, theirs = iql_loss(kind, nets), torchrl_loss(kind, nets)
    for name, parameter in given.named_parameters():
        assert torch.equal(parameter, before[name])
        stacked = heads(ours, given, name)
        assert torch.equal(stacked[0], parameter)
        if name.endswith("bias"):
            assert torch.equal(stacked, torch.zeros_like(stacked))
            continue
        for other in (1, 2):
            assert (stacked[other] - stacked[other - 1]).abs().max() > 0.1
        gain = torch.full((3, min(parameter.shape)), math.sqrt(2))
        assert_close(torch.linalg.svdvals(stacked), gain, rtol=0, atol=1e-5)
        redrawn = heads(theirs, given, name)
        assert not torch.isclose(redrawn[0], parameter).any()
        assert (torch.linalg.svdvals(redrawn) - gain).abs().max() > 0.1


def test_biases_of_the_further_q_networks_are_redrawn_within_their_range():
    """A bias of one unit differs between the networks; in TorchRL it is the same in all of them."""
    nets = networks()
    given = nets["qvalue_network"] = nets["qvalue_network"][0]
    nets["num_qvalue_nets"] = 4
    *_, (name, bias) = ((n, p) for n, p in given.named_parameters() if n.endswith("bias"))
    nn.init.constant_(bias, 0.5)
    ours = heads(iql_loss(nets=nets), given, name).flatten()
    assert ours[0] == 0.5 and len(set(ours.tolist())) == 4 and ours.abs().max() <= 0.5
    theirs = heads(torchrl_loss("continuous", nets), given, name).flatten()
    assert len(set(theirs.tolist())) == 1


@pytest.mark.parametrize("num", [1, 2, 4])
def test_a_list_of_q_networks_is_stacked_as_it_is(kind, num):
    """The parameters of network i are row i of the ensemble."""
    nets = networks(kind, num)
    loss = iql_loss(kind, nets)
    for i, network in enumerate(nets["qvalue_network"]):
        for name, parameter in network.named_parameters():
            stacked = heads(loss, network, name)
            assert torch.equal(stacked if num == 1 else stacked[i], parameter)


@pytest.mark.parametrize("single", [False, True])
def test_targets_start_equal_and_do_not_follow(kind, single):
    """Target networks begin as copies, and only an updater moves them; their losses show which is read."""
    nets = networks(kind)
    if single:
        nets["qvalue_network"] = nets["qvalue_network"][0]
    loss, td = iql_loss(kind, nets), transitions(kind)
    for key, target in loss.target_qvalue_network_params.items(True, True):
        online = loss.qvalue_network_params.get(key)
        assert torch.equal(target, online) and target.data_ptr() != online.data_ptr()
        assert not target.requires_grad
    before = loss(td.clone())
    perturb(loss.qvalue_network_params.parameters())
    after = loss(td.clone())
    for unmoved in ("loss_actor", "loss_value", "advantage", "clip_fraction"):
        assert torch.equal(before[unmoved], after[unmoved])
    for moved in ("loss_qvalue", "qvalue"):
        assert not torch.equal(before[moved], after[moved])


def test_lazy_q_networks():
    """A lazy network cannot be copied: the message says what to do."""
    nets = networks()
    nets["qvalue_network"] = ValueOperator(nn.LazyLinear(1), in_keys=["observation"])
    with pytest.raises(ValueError, match=r"qvalue_network has lazy.*num_qvalue_nets=2"):
        iql_loss(nets=nets)


# --- Keys -------------------------------------------------------------------------------------------


class Concatenate(nn.Module):
    """A linear network of several inputs."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(sizes), 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        observation, *others = inputs
        others = [x.reshape(*observation.shape[:-1], -1).to(observation.dtype) for x in others]
        return self.linear(torch.cat([observation, *others], -1))


def test_networks_with_their_own_inputs():
    """Q may see what the policy does not, V reads its own keys, and keyword arguments reach them all."""
    gaussian = networks()["actor_network"][0].module
    policy = ProbabilisticActor(
        TensorDictModule(gaussian, in_keys=[("agent", "obs")], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    q_keys = [("agent", "obs"), "action", "privileged"]
    nets = {
        "actor_network": policy,
        "qvalue_network": [
            ValueOperator(Concatenate(OBS, ACT, 1), in_keys=q_keys) for _ in range(2)
        ],
        "value_network": ValueOperator(nn.Linear(4, 1), in_keys=[("critic", "state")]),
    }
    td = transitions()
    td.rename_key_("observation", ("agent", "obs"))
    td["privileged"] = torch.randn(BATCH, 1)
    td["critic", "state"] = torch.randn(BATCH, 4)
    td["next", "critic", "state"] = torch.randn(BATCH, 4)

    loss = iql_loss(nets=nets)
    assert loss.in_keys == [
        *q_keys,
        ("critic", "state"),
        ("next", "critic", "state"),
        ("next", "reward"),
        ("next", "done"),
        ("next", "terminated"),
    ]
    expected = mean_by_hand(nets, td)
    assert_entries(loss(td.select(*loss.in_keys)), expected)
    losses = dict(zip(loss.out_keys, loss(**as_kwargs(td, loss.in_keys)), strict=True))
    assert_entries(losses, {key: expected[key] for key in loss.out_keys})
    losses = dict(zip(loss.out_keys, loss(*map(td.get, loss.in_keys)), strict=True))
    assert_entries(losses, {key: expected[key] for key in loss.out_keys})

    theirs = torchrl_loss("continuous", nets)
    assert ("next", "critic", "state") not in theirs.in_keys
    with pytest.raises(KeyError, match="privileged"):
        theirs.qvalue_loss(td)


RENAMED = {
    "value": ("new", "v"),
    "action": ("new", "a"),
    "priority": ("other", "p"),
    "priority_weight": ("new", "w"),
    "state_action_value": ("new", "q"),
    "reward": ("new", "r"),
    "done": ("new", "d"),
    "terminated": ("new", "t"),
}


@pytest.mark.parametrize("names", [[name] for name in RENAMED] + [list(RENAMED)], ids="+".join)
@pytest.mark.parametrize("estimator", ["td0", "tdlambda"])
def test_set_keys(kind, names, estimator):
    """Each entry can be renamed, with nested keys; losses, priority and keyword arguments follow."""
    nets, td = networks(kind), transitions(kind, (4, 5))
    td["priority_weight"] = torch.rand(4, 5)
    loss = iql_loss(kind, nets).make_value_estimator(estimator)
    expected = loss(td)
    priority = td.pop("td_error")

    keys = {name: RENAMED[name] for name in names}
    action, q, v = (
        keys.get(name, default)
        for name, default in (
            ("action", "action"),
            ("state_action_value", "state_action_value"),
            ("value", "state_value"),
        )
    )
    policy, (first, second) = nets["actor_network"], nets["qvalue_network"]
    renamed = {
        "actor_network": ProbabilisticActor(
            policy[0],
            in_keys=policy[1].in_keys,
            out_keys=[action],
            distribution_class=policy[1].distribution_class,
        ),
        "qvalue_network": [
            TensorDictModule(
                network.module,
                in_keys=["observation", *([action] if kind == "continuous" else [])],
                out_keys=[q],
            )
            for network in (first, second)
        ],
        "value_network": TensorDictModule(
            nets["value_network"].module, in_keys=["observation"], out_keys=[v]
        ),
    }
    for name, key in keys.items():
        if name in ("action", "priority_weight"):
            td.rename_key_(name, key)
        elif name in ("reward", "done", "terminated"):
            td.rename_key_(("next", name), ("next", *key))

    loss = iql_loss(kind, renamed).make_value_estimator(estimator)
    assert "observation" in loss.in_keys  # read before: they must follow
    loss.set_keys(**keys)
    assert_entries(loss(td), expected)
    assert_close(td[keys.get("priority", "td_error")], priority)
    if estimator == "td0":
        unweighted = loss(td.exclude("priority_weight", RENAMED["priority_weight"]))
        losses = loss(**as_kwargs(td, loss.in_keys))
        assert_entries(
            dict(zip(loss.out_keys, losses, strict=True)), unweighted.select(*loss.out_keys)
        )


def test_set_keys_restores_a_default_and_refuses_an_unknown_name(kind):
    """``set_keys(name=None)`` restores the default key of ``name``."""
    loss, td = iql_loss(kind), transitions(kind)
    loss.set_keys(reward=("new", "r"))
    with pytest.raises(KeyError, match="new"):
        loss(td.clone())
    loss.set_keys(reward=None)
    assert loss(td)["loss_qvalue"].isfinite()
    with pytest.raises(ValueError, match="rewards is not an accepted tensordict key"):
        loss.set_keys(rewards="r")


# --- The batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["td0", "td1", "tdlambda"])
def test_the_next_observation_of_a_terminal_is_not_read(kind, estimator):
    """NaN there changes neither losses nor gradients; in TorchRL's loss it makes loss_qvalue NaN."""
    nets, td = networks(kind), transitions(kind, (4, 5))
    loss = iql_loss(kind, nets).make_value_estimator(estimator)
    terminated = td["next", "terminated"]
    assert terminated.any()
    bad = td.clone()
    bad["next", "observation"] = td["next", "observation"].masked_fill(terminated, math.nan)
    assert_entries(loss(bad.copy()), loss(td.copy()), rtol=0, atol=0)
    assert_entries(gradients(loss, bad), gradients(loss, td), rtol=0, atol=0)
    theirs = torchrl_loss(kind, nets)
    theirs.make_value_estimator(ValueEstimators.TD0)
    assert theirs(bad.clone())["loss_qvalue"].isnan()


@pytest.mark.parametrize(
    "estimator",
    [{}, {"value_type": "td1"}, {"value_type": "tdlambda"}, {"average_rewards": True}],
    ids=str,
)
def test_the_batch_receives_the_priority_and_nothing_else(kind, estimator):
    """No entry changes, none is added but the detached priority, and no graph stays behind."""
    nets, td = networks(kind), transitions(kind, (4, 5))
    before = td.clone()
    iql_loss(kind, nets).make_value_estimator(**estimator)(td)
    priority = td.pop("td_error")
    assert set(td.keys(True)) == set(before.keys(True))
    for key, value in before.items(True, True):
        assert torch.equal(td[key], value), key
        assert not td[key].requires_grad, key
    assert not priority.requires_grad
    if not estimator:
        assert_close(priority, by_hand(nets, td)["td_error"])


def test_torchrl_leaves_its_graph_in_the_batch():
    """TorchRL writes the policy's outputs into the batch, which keep the graph alive."""
    td = transitions()
    torchrl_loss("continuous", networks())(td)
    assert {"_log_prob", "loc", "scale"} <= set(td.keys())
    assert td["loc"].requires_grad


@pytest.mark.parametrize("estimator", [{}, {"average_rewards": True}], ids=str)
def test_a_locked_batch(kind, estimator):
    """The losses are those of an unlocked batch and nothing is written; TorchRL's loss raises."""
    nets, td = networks(kind), transitions(kind)
    loss = iql_loss(kind, nets).make_value_estimator(**estimator)
    expected = loss(td.clone())
    td.lock_()
    assert_entries(loss(td), expected, rtol=0, atol=0)
    assert "td_error" not in td.keys()
    with pytest.raises(RuntimeError, match="locked"):
        torchrl_loss(kind, nets)(td)


@pytest.mark.parametrize("batch", [(), (1,), (4, 5), (2, 3, 4)], ids=str)
def test_batch_shapes(kind, batch):
    """A batch of any shape gives the losses of its flattened transitions."""
    loss, td = iql_loss(kind), transitions(kind, batch)
    flat = td.reshape(-1)
    assert_entries(loss(td), loss(flat))
    assert td["td_error"].shape == batch
    assert_close(td["td_error"].reshape(-1), flat["td_error"])


# --- Policies ---------------------------------------------------------------------------------------


class CompositeHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.move, self.grip = nn.Linear(OBS, ACT), nn.Linear(OBS, CHOICES)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loc = self.move(observation)
        return loc, torch.full_like(loc, 0.5), self.grip(observation)


@pytest.mark.parametrize("aggregate", [True, False])
@pytest.mark.parametrize(
    "keys", [[("action", "move"), ("action", "grip")], ["move", "grip"]], ids=str
)
def test_composite_actions(keys, aggregate):
    """Their log-likelihood is the sum over the parts; TorchRL's loss does not take them."""
    move, grip = keys
    heads = CompositeHeads()
    policy = ProbabilisticActor(
        TensorDictModule(
            heads,
            in_keys=["observation"],
            out_keys=[
                ("params", "move", "loc"),
                ("params", "move", "scale"),
                ("params", "grip", "logits"),
            ],
        ),
        in_keys=["params"],
        out_keys=keys,
        distribution_class=CompositeDistribution,
        distribution_kwargs={
            "distribution_map": {"move": IndependentNormal, "grip": CategoricalDistribution},
            "name_map": {"move": move, "grip": grip},
        },
    )
    nets = {
        "actor_network": policy,
        "qvalue_network": [
            TensorDictModule(
                Concatenate(OBS, ACT, 1), ["observation", move, grip], ["state_action_value"]
            )
            for _ in range(2)
        ],
        "value_network": networks()["value_network"],
    }
    td = transitions().exclude("action")
    td[move], td[grip] = torch.randn(BATCH, ACT), torch.randint(CHOICES, (BATCH,))
    loc, scale, logits = heads(td["observation"])
    log_prob = Normal(loc, scale).log_prob(td[move]).sum(-1)
    log_prob = log_prob + logits.log_softmax(-1).gather(-1, td[grip].unsqueeze(-1)).squeeze(-1)
    expected = mean_by_hand(nets, td, log_prob=log_prob.detach())

    with set_composite_lp_aggregate(aggregate):
        loss = iql_loss(nets=nets)
        keys_before = set(td.keys(True))
        assert_entries(loss(td), expected)
        assert set(td.keys(True)) - keys_before == {"td_error"}
        td.pop("td_error")
        inputs = ["observation", move, grip, ("next", "observation")]
        inputs += [("next", key) for key in ("reward", "done", "terminated")]
        losses = dict(zip(loss.out_keys, loss(**as_kwargs(td, inputs)), strict=True))
        assert_entries(losses, {key: expected[key] for key in loss.out_keys})
        with pytest.raises((KeyError, TypeError, ValueError)):
            torchrl_loss("continuous", nets)(td)


def test_encodings_of_discrete_actions():
    """Integers ``[B]`` and ``[B, 1]`` and one-hot vectors of any dtype are the same actions.

    TorchRL's loss takes neither ``[B, 1]`` nor bool, the dtype of its own OneHot spec.
    """
    nets, td = networks("categorical"), transitions("categorical")
    expected = mean_by_hand(nets, td)
    column = td.clone().set("action", td["action"].unsqueeze(-1))
    one_hot = td.clone().set("action", F.one_hot(td["action"], CHOICES))
    assert_entries(iql_loss("categorical", nets)(td.clone()), expected)
    assert_entries(iql_loss("categorical", nets)(column.clone()), expected)
    policy = nets["actor_network"]
    one_hot_policy = models.categorical_policy(OBS, OneHot(CHOICES), hidden_sizes=HIDDEN)
    one_hot_policy.load_state_dict(policy.state_dict())
    nets["actor_network"] = one_hot_policy
    for dtype in (torch.int64, torch.float32, OneHot(CHOICES).dtype):
        batch = one_hot.clone().set("action", one_hot["action"].to(dtype))
        assert_entries(iql_loss("one-hot", nets)(batch.clone()), expected)
    with pytest.raises(RuntimeError, match="bool"):
        torchrl_loss("one-hot", nets)(batch)
    nets["actor_network"] = policy
    with pytest.raises(RuntimeError, match="shape"):
        torchrl_loss("categorical", nets)(column)


def probabilistic(network: nn.Module, distribution: type) -> ProbabilisticActor:
    module = TensorDictModule(network, in_keys=["observation"], out_keys=["param"])
    return ProbabilisticActor(module, in_keys=["param"], distribution_class=distribution)


DETERMINISTIC = {
    "Actor": lambda net: Actor(net),
    "TensorDictModule": lambda net: TensorDictModule(net, ["observation"], ["action"]),
    "TensorDictSequential": lambda net: TensorDictSequential(
        TensorDictModule(net, ["observation"], ["action"])
    ),
    "Delta": lambda net: probabilistic(net, Delta),
    "TensorDict's Delta": lambda net: probabilistic(net, TensorDictDelta),
    "TanhDelta": lambda net: probabilistic(net, TanhDelta),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_policies(name):
    """Trained on the weighted squared error of their action, without entropy; TorchRL's loss fails."""
    network = nn.Linear(OBS, ACT)
    nets, td = networks() | {"actor_network": DETERMINISTIC[name](network)}, transitions()
    predicted = network(td["observation"])
    if name == "TanhDelta":
        predicted = predicted.tanh()
    squared_error = (predicted - td["action"]).square().sum(-1)
    expected = by_hand(nets, td, log_prob=-squared_error)
    del expected["entropy"], expected["td_error"]

    loss = iql_loss(nets=nets)
    out = loss(td.clone())
    assert_entries(out, {key: value.mean() for key, value in expected.items()})
    assert "entropy" not in out.keys()
    assert loss.out_keys == ["loss_actor", "loss_qvalue", "loss_value"]
    assert len(loss(**as_kwargs(td, loss.in_keys))) == 3
    weight = torch.exp(TEMPERATURE * expected["advantage"]).clamp(max=CLIP)
    (gradient,) = torch.autograd.grad((weight * squared_error).mean(), [network.weight])
    out["loss_actor"].backward()
    assert_close(network.weight.grad, gradient)
    assert network.weight.grad.abs().sum() > 0

    theirs = torchrl_loss("continuous", nets)
    if hasattr(nets["actor_network"], "get_dist"):
        assert theirs(td)["loss_actor"].isinf()
    else:
        with pytest.raises(AttributeError, match="get_dist"):
            theirs(td)


# --- Outputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(BATCH,), (4, 5)], ids=str)
def test_reductions(kind, batch):
    """The loss of each transition, their mean (the default) and their sum, from a batch or kwargs."""
    nets, td = networks(kind), transitions(kind, batch)
    per_transition = by_hand(nets, td)
    scalars = {
        key: per_transition[key].mean()
        for key in ("entropy", "advantage", "value", "qvalue", "clip_fraction")
    }
    for reduction in (None, "mean", "sum", "none"):
        loss = iql_loss(kind, nets, reduction=reduction, scalar_output_mode="exclude")
        reduce = {"sum": torch.sum, "none": torch.clone}.get(reduction, torch.mean)
        expected = {
            key: reduce(per_transition[key]) for key in ("loss_actor", "loss_qvalue", "loss_value")
        }
        out = loss(td.clone())
        if reduction == "none":
            assert set(out.keys()) == set(expected) and out.batch_size == batch
        else:
            expected |= scalars
            assert set(out.keys()) == set(expected) and out.batch_size == ()
        assert_entries(out, expected, rtol=1e-5, atol=1e-5)
        losses = loss(**as_kwargs(td, loss.in_keys))
        assert_entries(dict(zip(loss.out_keys, losses, strict=True)), out.select(*loss.out_keys))
        assert set(loss.out_keys) == {"loss_actor", "loss_qvalue", "loss_value"} | (
            set() if reduction == "none" else {"entropy"}
        )


def test_scalars_beside_unreduced_losses(kind):
    """Without reduction the scalars are excluded, with a warning unless asked for, or non-tensor data."""
    nets, td = networks(kind), transitions(kind)
    with pytest.warns(UserWarning, match="scalar_output_mode='exclude'"):
        excluded = iql_loss(kind, nets, reduction="none")
    assert set(excluded(td.clone()).keys()) == {"loss_actor", "loss_qvalue", "loss_value"}
    kept = iql_loss(kind, nets, reduction="none", scalar_output_mode="non_tensor")
    expected = mean_by_hand(nets, td)
    out = kept(td.clone())
    for key in ("entropy", "advantage", "value", "qvalue", "clip_fraction"):
        assert_close(out[key], expected[key])
    assert_close(kept(**as_kwargs(td, kept.in_keys))[-1], expected["entropy"])
    theirs = torchrl_loss(kind, nets, reduction="none", scalar_output_mode="exclude")
    with pytest.raises(KeyError, match="entropy"):
        theirs(**as_kwargs(td, iql_loss(kind, nets).in_keys))


@pytest.mark.parametrize("key", ["loss_actor", "loss_qvalue", "loss_value", "entropy"])
def test_select_out_keys(kind, key):
    """A selected output is the only one, from a batch and from kwargs."""
    loss, td = iql_loss(kind), transitions(kind)
    expected = loss(td.clone())[key]
    loss.select_out_keys(key)
    out = loss(td.clone())
    assert list(out.keys()) == [key] and torch.equal(out[key], expected)
    assert torch.equal(loss(**as_kwargs(td, loss.in_keys)), expected)
    loss.reset_out_keys()
    assert len(loss(**as_kwargs(td, loss.in_keys))) == 4


# --- Shared parameters ------------------------------------------------------------------------------


def networks_with_a_trunk(num: int, as_list: bool, policy_too: bool) -> tuple[nn.Linear, dict]:
    """V and Q on the same trunk, and the policy too if asked."""
    trunk = nn.Linear(OBS, 4)
    shared = TensorDictModule(trunk, in_keys=["observation"], out_keys=["hidden"])

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, ACT)

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(hidden), torch.ones(*hidden.shape[:-1], ACT)

    def q() -> TensorDictSequential:
        return TensorDictSequential(
            shared, ValueOperator(Concatenate(4, ACT), in_keys=["hidden", "action"])
        )

    policy = TensorDictSequential(
        shared if policy_too else TensorDictModule(nn.Linear(OBS, 4), ["observation"], ["hidden"]),
        TensorDictModule(Head(), in_keys=["hidden"], out_keys=["loc", "scale"]),
    )
    return trunk, {
        "actor_network": ProbabilisticActor(
            policy, in_keys=["loc", "scale"], distribution_class=IndependentNormal
        ),
        "qvalue_network": [q() for _ in range(num)] if as_list else q(),
        "value_network": TensorDictSequential(
            shared, ValueOperator(nn.Linear(4, 1), in_keys=["hidden"])
        ),
        "num_qvalue_nets": num,
    }


@pytest.mark.parametrize("num, as_list", [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("policy_too", [False, True])
def test_separate_losses(num, as_list, policy_too):
    """Shared parameters are trained by one loss only: the policy's, if it has them, or the value's."""
    trunk, nets = networks_with_a_trunk(num, as_list, policy_too)
    td = transitions()
    trained_by = "loss_actor" if policy_too else "loss_value"
    loss = iql_loss(nets=nets, separate_losses=True)
    for key in ("loss_actor", "loss_qvalue", "loss_value"):
        loss.zero_grad()
        trunk.zero_grad()
        loss(td.clone())[key].backward()
        reached = trunk.weight.grad is not None and bool(trunk.weight.grad.any())
        assert reached == (key == trained_by), key
        network = {"loss_actor": "actor", "loss_qvalue": "qvalue", "loss_value": "value"}[key]
        for name, parameter in loss.named_parameters():
            own = name.startswith(f"{network}_network_params")
            if own or parameter is trunk.weight or parameter is trunk.bias:
                continue
            assert parameter.grad is None or not parameter.grad.any(), (key, name)


@pytest.mark.parametrize("as_list", [False, True])
def test_shared_parameters_are_trained_by_every_loss(as_list):
    """By default the gradients of all losses add up, and the losses are those of separate ones."""
    trunk, nets = networks_with_a_trunk(1, as_list, policy_too=True)
    td = transitions()
    loss = iql_loss(nets=nets)
    contributions = []
    for key in ("loss_actor", "loss_qvalue", "loss_value"):
        trunk.zero_grad()
        loss(td.clone())[key].backward()
        contributions.append(trunk.weight.grad.clone())
        assert contributions[-1].any(), key
    trunk.zero_grad()
    total(loss(td.clone())).backward()
    assert_close(trunk.weight.grad, sum(contributions))
    separate = iql_loss(nets=nets, separate_losses=True)
    assert_entries(separate(td.clone()), loss(td.clone()))


# --- Value estimators -------------------------------------------------------------------------------


def returns(td: TensorDict, next_v: Tensor, gamma: float, lmbda: float) -> Tensor:
    """TD(lambda) backwards in time; what follows the end of a trajectory is another one."""
    reward, done, terminated = (
        td["next", key].squeeze(-1) for key in ("reward", "done", "terminated")
    )
    result = torch.empty_like(reward)
    after = next_v[:, -1]
    for t in reversed(range(reward.shape[1])):
        bootstrap = torch.where(
            done[:, t], next_v[:, t], (1 - lmbda) * next_v[:, t] + lmbda * after
        )
        result[:, t] = reward[:, t] + gamma * torch.where(terminated[:, t], 0.0, bootstrap)
        after = result[:, t]
    return result


@pytest.mark.parametrize("as_name", [False, True])
@pytest.mark.parametrize(
    "estimator, lmbda",
    [(ValueEstimators.TD0, 0.0), (ValueEstimators.TD1, 1.0), (ValueEstimators.TDLambda, 0.8)],
)
def test_value_estimators(kind, estimator, lmbda, as_name):
    """TD(0), TD(1) and TD(lambda), by member or name; ``make_value_estimator`` returns the loss."""
    gamma = 0.9
    nets, td = networks(kind), transitions(kind, (4, 5))
    next_v = nets["value_network"](td["next"].copy())["state_value"].squeeze(-1).detach()
    target = returns(td, next_v, gamma, lmbda)
    settings = {"gamma": gamma} | ({"lmbda": lmbda} if 0 < lmbda < 1 else {})
    loss = iql_loss(kind, nets)
    assert (
        loss.make_value_estimator(estimator.name.lower() if as_name else estimator, **settings)
        is loss
    )
    assert loss.value_type == estimator
    assert_entries(loss(td), mean_by_hand(nets, td, target=target), rtol=1e-5, atol=1e-5)


def test_torchrl_make_value_estimator_returns_nothing():
    """TorchRL documents that the loss is returned, for chaining."""
    assert torchrl_loss("continuous", networks()).make_value_estimator(gamma=0.9) is None


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("instance", [False, True])
def test_a_value_estimator_of_ones_own(kind, instance, renamed):
    """An estimator class or instance is used, with its own discount and with the keys of the loss."""
    nets, td = networks(kind), transitions(kind)
    expected = mean_by_hand(nets, td, discount=0.5)
    loss = iql_loss(kind, nets)
    if renamed:
        loss.set_keys(reward=("new", "r"))
        td.rename_key_(("next", "reward"), ("next", "new", "r"))
    settings = {"gamma": 0.5, "value_network": None}
    if instance:
        assert loss.make_value_estimator(TD0Estimator(**settings)) is loss
    else:
        assert loss.make_value_estimator(TD0Estimator, **settings) is loss
    assert_entries(loss(td), expected)


@pytest.mark.parametrize("estimator", ["GAE", "MAGAE", "VTrace"])
def test_value_estimators_that_need_the_policy_are_refused(kind, estimator):
    """The message names the estimator, the loss and what it supports."""
    loss = iql_loss(kind)
    with pytest.raises(NotImplementedError, match=f"{type(loss).__name__}.*TD0.*TD1.*TDLambda"):
        loss.make_value_estimator(ValueEstimators[estimator])


# --- State ------------------------------------------------------------------------------------------


def test_pickling(kind):
    """A pickled loss, used or not, computes the same; TorchRL's cannot be pickled."""
    nets, td = networks(kind), transitions(kind)
    loss = iql_loss(kind, nets)
    fresh = pickle.loads(pickle.dumps(loss))
    perturb(fresh.parameters())
    expected = loss(td.clone())
    assert_entries(pickle.loads(pickle.dumps(loss))(td.clone()), expected, rtol=0, atol=0)
    trained = fresh(td.clone())
    assert not torch.equal(trained["loss_actor"], expected["loss_actor"])
    assert_entries(pickle.loads(pickle.dumps(fresh))(td.clone()), trained, rtol=0, atol=0)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(torchrl_loss(kind, nets))


@pytest.mark.parametrize("used", [False, True])
def test_deepcopy(kind, used):
    """A copy computes the same and trains alone."""
    loss, td = iql_loss(kind), transitions(kind)
    if used:
        loss(td.clone())
    twin = copy.deepcopy(loss)
    expected = loss(td.clone())
    assert_entries(twin(td.clone()), expected, rtol=0, atol=0)
    perturb(twin.parameters())
    assert_entries(loss(td.clone()), expected, rtol=0, atol=0)
    for key in ("loss_actor", "loss_qvalue", "loss_value"):
        assert not torch.equal(twin(td.clone())[key], expected[key])


def test_the_state_dict_is_the_same_before_and_after_use(kind):
    """A used loss loads into a fresh one; TorchRL's has grown an entry, which a fresh one refuses."""
    nets, td = networks(kind), transitions(kind)
    ours, theirs = iql_loss(kind, nets), torchrl_loss(kind, nets)
    for loss, grows in ((ours, False), (theirs, True)):
        before = set(loss.state_dict())
        loss(td.clone())
        assert (set(loss.state_dict()) != before) == grows
    perturb(ours.parameters())
    fresh = iql_loss(kind)
    fresh.load_state_dict(ours.state_dict())
    assert_entries(fresh(td.clone()), ours(td.clone()), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"_value_estimator\.gamma"):
        torchrl_loss(kind, networks(kind)).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("num", [1, 2])
def test_state_dicts_move_between_torchrls_loss_and_ours(kind, num, used):
    """Names and shapes are TorchRL's, so checkpoints load both ways and give the same losses."""
    td = transitions(kind)
    theirs, ours = torchrl_loss(kind, networks(kind, num)), iql_loss(kind, networks(kind, num))
    if used:
        theirs(td.clone())
        ours(td.clone())
    perturb(p for loss in (theirs, ours) for p in loss.buffers() if p.ndim)  # targets of their own
    expected = theirs(td.clone())
    ours.load_state_dict(theirs.state_dict() if used else fresh_state(theirs))
    assert_entries(ours(td.clone()), expected)

    ours, theirs = iql_loss(kind, networks(kind, num)), torchrl_loss(kind, networks(kind, num))
    perturb(p for p in ours.buffers() if p.ndim)
    if used:
        theirs(td.clone())
        theirs.load_state_dict(ours.state_dict())
    else:  # without an estimator yet, as in TorchRL's own case above
        keys = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert keys == ([], ["_value_estimator.gamma"])
    out = ours(td.clone())
    assert_entries(out, theirs(td.clone()))


def fresh_state(loss: nn.Module) -> dict[str, Tensor]:
    """The state of a loss that has not made its value estimator yet."""
    return {k: v for k, v in loss.state_dict().items() if not k.startswith("_value_estimator")}


def test_state_dicts_of_one_q_network_with_a_leading_dimension(kind):
    """Before 0.14.1 TorchRL wrote a leading dimension of 1."""
    loss, td = iql_loss(kind, networks(kind, num=1)), transitions(kind)
    old = {
        key: value.unsqueeze(0) if "qvalue_network_params" in key else value
        for key, value in loss.state_dict().items()
    }
    fresh = iql_loss(kind, networks(kind, num=1))
    fresh.load_state_dict(old)
    assert_entries(fresh(td.clone()), loss(td.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("num", [1, 2])
def test_target_updates(kind, num):
    """SoftUpdate moves the target by tau, HardUpdate copies after its interval."""
    loss = iql_loss(kind, networks(kind, num))
    target, online = (
        getattr(loss, name) for name in ("target_qvalue_network_params", "qvalue_network_params")
    )
    soft = SoftUpdate(loss, tau=0.25)
    perturb(loss.parameters())
    before = target.data.clone()
    soft.step()
    for key, value in target.items(True, True):
        assert_close(value, 0.75 * before[key] + 0.25 * online[key].detach())
    hard = HardUpdate(loss, value_network_update_interval=2)
    perturb(loss.parameters())
    before = target.data.clone()
    for equal_to in (before, before, online):
        hard.step()
        for key, value in target.items(True, True):
            assert torch.equal(value, equal_to[key])


def critics_with_dropout(single: bool) -> nn.Module | list[nn.Module]:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.torso = nn.Sequential(nn.Linear(OBS + ACT, 64), nn.Dropout(0.5), nn.Linear(64, 1))

        def forward(self, observation: Tensor, action: Tensor) -> Tensor:
            return self.torso(torch.cat([observation, action], -1))

    made = [ValueOperator(Critic(), in_keys=["observation", "action"]) for _ in range(2)]
    return made[0] if single else made


def test_eval_reaches_the_dropout_of_the_policy(kind):
    """``train()`` and ``eval()`` set the networks' mode; in TorchRL dropout stays on."""
    nets, td = networks(kind, dropout=0.5), transitions(kind)
    ours, theirs = iql_loss(kind, nets), torchrl_loss(kind, nets)

    def varies(loss: nn.Module) -> bool:
        first, second = (loss(td.clone())["loss_actor"] for _ in range(2))
        return not torch.equal(first, second)

    assert varies(theirs.eval())
    assert varies(ours)
    assert not varies(ours.eval())
    assert_close(ours(td.clone())["loss_actor"], by_hand(nets, td)["loss_actor"].mean())
    assert varies(ours.train())


@pytest.mark.parametrize("deactivate_vmap", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_eval_reaches_the_dropout_of_the_critics(single, deactivate_vmap):
    """Under vmap each critic drops its own units; in evaluation mode none does."""
    nets, td = networks() | {"qvalue_network": critics_with_dropout(single)}, transitions()
    loss = iql_loss(nets=nets, deactivate_vmap=deactivate_vmap)
    first, second = loss(td.clone()), loss(td.clone())
    for key in ("loss_actor", "loss_qvalue", "loss_value"):
        assert not torch.equal(first[key], second[key])
    if not single:
        # Equal critics differ only by the units that they drop.
        equal = copy.deepcopy(loss)
        equal.qvalue_network_params.data.apply_(lambda p: p.copy_(p[:1].expand_as(p)))
        _, info = equal.qvalue_loss(td)
        assert not torch.isclose(*info["td_error"]).all()
    loss.eval()
    first, second = loss(td.clone()), loss(td.clone())
    assert_entries(first, second, rtol=0, atol=0)
    if not single:
        for network in nets["qvalue_network"]:
            network.eval()
        assert_entries(first, mean_by_hand(nets, td))


@pytest.mark.parametrize("batch", [(), (BATCH,), (4, 5)], ids=str)
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("kind", ["continuous", "categorical"])
def test_stacked_vmapped_and_looped_critics_agree(kind, num, batch):
    """However the Q networks are evaluated, the losses, the priority and the gradients are the same."""
    nets, td = networks(kind, num), transitions(kind, batch)
    stacked = iql_loss(kind, nets)
    expected = stacked(td)
    expected_gradients = list(gradients(stacked, td).values())
    nets["qvalue_network"] = own_critics(nets["qvalue_network"])
    for deactivate_vmap in (False, True):
        loss, other = iql_loss(kind, nets, deactivate_vmap=deactivate_vmap), td.exclude("td_error")
        assert_entries(loss(other), expected)
        assert_close(other["td_error"], td["td_error"])
        for found, gradient in zip(gradients(loss, td).values(), expected_gradients, strict=True):
            assert_close(found, gradient)


def test_expectile_and_temperature_can_be_scheduled(kind):
    """Assigning them acts on the next call; they are no part of the state dict, whose keys are TorchRL's."""
    nets, td = networks(kind), transitions(kind)
    loss = iql_loss(kind, nets)
    buffers = loss.expectile, loss.temperature
    loss.expectile, loss.temperature = 0.9, 1
    assert loss.expectile is buffers[0] and loss.temperature is buffers[1]
    expected = iql_loss(kind, nets, expectile=0.9, temperature=1.0)(td.clone())
    assert_entries(loss(td.clone()), expected, rtol=0, atol=0)
    assert set(loss.state_dict()) == set(iql_loss(kind).state_dict())
    assert not {"expectile", "temperature"} & set(loss.state_dict())


def test_a_loss_has_no_device(kind):
    """TorchRL's rule: nothing may rely on the device of a loss."""
    with pytest.raises(RuntimeError, match="no device"):
        _ = iql_loss(kind).device


# --- Compilation and precision ----------------------------------------------------------------------


@pytest.mark.slow
def test_compile(kind):
    """One graph with the losses and gradients of eager mode, kept when the coefficients change."""
    nets, td = networks(kind), transitions(kind)
    loss = iql_loss(kind, nets)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    gradients(iql_loss(kind, nets), td)  # tensordict fills its caches, which are guarded
    gradients(loss, td)
    for _ in range(2):
        compiled(td.clone())
    with torch.compiler.set_stance("fail_on_recompile"):
        for expectile, temperature in ((EXPECTILE, TEMPERATURE), (0.9, 1.0), (0.5, 10.0)):
            loss.expectile, loss.temperature = expectile, temperature
            batch = td.clone()
            out = compiled(batch)
            loss.zero_grad()
            total(out).backward()
            found = {name: p.grad.clone() for name, p in loss.named_parameters()}
            eager = iql_loss(kind, nets, expectile=expectile, temperature=temperature)
            eager.load_state_dict(loss.state_dict())
            reference = td.clone()
            assert_entries(out, eager(reference))
            assert_close(batch["td_error"], reference["td_error"])
            assert_entries(found, gradients(eager, td), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["autocast", "networks in bfloat16", "loss in bfloat16"])
def test_bfloat16(kind, how):
    """The losses are float32 and close to those of float32 networks, and so is the priority."""
    nets, td = networks(kind), transitions(kind, (256,))
    reference = td.clone()
    expected = iql_loss(kind, nets, temperature=1.0)(reference)
    context, batch = nullcontext(), cast(td, torch.bfloat16)
    nets = copy.deepcopy(nets)
    if how == "autocast":
        context, batch = torch.autocast("cpu", dtype=torch.bfloat16), td
    elif how == "networks in bfloat16":
        for network in (nets["actor_network"], *nets["qvalue_network"], nets["value_network"]):
            network.bfloat16()
    loss = iql_loss(kind, nets, temperature=1.0)
    if how == "loss in bfloat16":
        loss.bfloat16()
    with context:
        out = loss(batch)
    assert {value.dtype for value in out.values()} == {torch.float32}
    assert_entries(out, expected, rtol=0.02, atol=0.02)
    assert batch["td_error"].dtype == torch.float32
    assert_close(batch["td_error"], reference["td_error"], rtol=0.1, atol=0.1)
    total(out).backward()
    assert all(torch.isfinite(p.grad).all() for p in loss.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_are_not_rounded_with_the_networks(kind, dtype):
    """In bfloat16 a discount of 0.999 would be 1."""
    loss = iql_loss(kind).make_value_estimator(gamma=0.999).to(dtype)
    assert float(loss.value_estimator.gamma) == pytest.approx(0.999, rel=1e-6)
    assert float(loss.expectile) == pytest.approx(EXPECTILE, rel=1e-6)


def test_float64(kind):
    """float64 networks give float64 losses, to its precision: the coefficients are float64 too."""
    nets, td = networks(kind), cast(transitions(kind), torch.float64)
    for network in (nets["actor_network"], *nets["qvalue_network"], nets["value_network"]):
        network.double()
    out = iql_loss(kind, nets)(td.clone())
    assert {value.dtype for value in out.values()} == {torch.float64}
    assert_entries(out, mean_by_hand(nets, td), rtol=1e-12, atol=1e-12, check_dtype=False)


def test_a_float64_reward_does_not_widen_the_losses(kind):
    """NumPy's rewards are float64; TorchRL's loss_qvalue would be too."""
    nets, td = networks(kind), transitions(kind)
    expected = iql_loss(kind, nets)(td.clone())
    td["next", "reward"] = td["next", "reward"].double()
    assert_entries(iql_loss(kind, nets)(td.clone()), expected)
    assert torchrl_loss(kind, nets)(td.clone())["loss_qvalue"].dtype == torch.float64


# --- Arguments and errors ---------------------------------------------------------------------------


def test_temperature_0_is_behaviour_cloning(kind):
    """All weights are exactly 1."""
    nets, td = networks(kind), transitions(kind)
    loss = iql_loss(kind, nets, temperature=0.0)
    out = loss(td.clone())
    cloning = -nets["actor_network"].get_dist(td.copy()).log_prob(td["action"]).mean()
    assert_close(out["loss_actor"], cloning, rtol=0, atol=0)
    parameters = list(nets["actor_network"].parameters())
    for found, expected in zip(
        torch.autograd.grad(out["loss_actor"], parameters),
        torch.autograd.grad(cloning, parameters),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_expectile_1_counts_only_values_that_are_too_low(kind):
    """tau = 1 is accepted: the loss of a value above Q vanishes."""
    nets, td = networks(kind), transitions(kind)
    advantage = by_hand(nets, td)["advantage"]
    loss = iql_loss(kind, nets, expectile=1.0)
    assert_close(loss(td)["loss_value"], advantage.clamp(min=0).square().mean())


@pytest.mark.parametrize("clip", [0.5, 2.0, math.inf])
def test_weight_clip(kind, clip):
    """No advantage weight exceeds it, and ``clip_fraction`` is the share that reach it."""
    nets, td = networks(kind), transitions(kind)
    expected = by_hand(nets, td)
    weight = torch.exp(TEMPERATURE * expected["advantage"])
    out = iql_loss(kind, nets, weight_clip=clip)(td)
    assert_close(out["loss_actor"], (weight.clamp(max=clip) * expected["entropy"]).mean())
    assert out["clip_fraction"] == (weight >= clip).float().mean()


@pytest.mark.parametrize(
    "distance, torch_loss", [("l2", F.mse_loss), ("l1", F.l1_loss), ("smooth_l1", F.smooth_l1_loss)]
)
def test_loss_function(kind, distance, torch_loss):
    """The distance of Q to its target; the priority stays the squared one."""
    nets, td = networks(kind), transitions(kind)
    _, info = iql_loss(kind, nets).qvalue_loss(td)
    error = info["td_error"].sqrt()
    loss, other = iql_loss(kind, nets, loss_function=distance).qvalue_loss(td)
    assert_close(loss, sum(torch_loss(e, torch.zeros_like(e)) for e in error))
    assert torch.equal(other["td_error"], info["td_error"])


@pytest.mark.parametrize(
    "name, value",
    [
        *(("expectile", value) for value in (0.0, -0.2, 1.5, math.nan)),
        *(("temperature", value) for value in (-1.0, math.inf, math.nan)),
        *(("weight_clip", value) for value in (0.0, -1.0, math.nan)),
        ("num_qvalue_nets", 0),
        ("loss_function", "huber"),
        ("reduction", "average"),
        ("scalar_output_mode", "tensor"),
        ("gamma", 0.9),
        ("priority_key", "td"),
        ("actor_network", None),
        ("qvalue_network", None),
        ("value_network", None),
    ],
)
def test_bad_arguments(kind, name, value):
    """Refused at construction, by name and value."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        iql_loss(kind, networks(kind) | {name: value})
    assert name in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("gamma", [-0.1, 1.5, math.nan])
def test_bad_discount(kind, gamma):
    """A discount lies between 0 and 1; TorchRL takes any."""
    with pytest.raises(ValueError, match=f"gamma must be in .*got {gamma}"):
        iql_loss(kind).make_value_estimator(gamma=gamma)
    torchrl_loss(kind, networks(kind)).make_value_estimator(gamma=gamma)


@pytest.mark.parametrize("given, num", [(0, 2), (2, 3), (3, 2), (2, 1)])
def test_the_list_of_q_networks_has_the_wrong_length(kind, given, num):
    """The message says how many were given and how many were asked for."""
    nets = networks(kind, given) | {"num_qvalue_nets": num}
    with pytest.raises(ValueError, match=f"{given} networks.*num_qvalue_nets={num}"):
        iql_loss(kind, nets)


@pytest.mark.parametrize(
    "action_space, name",
    [("binary", "binary"), ("mult-one-hot", "mult-one-hot"), ("onehot?", "onehot?")]
    + [(Binary(CHOICES), "Binary"), (MultiOneHot((2, 2)), "MultiOneHot")],
    ids=str,
)
def test_bad_action_space(action_space, name):
    """Only integers and one-hot vectors are actions; TorchRL accepts others and fails later."""
    nets = networks("categorical")
    with pytest.raises(ValueError, match="action_space") as error:
        DiscreteIQLLoss(**nets, action_space=action_space)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "action_space, expected",
    [
        ("one-hot", "one_hot"),
        ("one_hot", "one_hot"),
        (OneHot(CHOICES), "one_hot"),
        ("categorical", "categorical"),
        (Categorical(CHOICES), "categorical"),
    ],
    ids=str,
)
def test_action_space(action_space, expected):
    """By name or by spec."""
    loss = DiscreteIQLLoss(**networks("one-hot"), action_space=action_space)
    assert loss.action_space == expected


def test_action_space_missing():
    """None warns, and means one-hot as in TorchRL."""
    with pytest.warns(UserWarning, match="action_space was not given"):
        loss = DiscreteIQLLoss(**networks("one-hot"))
    assert loss.action_space == "one_hot"


@pytest.mark.parametrize(
    "key",
    ["observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done")],
    ids=str,
)
def test_a_missing_entry_is_named(kind, key):
    """The message also lists what the batch holds."""
    loss, td = iql_loss(kind), transitions(kind).exclude(key)
    with pytest.raises(KeyError) as error:
        loss(td)
    assert repr(key) in error.value.args[0].split(", and the batch holds")[0]


@pytest.mark.parametrize("key", ["reward", "done", "terminated"])
def test_entries_without_a_last_dimension(kind, key):
    """``[B]`` would broadcast to ``[B, B]`` against V(s') ``[B, 1]``."""
    loss, td = iql_loss(kind), transitions(kind)
    td["next", key] = td["next", key].squeeze(-1)
    with pytest.raises(ValueError) as error:
        loss(td)
    for part in (repr(("next", key)), f"({BATCH},)", f"({BATCH}, 1)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "kind, key",
    [(kind, key) for kind in KINDS for key in ("observation", ("next", "observation"))]
    + [("continuous", "action")],
    ids=str,
)
def test_float64_data_in_float32_networks(kind, key):
    """The message names the entry, its dtype and the remedy."""
    loss, td = iql_loss(kind), transitions(kind)
    td[key] = td[key].double()
    with pytest.raises(RuntimeError) as error:
        loss(td)
    name = key if isinstance(key, str) else key[-1]
    for part in (f"{name!r}: torch.float64", "cast the data"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "network, expected",
    [("qvalue_network", "state_action_value"), ("value_network", "state_value")],
)
def test_a_network_writes_another_key(kind, network, expected):
    """The message names what is written and what is read."""
    nets = networks(kind)
    for module in [nets[network]] if network == "value_network" else nets[network]:
        module.out_keys = ["other"]
    with pytest.raises(KeyError) as error:
        iql_loss(kind, nets)(transitions(kind))
    assert "'other'" in str(error.value) and repr(expected) in str(error.value)


@pytest.mark.parametrize("batch", [(BATCH,), (1,), (BATCH, 1)], ids=str)
@pytest.mark.parametrize("method", ["forward", "actor_loss", "value_loss", "qvalue_loss"])
def test_q_without_a_last_dimension(method, batch):
    """``[*B]`` instead of ``[*B, 1]`` is refused even where the last batch dimension is 1."""

    class Flat(Concatenate):
        def forward(self, *inputs: Tensor) -> Tensor:
            return super().forward(*inputs).squeeze(-1)

    nets = networks() | {
        "qvalue_network": [
            TensorDictModule(Flat(OBS, ACT), ["observation", "action"], ["state_action_value"])
            for _ in range(2)
        ]
    }
    with pytest.raises(ValueError, match=r"state_action_value|Q\(s, a\)|V\(s\)"):
        getattr(iql_loss(nets=nets), method)(transitions(batch=batch))


def test_a_distribution_without_independent():
    """A log-likelihood per action dimension is refused, with its shape."""
    nets = networks()
    nets["actor_network"] = ProbabilisticActor(
        nets["actor_network"][0], in_keys=["loc", "scale"], distribution_class=Normal
    )
    with pytest.raises(ValueError) as error:
        iql_loss(nets=nets)(transitions())
    for part in ("log-probability", f"({BATCH}, {ACT})", f"({BATCH},)"):
        assert part in str(error.value)


@pytest.mark.parametrize("method", ["forward", "actor_loss", "value_loss", "qvalue_loss"])
@pytest.mark.parametrize(
    "kind, shape",
    [
        ("categorical", (BATCH, 2)),
        ("categorical", (BATCH, 1, 1)),
        ("one-hot", (BATCH,)),
        ("one-hot", (BATCH, CHOICES + 1)),
        ("one-hot", (BATCH, 1)),
    ],
    ids=str,
)
def test_discrete_actions_of_the_wrong_shape(kind, shape, method):
    """The message names the entry, its shape and the expected one."""
    loss, td = iql_loss(kind), transitions(kind)
    td["action"] = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError) as error:
        getattr(loss, method)(td)
    expected = (BATCH, CHOICES) if kind == "one-hot" else (BATCH, 1)
    for part in ("'action'", str(shape), str(expected)):
        assert part in str(error.value)


def test_deterministic_actions_of_the_wrong_shape():
    """Here too: the policy's action and the data's must have the same shape."""
    nets = networks() | {"actor_network": Actor(nn.Linear(OBS, ACT + 1))}
    with pytest.raises(ValueError) as error:
        iql_loss(nets=nets)(transitions())
    for part in ("action", f"({BATCH}, {ACT + 1})", f"({BATCH}, {ACT})"):
        assert part in str(error.value)


# --- TorchRL's trainer and replay buffers -----------------------------------------------------------


def test_trainer():
    """TorchRL's Trainer, collector, replay buffer and target updater train the networks."""
    env = GymEnv("Pendulum-v1")
    env.set_seed(0)
    observation, action = env.observation_spec["observation"], env.action_spec
    value = models.value_network(observation, hidden_sizes=HIDDEN)
    nn.init.constant_(list(value.parameters())[-1], 5.0)  # there is something to unlearn
    loss = IQLLoss(
        models.gaussian_policy(observation, action, hidden_sizes=HIDDEN),
        models.qvalue_ensemble(observation, action, hidden_sizes=HIDDEN),
        value,
        temperature=0.0,  # a constant weight: the likelihood itself grows
    )
    updater = SoftUpdate(loss, tau=0.05)
    behaviour = models.deterministic_policy(observation, action, hidden_sizes=HIDDEN)
    trainer = Trainer(
        collector=Collector(
            env,
            behaviour,
            frames_per_batch=100,
            total_frames=400,
            auto_register_policy_transforms=False,
        ),
        total_frames=400,
        frame_skip=1,
        optim_steps_per_batch=25,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=3e-3),
        optimization_stepper=DefaultOptimizationStepper(),
        progress_bar=False,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(400), batch_size=64)
    replay = ReplayBufferTrainer(buffer)
    trainer.register_op("batch_process", replay.extend)
    trainer.register_op("process_optim_batch", replay.sample)
    trainer.register_op("post_optim", TargetNetUpdaterHook(updater))
    initial = copy.deepcopy(loss)
    trainer.train()

    data = buffer[:]
    assert len(data) == 400
    before, after = initial(data.clone()), loss(data.clone())
    for key in ("loss_actor", "loss_qvalue", "loss_value"):
        assert after[key] < 0.8 * before[key], key
    q, target = loss.qvalue_network_params, loss.target_qvalue_network_params
    assert any((target[k] != initial.qvalue_network_params[k]).any() for k in q.keys(True, True))
    assert any((target[k] != q[k]).any() for k in q.keys(True, True))


@pytest.mark.skipif(
    torchrl_extension is None, reason="TorchRL's extension is built for another torch"
)
def test_prioritized_replay():
    """The buffer's weights enter the losses, and the priority of the losses enters the buffer."""
    alpha, epsilon = 0.7, 1e-8
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=alpha, beta=0.5, eps=epsilon, storage=LazyTensorStorage(32), batch_size=BATCH
    )
    buffer.extend(transitions(batch=(32,)))
    nets = networks()
    loss = iql_loss(nets=nets)
    for _ in range(2):
        sample = buffer.sample()
        expected = by_hand(nets, sample)
        weight = sample["priority_weight"].flatten()
        out = loss(sample)
        for key in ("loss_actor", "loss_qvalue", "loss_value"):
            assert_close(out[key], (weight * expected[key]).sum() / weight.sum())
        buffer.update_tensordict_priority(sample)
        for index, error in zip(
            sample["index"].flatten().tolist(), expected["td_error"], strict=True
        ):
            priority = float(buffer.sampler._sum_tree[index])
            assert priority == pytest.approx(float((error + epsilon) ** alpha), rel=1e-5)
    assert weight.unique().numel() > 1


# --- The equations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "u, expectile, expected",
    [(2.0, 0.7, 2.8), (-2.0, 0.7, 1.2), (0.0, 0.7, 0.0), (3.0, 0.5, 4.5), (-3.0, 1.0, 0.0)],
)
def test_expectile_loss(u, expectile, expected):
    """|tau - 1(u < 0)| u^2."""
    assert_close(iql.expectile_loss(torch.tensor(u), expectile), torch.tensor(expected))


def test_value_loss():
    """The expectile loss of the smallest target Q minus V; Q receives no gradient."""
    q = torch.tensor([[1.0, 5.0], [3.0, 4.0]], requires_grad=True)
    v = torch.tensor([3.0, 2.0], requires_grad=True)
    loss = iql.value_loss(q, v, 0.9)
    assert_close(loss, torch.tensor([0.1 * 4, 0.9 * 4]))
    loss.sum().backward()
    assert q.grad is None
    assert_close(v.grad, torch.tensor([-2 * 0.1 * -2.0, -2 * 0.9 * 2.0]))


def test_td_target():
    """r + gamma V(s'), without V(s') at a terminal, be it NaN, and without its gradient."""
    next_v = torch.tensor([2.0, math.nan, 4.0], requires_grad=True)
    target = iql.td_target(
        torch.tensor([1.0, 1.0, 1.0]),
        next_v,
        torch.tensor([False, True, False]),
        torch.tensor([0.5, 0.5, 0.25]),
    )
    assert_close(target, torch.tensor([2.0, 1.0, 2.0]))
    assert not target.requires_grad


@pytest.mark.parametrize("distance, expected", [("l2", 9.25), ("l1", 3.5), ("smooth_l1", 2.625)])
def test_qvalue_loss(distance, expected):
    """The distances of all Q networks to the target, summed."""
    q = torch.tensor([[4.0], [0.5]], requires_grad=True)
    target = torch.tensor([1.0], requires_grad=True)
    loss = iql.qvalue_loss(q, target, distance)
    assert_close(loss, torch.tensor([expected]))
    loss.sum().backward()
    assert target.grad is None and q.grad.ne(0).all()


def test_advantage_weight_and_actor_loss():
    """min(exp(beta A), clip) weighs the log-likelihood and receives no gradient."""
    advantage = torch.tensor([0.0, math.log(2.0), 50.0, 500.0, -500.0], requires_grad=True)
    weight = iql.advantage_weight(advantage, 2.0, 100.0)
    assert_close(weight, torch.tensor([1.0, 4.0, 100.0, 100.0, 0.0]))
    log_prob = torch.full((5,), -2.0, requires_grad=True)
    loss = iql.actor_loss(log_prob, weight)
    assert_close(loss, torch.tensor([2.0, 8.0, 200.0, 200.0, 0.0]))
    loss.sum().backward()
    assert advantage.grad is None
    assert_close(log_prob.grad, -weight.detach())


def test_unknown_distance():
    """The message lists the distances."""
    with pytest.raises(ValueError, match=r"\('l2', 'l1', 'smooth_l1'\), got 'huber'"):
        iql.qvalue_loss(torch.zeros(2, 1), torch.zeros(1), "huber")


def test_independent_learners_in_one_call():
    """Under ``torch.vmap`` each learner gets its own losses and gradients, with its own coefficients."""
    seeds, num = 5, 2
    q, target_q = torch.randn(2, seeds, num, BATCH)
    v, next_v, reward, log_prob = torch.randn(4, seeds, BATCH)
    terminated = torch.rand(seeds, BATCH) < 0.3
    expectile, temperature = torch.rand(2, seeds)

    def losses(q, target_q, v, next_v, reward, log_prob, terminated, expectile, temperature):
        target = iql.td_target(reward, next_v, terminated, GAMMA)
        weight = iql.advantage_weight(iql.min_q(target_q) - v, temperature, 2.0)
        return (
            iql.qvalue_loss(q, target, "smooth_l1").mean()
            + iql.value_loss(target_q, v, expectile).mean()
            + iql.actor_loss(log_prob, weight).mean()
        )

    inputs = (q, target_q, v, next_v, reward, log_prob, terminated, expectile, temperature)
    each = torch.func.grad_and_value(losses, argnums=(0, 1, 2, 3, 5))
    batched = torch.vmap(each)(*inputs)
    for seed in range(seeds):
        alone = each(*(x[seed] for x in inputs))
        assert_close(batched[1][seed], alone[1])
        for found, expected in zip(batched[0], alone[0], strict=True):
            assert_close(found[seed], expected)
