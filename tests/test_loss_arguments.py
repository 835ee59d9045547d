"""Arguments and errors of the losses, TorchRL's trainer and buffers, and the equations.

Where TorchRL's own loss breaks a promise, the test runs it too, on the same networks and batch: it
documents the difference, and fails once TorchRL has closed it.
"""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from tensordict.nn import (
    TensorDictModule,
)
from torch import Tensor, nn
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
from torchrl.envs import GymEnv
from torchrl.modules import (
    Actor,
    ProbabilisticActor,
    TanhNormal,
)
from torchrl.objectives import SoftUpdate
from torchrl.trainers import (
    DefaultOptimizationStepper,
    ReplayBufferTrainer,
    TargetNetUpdaterHook,
    Trainer,
)

from iql_losses import (
    ACT,
    BATCH,
    CHOICES,
    GAMMA,
    HIDDEN,
    KINDS,
    OBS,
    TEMPERATURE,
    Concatenate,
    assert_entries,
    by_hand,
    iql_loss,
    networks,
    own_critics,
    torchrl_extension,
    torchrl_loss,
    transitions,
)
from torchrl_iql import AWACLoss, DiscreteIQLLoss, IQLLoss, models
from torchrl_iql.objectives import functional as iql

pytestmark = pytest.mark.usefixtures("seed")


def awac_loss(nets: dict) -> AWACLoss:
    return AWACLoss(nets["actor_network"], nets["qvalue_network"])


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
    """Check that tau = 1 is accepted: the loss of a value above Q vanishes."""
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
        *(("expectile", value) for value in (0.0, -0.2, 1.5, math.nan, "0.7", [0.5])),
        *(("temperature", value) for value in (-1.0, math.inf, math.nan, "3", None)),
        *(("weight_clip", value) for value in (0.0, -1.0, math.nan, "100")),
        *(("num_qvalue_nets", value) for value in (0, "2", 2.0)),
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


@pytest.mark.parametrize("name", ["gamma", "lmbda"])
@pytest.mark.parametrize("value", ["0.9", [0.9], 1.5])
def test_what_discounts_is_a_number(name, value):
    """Text of a configuration file, for example."""
    with pytest.raises(
        ValueError, match=rf"{name} must be in \[0, 1\], got {re.escape(repr(value))}"
    ):
        iql_loss().make_value_estimator("tdlambda", **{name: value})


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
@pytest.mark.parametrize("estimator", ["td0", "td1", "tdlambda"])
def test_a_missing_entry_is_named(kind, key, estimator):
    """The message also lists what the batch holds."""
    loss = iql_loss(kind).make_value_estimator(estimator)
    td = transitions(kind, (4, 5)).exclude(key)
    if key == ("next", "done") and estimator == "td0":
        td = td.exclude(("next", "terminated"))  # either would do
    with pytest.raises(KeyError) as error:
        loss(td)
    assert repr(key) in error.value.args[0].split(", and the batch holds")[0]


def test_one_step_needs_one_of_done_and_terminated(kind):
    """As TorchRL's; where there are both, done is not read."""
    nets, td = networks(kind), transitions(kind)
    td["next", "done"] = td["next", "terminated"]
    loss, expected = iql_loss(kind, nets), torchrl_loss(kind, nets)(td.clone())
    for key in ("done", "terminated"):
        assert_entries(loss(td.exclude(("next", key))), expected)
    td["next", "done"] = td["next", "done"].float()
    assert_entries(loss(td), expected)


@pytest.mark.parametrize("key", ["reward", "done", "terminated"])
def test_entries_without_a_last_dimension(kind, key):
    """``[B]`` would broadcast to ``[B, B]`` against V(s') ``[B, 1]``."""
    loss, td = iql_loss(kind).make_value_estimator("td1"), transitions(kind)
    td["next", key] = td["next", key].squeeze(-1)
    with pytest.raises(ValueError) as error:
        loss(td)
    for part in (repr(("next", key)), f"({BATCH},)", f"({BATCH}, 1)", ".unsqueeze(-1)"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("key", ["done", "terminated"])
def test_flags_that_are_numbers(kind, key, dtype):
    """``~`` of an integer is no negation: TorchRL computes with -1 and -2."""
    loss, td = iql_loss(kind).make_value_estimator("td1"), transitions(kind)
    td["next", key] = td["next", key].to(dtype)
    with pytest.raises(ValueError) as error:
        loss(td)
    for part in (repr(("next", key)), str(dtype), ".bool()"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.bool], ids=str)
def test_types_of_categorical_actions(dtype):
    """Any integers are; what is none is refused with the remedy."""
    loss, td = iql_loss("categorical"), transitions("categorical")
    expected = loss(td.clone())
    td["action"] = td["action"].to(dtype)
    if dtype in (torch.int32, torch.uint8):
        assert_entries(loss(td), expected)
        return
    with pytest.raises(ValueError) as error:
        loss(td)
    for part in ("'action'", str(dtype), ".long()"):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", ["categorical", "one-hot"])
def test_an_empty_batch(kind):
    """It has no mean, but that is no error."""
    assert iql_loss(kind)(transitions(kind, (0,)))["loss_value"].isnan()


@pytest.mark.parametrize(
    "kind, key",
    [(kind, key) for kind in KINDS for key in ("observation", ("next", "observation"))]
    + [("continuous", "action")],
    ids=str,
)
def test_float64_data_in_float32_networks(kind, key):
    """As environments give them: the networks of this package compute in their own type."""
    loss, td = iql_loss(kind), transitions(kind)
    expected = loss(td.clone())
    td[key] = td[key].double()
    got = loss(td)
    for name, value in expected.items():
        assert_close(got[name], value, msg=name, check_dtype=False)


@pytest.mark.parametrize("key", ["observation", ("next", "observation")], ids=str)
def test_float64_data_in_float32_networks_of_ones_own(key):
    """The message names the entry, its dtype and the remedy."""
    own = TensorDictModule(nn.Linear(OBS, 1), ["observation"], ["state_value"])
    loss, td = iql_loss(nets=networks() | {"value_network": own}), transitions()
    td[key] = td[key].double()
    with pytest.raises(RuntimeError) as error:
        loss(td)
    for part in (
        f"value_network was given {key!r}: ({BATCH}, {OBS}) of torch.float64",
        "Cast the data",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("make", [iql_loss, awac_loss, lambda nets: iql_loss("categorical", nets)])
@pytest.mark.parametrize("key", ["observation", "action", ("next", "observation")], ids=str)
def test_entries_of_another_width(key, make, own):
    """A note names the network, and the entries that it read with their shapes."""
    discrete = make not in (iql_loss, awac_loss)
    if discrete and key == "action":
        pytest.skip("test_discrete_actions_of_the_wrong_shape")
    nets = networks("categorical" if discrete else "continuous")
    if own:
        nets["qvalue_network"] = own_critics(nets["qvalue_network"])
    td = transitions("categorical" if discrete else "continuous")
    td[key] = torch.cat([td[key], td[key][..., :1]], -1)
    with pytest.raises(RuntimeError) as error:
        make(nets=nets)(td)
    note = error.value.__notes__[-1]
    assert f"{key!r}: {tuple(td[key].shape)} of torch.float32" in note
    assert re.match(r"(actor|qvalue|value)_network was given |the policy's \w+ was given ", note)


@pytest.mark.parametrize("make", [iql_loss, awac_loss])
def test_integer_actions_of_a_squashed_policy(make):
    """Which has no density at them: the entry is named, with its type and the one that is expected."""
    policy = models.gaussian_policy(OBS, ACT, hidden_sizes=HIDDEN)
    nets = networks() | {
        "actor_network": ProbabilisticActor(
            policy[0], in_keys=["loc", "scale"], distribution_class=TanhNormal
        )
    }
    td = transitions()
    make(nets=nets)(td.clone())
    td["action"] = td["action"].round().long()
    with pytest.raises(ValueError) as error:
        make(nets=nets)(td)
    for part in ("TanhNormal", "'action'", "torch.int64", "expected floating point", ".float()"):
        assert part in str(error.value)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("value", [CHOICES, -1])
@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)], ids=str)
def test_categories_out_of_range(shape, value, own):
    """The message names the entry, the value and the range."""
    nets, td = networks("categorical"), transitions("categorical")
    if own:
        nets["qvalue_network"] = own_critics(nets["qvalue_network"])
    td["action"][3] = value
    td["action"] = td["action"].reshape(shape)
    message = f"'action' holds {value}, expected integers from 0 to {CHOICES - 1}"
    with pytest.raises(ValueError, match=message):
        iql_loss("categorical", nets)(td)


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
    for part in ("log-probability", f"({BATCH}, {ACT})", f"({BATCH},)", "Independent"):
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
    assert ('action_space="categorical"' in str(error.value)) == (kind == "one-hot")


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
    """Check r + gamma V(s'), without V(s') at a terminal, be it NaN, and without its gradient."""
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
