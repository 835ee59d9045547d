"""The networks: what they compute, checked against NumPy, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.testing import assert_close
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_losses import built
from torchrl_iql import models

OBS, ACT, CHOICES, BATCH, HIDDEN = 3, 2, 4, 32, (16, 8)
LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 5.0])
MIDDLE, HALF_RANGE = ((HIGH + LOW) / 2).numpy(), ((HIGH - LOW) / 2).numpy()

CONTINUOUS_POLICIES = {
    "gaussian": models.gaussian_policy,
    "squashed": models.squashed_policy,
    "deterministic": models.deterministic_policy,
}
POLICIES = CONTINUOUS_POLICIES | {"categorical": models.categorical_policy}
CRITICS = {
    "value": lambda observation, action, **kwargs: models.value_network(observation, **kwargs),
    "qvalue": models.qvalue_network,
    "discrete qvalue": models.discrete_qvalue_network,
}
NETWORKS = POLICIES | CRITICS
DISCRETE = ("categorical", "discrete qvalue")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- Builders ---------------------------------------------------------------------------------------


def bounded(*batch: int) -> Bounded:
    return Bounded(low=LOW.expand(*batch, ACT), high=HIGH.expand(*batch, ACT))


def network(name: str, from_specs: bool = True, **kwargs) -> nn.Module:
    """Make a small network from TorchRL specs (actions with asymmetric bounds), or from sizes."""
    discrete = name in DISCRETE
    observation = Unbounded((OBS,)) if from_specs else OBS
    if from_specs:
        action = OneHot(CHOICES) if discrete else bounded()
    else:
        action = CHOICES if discrete else ACT
    return NETWORKS[name](observation, action, **{"hidden_sizes": HIDDEN, **kwargs})


def randomize(module: nn.Module) -> nn.Module:
    """Replace the zeros of the initialisation."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def batch(size: int = BATCH, scale: float = 1.0) -> TensorDict:
    action = LOW + (HIGH - LOW) * torch.rand(size, ACT)
    return TensorDict(
        {"observation": scale * torch.randn(size, OBS), "action": action}, batch_size=size
    )


def mlp(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """Compute the ReLU network of the module's linear layers, in NumPy."""
    *hidden, last = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in linear_layers(module)
    ]
    for weight, bias in hidden:
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ last[0].T + last[1]


def log_std(policy: nn.Module) -> nn.Parameter:
    (parameter,) = (p for name, p in policy.named_parameters() if name.endswith("log_std"))
    return parameter


# --- Initialisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("from_specs", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_initialisation(name, from_specs):
    """Every weight matrix is orthogonal times sqrt 2, every bias 0, the log standard deviation 0."""
    module = network(name, from_specs)
    sizes = [layer.weight.shape for layer in linear_layers(module)]
    inputs = OBS + (ACT if name == "qvalue" else 0)
    outputs = CHOICES if name in DISCRETE else ACT if name in POLICIES else 1
    assert sizes == [(HIDDEN[0], inputs), (HIDDEN[1], HIDDEN[0]), (outputs, HIDDEN[1])]
    for layer in linear_layers(module):
        singular_values = torch.linalg.svdvals(layer.weight.detach())
        assert_close(singular_values, torch.full_like(singular_values, math.sqrt(2)))
        assert not layer.bias.any()
    if name in ("gaussian", "squashed"):
        assert torch.equal(log_std(module).detach(), torch.zeros(ACT))
    trained = {id(p) for layer in linear_layers(module) for p in layer.parameters()}
    others = [p for p in module.parameters() if id(p) not in trained]
    assert len(others) == (name in ("gaussian", "squashed"))


def test_default_sizes():
    """Two hidden layers of 256 units, as in the paper."""
    sizes = [layer.weight.shape for layer in linear_layers(models.gaussian_policy(OBS, ACT))]
    assert sizes == [(256, OBS), (256, 256), (ACT, 256)]


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_ensemble_is_a_list_of_independent_networks(num):
    """No two of them share or repeat a weight."""
    ensemble = models.qvalue_ensemble(OBS, bounded(), num=num, hidden_sizes=HIDDEN)
    weights = [linear_layers(q)[0].weight for q in ensemble]
    assert len(ensemble) == num
    for i, first in enumerate(weights):
        for second in weights[:i]:
            assert not torch.isclose(first, second).any()


# --- What the networks compute ----------------------------------------------------------------------


@pytest.mark.parametrize("from_specs", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs(name, from_specs):
    """Means and actions are tanh into the bounds, deviations in units of their half range, values linear."""
    module, td = randomize(network(name, from_specs)), batch()
    middle, half_range = (MIDDLE, HALF_RANGE) if from_specs else (np.zeros(ACT), np.ones(ACT))
    x = td["observation"].numpy()
    if name == "qvalue":  # actions enter in units of their bounds
        x = np.concatenate([x, (td["action"].numpy() - middle) / half_range], axis=-1)
    raw = mlp(module, x)
    out = module(td.clone())
    squashed = middle + half_range * np.tanh(raw) if name in CONTINUOUS_POLICIES else None
    expected = {
        "gaussian": {"loc": squashed, "action": squashed},
        "squashed": {"loc": raw, "action": squashed},
        "deterministic": {"action": squashed},
        "categorical": {"logits": raw},
        "value": {"state_value": raw},
        "qvalue": {"state_action_value": raw},
        "discrete qvalue": {"state_action_value": raw},
    }[name]
    if name in ("gaussian", "squashed"):
        scale = np.exp(log_std(module).detach().numpy())
        scale = scale * (half_range if name == "gaussian" else 1.0)
        expected["scale"] = np.broadcast_to(scale, (BATCH, ACT))
    for key, value in expected.items():
        np.testing.assert_allclose(out[key].detach().numpy(), value, rtol=1e-5, atol=1e-5)
    if name == "categorical":
        chosen = out["action"].argmax(-1) if from_specs else out["action"]
        np.testing.assert_array_equal(chosen.numpy(), raw.argmax(-1))


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_dimensions(name):
    """Any number of leading dimensions, none included, and specs with leading dimensions."""
    observation = Unbounded((5, OBS))
    action = OneHot(CHOICES) if name in DISCRETE else bounded(5)
    module = randomize(NETWORKS[name](observation, action, hidden_sizes=HIDDEN))
    td = batch(20)
    flat = module(td.clone())
    key = "action" if name in POLICIES else module.out_keys[0]
    assert_close(module(td.reshape(4, 5).clone())[key].reshape(flat[key].shape), flat[key])
    assert_close(module(td[0].clone())[key], flat[key][0])


@pytest.mark.parametrize("name", CONTINUOUS_POLICIES)
def test_deterministic_actions_lie_inside_the_bounds(name):
    """However large the observation, and up to the bounds themselves."""
    policy, td = randomize(network(name)), batch(500, scale=100.0)
    action = policy(td.clone())["action"]
    assert (action >= LOW - 1e-6).all() and (action <= HIGH + 1e-6).all()
    last = linear_layers(policy)[-1]
    nn.init.zeros_(last.weight)
    for bias, bound in ((50.0, HIGH), (-50.0, LOW)):
        nn.init.constant_(last.bias, bias)
        assert_close(policy(td.clone())["action"], bound.expand(500, ACT))


@pytest.mark.parametrize("name", ["gaussian", "squashed"])
def test_the_log_standard_deviation_is_clipped(name):
    """To [-5, 2], also where the parameter has gone beyond."""
    policy, td = network(name, from_specs=False), batch()
    for parameter, clipped in ((10.0, 2.0), (1.5, 1.5), (-4.0, -4.0), (-10.0, -5.0)):
        nn.init.constant_(log_std(policy), parameter)
        scale = policy(td.clone())["scale"].detach()
        assert_close(scale, torch.full((BATCH, ACT), math.exp(clipped)))


@pytest.mark.parametrize("name", ["gaussian", "squashed"])
def test_sampling(name):
    """Deterministic evaluation returns the (squashed) mean; samples have the policy's deviation."""
    policy, td = randomize(network(name)), batch(1).expand(20_000)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        out = policy(td.clone())
        loc, scale, evaluated = out["loc"][0], out["scale"][0], out["action"][0]
    to_action = (
        (lambda x: x)
        if name == "gaussian"
        else lambda x: torch.tensor(MIDDLE) + torch.tensor(HALF_RANGE) * x.tanh()
    )
    assert_close(evaluated, to_action(loc))
    with set_exploration_type(ExplorationType.RANDOM):
        samples = policy(td.clone())["action"]
    expected = to_action(loc + scale * torch.randn(20_000, ACT))
    assert_close(samples.mean(0), expected.mean(0), rtol=0.05, atol=0.05)
    assert_close(samples.std(0), expected.std(0), rtol=0.05, atol=0.05)
    outside = (samples < LOW) | (samples > HIGH)
    assert outside.any() == (name == "gaussian")


def test_log_likelihood_of_the_gaussian_policy():
    """The closed formula of independent Gaussians, inside the bounds and beyond."""
    policy, td = randomize(network("gaussian")), batch()
    mean = MIDDLE + HALF_RANGE * np.tanh(mlp(policy, td["observation"].numpy()))
    std = HALF_RANGE * np.exp(log_std(policy).detach().numpy())
    action = td["action"].numpy() * 1.5
    z = (action - mean) / std
    expected = (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(-1)
    found = policy.get_dist(td.clone()).log_prob(torch.tensor(action))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_log_likelihood_of_the_squashed_policy():
    """The Gaussian before the tanh, and the logarithm of its slope."""
    policy, td = randomize(network("squashed")), batch()
    mean = mlp(policy, td["observation"].numpy().astype(np.float64))
    std = np.exp(log_std(policy).detach().numpy())
    unit = (td["action"].numpy().astype(np.float64) - MIDDLE) / HALF_RANGE
    z = (np.arctanh(unit) - mean) / std
    slope = HALF_RANGE * (1 - unit**2)
    expected = (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi) - np.log(slope)).sum(-1)
    found = policy.get_dist(td.clone()).log_prob(td["action"])
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "action", [CHOICES, Categorical(CHOICES), OneHot(CHOICES)], ids=["int", "Categorical", "OneHot"]
)
def test_log_likelihood_of_the_categorical_policy(action):
    """The log-softmax of the logits, for integers or one-hot vectors."""
    policy = randomize(models.categorical_policy(OBS, action, hidden_sizes=HIDDEN))
    td = batch()
    logits = mlp(policy, td["observation"].numpy())
    chosen = np.arange(BATCH) % CHOICES
    expected = logits[np.arange(BATCH), chosen] - np.log(np.exp(logits).sum(-1))
    actions = torch.tensor(chosen)
    if isinstance(action, OneHot):
        actions = nn.functional.one_hot(actions, CHOICES)
    found = policy.get_dist(td.clone()).log_prob(actions)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert policy(td.clone())["action"].shape == actions.shape


@pytest.mark.parametrize("name", POLICIES)
def test_dropout(name):
    """Each hidden layer drops its units in training mode; in evaluation mode nothing is dropped."""
    policy, td = randomize(network(name, dropout=0.3)), batch()
    assert [m.p for m in policy.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]
    key = {"gaussian": "loc", "squashed": "loc", "deterministic": "action"}.get(name, "logits")
    without = network(name)
    for layer, other in zip(linear_layers(without), linear_layers(policy), strict=True):
        layer.load_state_dict(other.state_dict())
    expected = without(td.clone())[key]
    first, second = (policy.train()(td.clone())[key] for _ in range(2))
    assert not torch.isclose(first, second).all()
    assert_close(policy.eval()(td.clone())[key], expected)
    assert not any(isinstance(m, nn.Dropout) for m in without.modules())


# --- Observation statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("from_specs", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_observation_statistics(name, from_specs):
    """The network normalises the observation itself, by statistics that belong to its state."""
    mean, std = torch.randn(OBS), torch.rand(OBS) + 0.5
    plain = randomize(network(name, from_specs))
    normalizing = network(name, from_specs, observation_statistics=(mean, std))
    missing, unexpected = normalizing.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 2 and not unexpected
    td, parameters = batch(), len(list(plain.parameters()))
    normalized = td.clone().set("observation", (td["observation"] - mean) / std)
    for key, value in plain(normalized.clone()).exclude("observation").items():
        assert_close(normalizing(td.clone())[key], value)

    assert len(list(normalizing.parameters())) == parameters
    stored = {key.rsplit(".", 1)[-1]: normalizing.state_dict()[key] for key in missing}
    assert stored.keys() == {"mean", "std"}
    assert torch.equal(stored["mean"], mean) and torch.equal(stored["std"], std)
    mean.zero_(), std.fill_(7.0)  # the network holds a copy
    for key, value in plain(normalized.clone()).exclude("observation").items():
        assert_close(normalizing(td.clone())[key], value)
    other = network(name, from_specs, observation_statistics=(mean, std))
    other.load_state_dict(normalizing.state_dict())
    for key, value in plain(normalized.clone()).exclude("observation").items():
        assert_close(other(td.clone())[key], value)


# --- Stacked parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (4, 5)], ids=str)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("name", CRITICS)
def test_stacked_parameters(name, statistics, shape):
    """With the parameters of N networks in front, one call gives the outputs of all: ``[N, *B, out]``."""
    num = 3
    kwargs = {"observation_statistics": (torch.randn(OBS), torch.full((OBS,), 2.0))}
    critics = [randomize(network(name, **(kwargs if statistics else {}))) for _ in range(num)]
    td = batch(math.prod(shape)).reshape(shape) if shape else batch(1)[0]
    inputs = [td[key] for key in critics[0].in_keys]
    expected = torch.stack([critic.module(*inputs) for critic in critics])
    assert expected.shape[:-1] == (num, *shape)
    module = critics[0].module
    assert module.takes_stacked_parameters
    with TensorDict.from_modules(*(critic.module for critic in critics)).to_module(module):
        assert_close(module(*inputs), expected)
    assert_close(module(*inputs), expected[0])


# --- Architecture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize_observation", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_architecture(policy, normalize_observation):
    """An architecture that has been through JSON builds networks that load the state of the first."""
    discrete = policy == "categorical"
    architecture = models.Architecture(
        observation_size=OBS,
        action_size=CHOICES if discrete else ACT,
        action_bounds=None if discrete else (LOW.tolist(), HIGH.tolist()),
        policy=policy,
        hidden_sizes=HIDDEN,
        dropout=0.1,
        normalize_observation=normalize_observation,
    )
    statistics = (torch.randn(OBS), torch.rand(OBS) + 0.5)
    again = models.Architecture(**json.loads(json.dumps(dataclasses.asdict(architecture))))
    assert again.discrete == discrete
    actor, critics, value = map(flatten, built(architecture, statistics, 3))
    rebuilt = list(map(flatten, built(again, num=3)))
    assert len(critics) == 3
    td = batch()
    for first, second in zip((actor, critics, value), rebuilt, strict=True):
        for module, copy in zip(first, second, strict=True):
            randomize(module)
            copy.load_state_dict(module.state_dict())
            expected, found = module.eval()(td.clone()), copy.eval()(td.clone())
            for key in module.out_keys:
                assert_close(found[key], expected[key])
    x = (td["observation"] - statistics[0]) / statistics[1]
    x = x if normalize_observation else td["observation"]
    found = value[0](td.clone())["state_value"].detach()
    np.testing.assert_allclose(found.numpy(), mlp(value[0], x.numpy()), rtol=1e-5, atol=1e-5)


def flatten(networks: nn.Module | list[nn.Module]) -> list[nn.Module]:
    return networks if isinstance(networks, list) else [networks]


def test_bad_architecture():
    """The message lists the policies."""
    with pytest.raises(ValueError, match=r"policy must be one of .*'gaussian'.*got 'gauss'"):
        models.Architecture(observation_size=OBS, action_size=ACT, policy="gauss")


# --- Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTINUOUS_POLICIES, "qvalue"])
@pytest.mark.parametrize(
    "action, message",
    [
        (Unbounded((ACT,)), "Bounded"),
        (OneHot(CHOICES), "OneHot"),
        (Categorical(CHOICES), "Categorical"),
        (Bounded(low=LOW, high=torch.tensor([1.0, math.inf])), "inf"),
        (Bounded(low=LOW, high=LOW), "-2"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else x,
)
def test_continuous_actions_need_finite_bounds(name, action, message):
    """The message shows what was given."""
    with pytest.raises(ValueError, match="action") as error:
        NETWORKS[name](OBS, action)
    assert message in str(error.value)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize(
    "action",
    [bounded(), Unbounded((ACT,)), MultiOneHot((2, 3)), MultiCategorical((2, 3)), Binary(3)],
    ids=lambda x: type(x).__name__,
)
def test_discrete_actions_need_a_number_of_choices(name, action):
    """There is one choice per transition: the message shows what was given instead."""
    with pytest.raises(ValueError, match="action") as error:
        NETWORKS[name](OBS, action)
    assert type(action).__name__ in str(error.value)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_bad_dropout(name, dropout):
    """A probability below 1."""
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {dropout}"):
        network(name, dropout=dropout)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "mean, std, parts",
    [
        (torch.zeros(OBS + 1), torch.ones(OBS + 1), [f"({OBS + 1},)", f"({OBS},)"]),
        (torch.zeros(1), torch.ones(1), ["(1,)", f"({OBS},)"]),
        (torch.zeros(OBS), torch.ones(1), [f"({OBS},)", "(1,)"]),
        (torch.zeros(OBS), torch.tensor([1.0, 0.0, 1.0]), ["positive"]),
        (torch.zeros(OBS), torch.tensor([1.0, -1.0, 1.0]), ["positive"]),
        (torch.zeros(OBS), torch.tensor([1.0, math.nan, 1.0]), ["positive"]),
    ],
    ids=["too long", "too short", "different", "zero", "negative", "NaN"],
)
def test_bad_statistics(name, mean: Tensor, std: Tensor, parts: list[str]):
    """One mean and one positive deviation per dimension of the observation."""
    with pytest.raises(ValueError, match="observation_statistics") as error:
        network(name, observation_statistics=(mean, std))
    for part in parts:
        assert part in str(error.value)


def test_statistics_in_float64_serve_float32_networks():
    """As NumPy gives them."""
    statistics = (
        torch.ones(OBS, dtype=torch.float64),
        torch.full((OBS,), 2.0, dtype=torch.float64),
    )
    value = models.value_network(OBS, observation_statistics=statistics)
    plain = models.value_network(OBS)
    plain.load_state_dict(value.state_dict(), strict=False)
    observation = torch.randn(4, OBS)
    assert torch.equal(value(observation=observation), plain(observation=(observation - 1) / 2))
