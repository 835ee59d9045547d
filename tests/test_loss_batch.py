"""What the losses read of a batch and write into it, with which networks.

Where TorchRL's own loss breaks a promise, the test runs it too, on the same networks and batch: it
documents the difference, and fails once TorchRL has closed it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    TensorDictModule,
)
from torch import Tensor, nn
from torch.testing import assert_close
from torchrl.data.postprocs import MultiStep
from torchrl.modules import (
    IndependentNormal,
    ProbabilisticActor,
    ValueOperator,
)
from torchrl.objectives import ValueEstimators

from iql_losses import (
    ACT,
    BATCH,
    GAMMA,
    OBS,
    Concatenate,
    as_kwargs,
    assert_entries,
    by_hand,
    gradients,
    iql_loss,
    mean_by_hand,
    networks,
    perturb,
    renamed,
    torchrl_loss,
    transitions,
)

pytestmark = pytest.mark.usefixtures("seed")


# --- Each network once ------------------------------------------------------------------------------


def evaluations(loss, td: TensorDict, method: str = "forward") -> Counter:
    """Count how often each network runs; vmap runs a whole ensemble in one call."""
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
    """Return the batch with a mask, and garbage where it is False."""
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
    """Return the N copies of one parameter of the given Q network."""
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
    nets, td = renamed(kind, nets, td, keys)
    loss = iql_loss(kind, nets).make_value_estimator(estimator)
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
