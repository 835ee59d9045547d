"""Policies, outputs, shared parameters, value estimators, state and precision of the losses.

Where TorchRL's own loss breaks a promise, the test runs it too, on the same networks and batch: it
documents the difference, and fails once TorchRL has closed it.
"""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    TensorDictModule,
    TensorDictSequential,
    set_composite_lp_aggregate,
)
from tensordict.nn.distributions import Delta as TensorDictDelta
from torch import Tensor, nn
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Normal
from torch.testing import assert_close
from torchrl.data import (
    OneHot,
)
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

from iql_losses import (
    ACT,
    BATCH,
    CHOICES,
    CLIP,
    EXPECTILE,
    HIDDEN,
    OBS,
    TEMPERATURE,
    Concatenate,
    as_kwargs,
    assert_entries,
    by_hand,
    cast,
    gradients,
    iql_loss,
    mean_by_hand,
    networks,
    own_critics,
    perturb,
    torchrl_loss,
    total,
    transitions,
)
from torchrl_iql import TrainStep, models

pytestmark = pytest.mark.usefixtures("seed")


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
    """Make V and Q on the same trunk, and the policy too if asked."""
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


def trunk_of(loss: nn.Module, network: str) -> Tensor:
    """Return the trunk's weight as a network of a loss holds it."""
    params = getattr(loss, f"{network}_network_params")
    (found,) = (x for key, x in params.items(True, True) if key[-3:] == ("0", "module", "weight"))
    return found


SHARED = [
    pytest.param(as_list, separate, id=f"{'list' if as_list else 'module'}-{separate}")
    for as_list, separate in [(True, True), (True, False), (False, True)]
]


@pytest.mark.parametrize("as_list, separate", SHARED)
@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss,
        copy.deepcopy,
        lambda loss: copy.deepcopy(loss).double().float(),
        lambda loss: loss.load_state_dict(copy.deepcopy(loss.state_dict())) and loss,
    ],
)
def test_shared_parameters_stay_shared(as_list, separate, change):
    """What V learns of a trunk the Q networks have, after whatever happens to the loss."""
    _, nets = networks_with_a_trunk(2, as_list, policy_too=False)
    loss = change(iql_loss(nets=nets, separate_losses=separate))
    with torch.no_grad():
        trunk_of(loss, "value").add_(1.0)
    assert torch.equal(trunk_of(loss, "qvalue"), trunk_of(loss, "value").expand(2, -1, -1))
    twin = iql_loss(nets=networks_with_a_trunk(2, as_list, False)[1], separate_losses=separate)
    twin.load_state_dict(loss.state_dict())
    td = transitions()
    assert_entries(twin(td.clone()), loss(td.clone()))
    loss(td.clone())["loss_qvalue"].backward()
    assert (trunk_of(loss, "value").grad is None) == separate


@pytest.mark.parametrize("as_list, separate", SHARED)
def test_targets_follow_shared_parameters(as_list, separate):
    """The trunk of the target Q networks is a moving average of the one that is trained."""
    _, nets = networks_with_a_trunk(2, as_list, policy_too=False)
    loss = iql_loss(nets=nets, separate_losses=separate)
    step = TrainStep(loss, learning_rate=1e-2, target_rate=0.5)
    expected = trunk_of(loss, "target_qvalue").clone()
    for _ in range(5):
        step(transitions())
        expected = expected.lerp(trunk_of(loss, "value").detach().expand(2, -1, -1), 0.5)
    assert_close(trunk_of(loss, "target_qvalue"), expected)
    state = step.state_dict()
    again = iql_loss(nets=networks_with_a_trunk(2, as_list, False)[1], separate_losses=separate)
    resumed = TrainStep(again, learning_rate=1e-2, target_rate=0.5)
    resumed.load_state_dict(state)
    for _ in range(2):
        td = transitions()
        assert_entries(resumed(td.clone()), step(td.clone()), rtol=0, atol=0)


def test_a_trunk_that_no_loss_would_train_is_refused():
    """A list of Q networks with a common part, which TorchRL's loss takes and leaves as it is."""
    _, nets = networks_with_a_trunk(2, as_list=True, policy_too=False)
    nets["value_network"] = ValueOperator(nn.Linear(OBS, 1), in_keys=["observation"])
    with pytest.raises(
        ValueError, match=r"networks with the same module.0.module.weight, which no"
    ):
        iql_loss(nets=nets)


def test_a_distribution_that_a_policy_does_not_tell_is_refused():
    """A sequence of modules that has one, and no ``get_dist``, is no deterministic policy."""
    nets = networks()
    nets["actor_network"] = TensorDictSequential(
        TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["observation"]),
        nets["actor_network"],
    )
    with pytest.raises(TypeError, match="put its modules in a ProbabilisticTensorDictSequential"):
        iql_loss(nets=nets)


# --- Value estimators -------------------------------------------------------------------------------


def returns(td: TensorDict, next_v: Tensor, gamma: float, lmbda: float) -> Tensor:
    """Compute TD(lambda) backwards in time; what follows a trajectory's end is another one."""
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
    """Return the state of a loss that has not made its value estimator yet."""
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
