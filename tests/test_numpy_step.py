"""One gradient step, recomputed without autograd: every number of it, to 1e-8.

``NumpyIQL`` is the paper in float64 NumPy with gradients derived by hand. It shares nothing with the
package but the initial parameters. The losses are also held against :mod:`torchrl.objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torchrl import objectives
from torchrl.data import Categorical, OneHot

from torchrl_iql import DiscreteIQLLoss, IQLLoss, models
from torchrl_iql.training import TrainStep, cosine_decay

Array = NDArray[np.float64]
Arrays = list[Array]

OBSERVATION, ACTION, BATCH = 4, 3, 24
HIDDEN_SIZES = (7, 6)
EXPECTILE, TEMPERATURE, WEIGHT_CLIP = 0.8, 3.0, 2.0
GAMMA = 0.96875  # exact in float32, the dtype in which TorchRL keeps it
LEARNING_RATE, TARGET_RATE, DECAY_STEPS = 3e-3, 0.05, 3
STEPS = DECAY_STEPS + 1  # the last step finds the policy's learning rate at 0
LOG_STD = [-5.2, -0.4, 2.1]  # below, within and above the bounds
RTOL = 1e-8

# What a step leaves behind: one list of arrays for each of the four networks.
NETWORKS = ("actor", "value", "qvalue", "target_qvalue")


class Transitions(NamedTuple):
    observation: Array  # [B, D]
    action: Array  # [B, A]
    reward: Array  # [B]
    next_observation: Array  # [B, D]
    terminated: NDArray[np.bool_]  # [B]
    truncated: NDArray[np.bool_]  # [B]


# --- The reference ------------------------------------------------------------------------------------


def mlp(x: Array, parameters: Arrays) -> tuple[Array, Arrays]:
    """Compute a ReLU MLP of parameters W, b, W, b, ...: its output, and the input of each layer."""
    inputs = []
    for layer in range(0, len(parameters), 2):
        inputs.append(x if layer == 0 else np.maximum(x, 0.0))
        x = inputs[-1] @ parameters[layer].T + parameters[layer + 1]
    return x, inputs


def mlp_gradients(output_gradient: Array, parameters: Arrays, inputs: Arrays) -> Arrays:
    """Turn dL / d output ``[B, O]`` into dL / d parameters, by the chain rule from the last layer."""
    gradients: Arrays = []
    delta = output_gradient
    for layer in reversed(range(len(inputs))):
        gradients = [delta.T @ inputs[layer], delta.sum(axis=0), *gradients]
        delta = (delta @ parameters[2 * layer]) * (inputs[layer] > 0)
    return gradients


class NumpyIQL:
    """Losses, gradients, Adam and target networks of Implicit Q-Learning, in float64.

    ``parameters[network]`` is a list of arrays; those of the two Q ensembles are stacked ``[2, ...]``,
    and the policy's begin with its log standard deviation.
    """

    def __init__(self, parameters: dict[str, Arrays], mean: Array, std: Array) -> None:
        self.parameters = parameters
        self.mean, self.std = mean, std
        trained = [name for name in NETWORKS if name != "target_qvalue"]
        self.gradients: dict[str, Arrays] = {}
        self.first_moment = {k: [np.zeros_like(p) for p in parameters[k]] for k in trained}
        self.second_moment = {k: [np.zeros_like(p) for p in parameters[k]] for k in trained}
        self.steps = 0

    def normalize(self, observation: Array) -> Array:
        return (observation - self.mean) / self.std

    def q(self, network: str, index: int, batch: Transitions) -> tuple[Array, Arrays, Arrays]:
        """Compute Q_index(s, a) ``[B]``, its parameters and the inputs of its layers."""
        own = [p[index] for p in self.parameters[network]]
        output, inputs = mlp(
            np.concatenate([self.normalize(batch.observation), batch.action], axis=1), own
        )
        return output[:, 0], own, inputs

    def step(self, batch: Transitions) -> dict[str, float]:
        """Take one gradient step and return the losses and diagnostics before it."""
        n = len(batch.reward)
        heads = [self.q("target_qvalue", i, batch)[0] for i in range(2)]
        target_q = np.minimum(*heads)
        v, v_inputs = mlp(self.normalize(batch.observation), self.parameters["value"])
        next_v = mlp(self.normalize(batch.next_observation), self.parameters["value"])[0][:, 0]
        u = target_q - v[:, 0]

        # V: d/dv |tau - 1(u < 0)| u^2 = -2 |tau - 1(u < 0)| u
        asymmetry = np.where(u < 0, 1 - EXPECTILE, EXPECTILE)
        loss_value = np.mean(asymmetry * u**2)
        value_gradient = mlp_gradients(
            (-2 * asymmetry * u / n)[:, None], self.parameters["value"], v_inputs
        )

        # Q: the target is a constant, and each network has its own squared error
        target = batch.reward + GAMMA * np.where(batch.terminated, 0.0, next_v)
        loss_qvalue, q_gradients, errors = 0.0, [], []
        for i in range(2):
            q, own, inputs = self.q("qvalue", i, batch)
            errors.append(q - target)
            loss_qvalue += np.mean(errors[i] ** 2)
            q_gradients.append(mlp_gradients((2 * errors[i] / n)[:, None], own, inputs))

        # pi: log N(a; tanh(f(s)), e^clip(rho)), weighted by a constant
        rho, *torso = self.parameters["actor"]
        f, f_inputs = mlp(self.normalize(batch.observation), torso)
        mean, std = np.tanh(f), np.exp(np.clip(rho, -5, 2))
        z = (batch.action - mean) / std
        log_prob = np.sum(-0.5 * z**2 - np.log(std) - 0.5 * math.log(2 * math.pi), axis=1)
        weight = np.minimum(np.exp(TEMPERATURE * u), WEIGHT_CLIP)
        loss_actor = -np.mean(weight * log_prob)
        inside = (rho > -5) & (rho < 2)
        rho_gradient = -np.mean(weight[:, None] * (z**2 - 1), axis=0) * inside
        f_gradient = -weight[:, None] * z / std * (1 - mean**2) / n

        self.gradients = {
            "actor": [rho_gradient, *mlp_gradients(f_gradient, torso, f_inputs)],
            "value": value_gradient,
            "qvalue": [np.stack(pair) for pair in zip(*q_gradients, strict=True)],
        }
        self.u, self.heads = u, heads
        self.td_error = np.maximum(errors[0] ** 2, errors[1] ** 2)
        self.adam()
        self.parameters["target_qvalue"] = [
            (1 - TARGET_RATE) * slow + TARGET_RATE * fast
            for slow, fast in zip(
                self.parameters["target_qvalue"], self.parameters["qvalue"], strict=True
            )
        ]
        return {
            "loss_actor": loss_actor,
            "loss_qvalue": loss_qvalue,
            "loss_value": loss_value,
            "entropy": -np.mean(log_prob),
            "advantage": np.mean(u),
            "clip_fraction": np.mean(weight == WEIGHT_CLIP),
        }

    def learning_rate(self, network: str) -> float:
        if network != "actor":
            return LEARNING_RATE
        done = min(self.steps / DECAY_STEPS, 1.0)
        return LEARNING_RATE * (1 + math.cos(math.pi * done)) / 2

    def adam(self) -> None:
        for network, gradients in self.gradients.items():
            rate = self.learning_rate(network)
            for i, g in enumerate(gradients):
                m = self.first_moment[network][i] = 0.9 * self.first_moment[network][i] + 0.1 * g
                v = 0.999 * self.second_moment[network][i] + 0.001 * g**2
                self.second_moment[network][i] = v
                m_hat = m / (1 - 0.9 ** (self.steps + 1))
                v_hat = v / (1 - 0.999 ** (self.steps + 1))
                update = rate * m_hat / (np.sqrt(v_hat) + 1e-8)
                self.parameters[network][i] = self.parameters[network][i] - update
        self.steps += 1


# --- The package, read out -----------------------------------------------------------------------------


def trained_tensors(loss: IQLLoss, network: str) -> list[torch.Tensor]:
    """Return the parameters of a network in the order of its layers, without its buffers."""
    params = getattr(loss, f"{network}_network_params")
    return [
        tensor
        for name, tensor in params.flatten_keys(".").items()
        if name.endswith(("weight", "bias", "log_std"))
    ]


def to_numpy(tensors: list[torch.Tensor]) -> Arrays:
    return [tensor.detach().numpy().copy() for tensor in tensors]


def gaussian_loss(seed: int, mean: Array, std: Array) -> IQLLoss:
    torch.manual_seed(seed)
    kwargs = {
        "hidden_sizes": HIDDEN_SIZES,
        "observation_statistics": (torch.as_tensor(mean), torch.as_tensor(std)),
    }
    loss = IQLLoss(
        models.gaussian_policy(OBSERVATION, ACTION, **kwargs),
        models.qvalue_ensemble(OBSERVATION, ACTION, **kwargs),
        models.value_network(OBSERVATION, **kwargs),
        expectile=EXPECTILE,
        temperature=TEMPERATURE,
        weight_clip=WEIGHT_CLIP,
    ).double()
    loss.make_value_estimator(gamma=GAMMA)
    return loss


def scatter(loss: objectives.IQLLoss, scale: float = 0.3) -> None:
    """Move every parameter, each target on its own: no two networks are equal any more."""
    for network in NETWORKS:
        for tensor in trained_tensors(loss, network):
            tensor.data.add_(scale * torch.randn(tensor.shape, dtype=tensor.dtype))


def random_transitions(rng: np.random.Generator, mean: Array, std: Array) -> Transitions:
    end = rng.random(BATCH)
    return Transitions(
        observation=mean + std * rng.normal(size=(BATCH, OBSERVATION)),
        action=rng.uniform(-1, 1, size=(BATCH, ACTION)),
        reward=rng.normal(size=BATCH),
        next_observation=mean + std * rng.normal(size=(BATCH, OBSERVATION)),
        terminated=end < 0.25,
        truncated=end > 0.75,
    )


def to_tensordict(batch: Transitions) -> TensorDict:
    def column(x: NDArray) -> torch.Tensor:
        return torch.as_tensor(x)[:, None]

    return TensorDict(
        {
            "observation": torch.as_tensor(batch.observation),
            "action": torch.as_tensor(batch.action),
            "next": {
                "observation": torch.as_tensor(batch.next_observation),
                "reward": column(batch.reward),
                "done": column(batch.terminated | batch.truncated),
                "terminated": column(batch.terminated),
                "truncated": column(batch.truncated),
            },
        },
        batch_size=[BATCH],
    )


def assert_equal(actual: Arrays, expected: Arrays, what: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_allclose(a, e, rtol=RTOL, atol=0, err_msg=f"{what}[{i}]")


# --- One step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_consecutive_steps_equal_numpy(seed: int) -> None:
    """Losses, gradients, parameters after Adam and targets equal NumPy's to 1e-8, over several steps.

    The targets start apart from the online networks, the batches make each branch of the equations
    decide for some transitions and not for others, and the policy follows its cosine schedule to 0.
    """
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=OBSERVATION), rng.uniform(0.5, 2.0, size=OBSERVATION)
    loss = gaussian_loss(seed, mean, std)
    step = TrainStep(
        loss,
        learning_rate=LEARNING_RATE,
        target_rate=TARGET_RATE,
        schedule={"actor_network": cosine_decay(DECAY_STEPS)},
    )
    scatter(loss)
    trained_tensors(loss, "actor")[0].data.copy_(torch.tensor(LOG_STD))
    reference = NumpyIQL(
        {name: to_numpy(trained_tensors(loss, name)) for name in NETWORKS}, mean, std
    )

    for _ in range(STEPS):
        batch = random_transitions(rng, mean, std)
        td = to_tensordict(batch)
        loss.zero_grad()
        losses = loss(td)
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        assert step.learning_rates()["actor_network"] == [
            pytest.approx(reference.learning_rate("actor"), rel=RTOL)
        ]
        expected = reference.step(batch)
        metrics = step(td)

        assert_both_branches(reference, batch, expected["clip_fraction"])
        for name, value in expected.items():
            np.testing.assert_allclose(losses[name].item(), value, rtol=RTOL, err_msg=name)
            np.testing.assert_allclose(metrics[name].item(), value, rtol=RTOL, err_msg=name)
        assert_equal([td["td_error"].numpy()], [reference.td_error], "td_error")
        for name, gradients in reference.gradients.items():
            actual = [p.grad for p in trained_tensors(loss, name)]
            assert_equal(to_numpy(actual), gradients, f"gradient of {name}")
        for name, parameters in reference.parameters.items():
            assert_equal(to_numpy(trained_tensors(loss, name)), parameters, name)


def assert_both_branches(reference: NumpyIQL, batch: Transitions, clip_fraction: float) -> None:
    """Check that each condition in the equations holds for some transitions, fails for others."""
    assert 0 < clip_fraction < 1
    for condition in (
        reference.u < 0,
        reference.heads[0] < reference.heads[1],
        batch.terminated,
        batch.truncated,
    ):
        assert 0 < condition.mean() < 1


# --- Who is trained by which loss ----------------------------------------------------------------------


@pytest.mark.parametrize("through", ["forward", "its own method"])
@pytest.mark.parametrize("owner", ["actor", "value", "qvalue"])
def test_a_loss_moves_its_own_network_only(owner: str, through: str) -> None:
    """Of each loss, every parameter of its network has a gradient, and no other tensor has one."""
    rng = np.random.default_rng(0)
    mean, std = np.zeros(OBSERVATION), np.ones(OBSERVATION)
    loss = gaussian_loss(0, mean, std)
    scatter(loss)
    td = to_tensordict(random_transitions(rng, mean, std))
    value = (
        loss(td)[f"loss_{owner}"] if through == "forward" else getattr(loss, f"{owner}_loss")(td)[0]
    )
    value.backward()

    for network in NETWORKS:
        for tensor in trained_tensors(loss, network):
            if network == owner:
                assert tensor.grad is not None
                assert tensor.grad.any()
            else:
                assert tensor.grad is None or not tensor.grad.any()


# --- TorchRL's losses ----------------------------------------------------------------------------------


class Case(NamedTuple):
    ours: type[IQLLoss]
    theirs: type[objectives.IQLLoss]
    networks: Callable[[], tuple]
    action: Callable[[], torch.Tensor]
    kwargs: dict[str, str]


def categorical_networks(spec: Categorical | OneHot) -> tuple:
    sizes = {"hidden_sizes": HIDDEN_SIZES}
    return (
        models.categorical_policy(OBSERVATION, spec, **sizes),
        [models.discrete_qvalue_network(OBSERVATION, spec, **sizes) for _ in range(2)],
        models.value_network(OBSERVATION, **sizes),
    )


def gaussian_networks() -> tuple:
    sizes = {"hidden_sizes": HIDDEN_SIZES}
    return (
        models.gaussian_policy(OBSERVATION, ACTION, **sizes),
        models.qvalue_ensemble(OBSERVATION, ACTION, **sizes),
        models.value_network(OBSERVATION, **sizes),
    )


CASES = {
    "continuous": Case(
        IQLLoss,
        objectives.IQLLoss,
        gaussian_networks,
        lambda: torch.rand(BATCH, ACTION) * 2 - 1,
        {},
    ),
    "categorical": Case(
        DiscreteIQLLoss,
        objectives.DiscreteIQLLoss,
        lambda: categorical_networks(Categorical(ACTION)),
        lambda: torch.randint(ACTION, (BATCH,)),
        {"action_space": "categorical"},
    ),
    "one-hot": Case(
        DiscreteIQLLoss,
        objectives.DiscreteIQLLoss,
        lambda: categorical_networks(OneHot(ACTION)),
        lambda: torch.eye(ACTION, dtype=torch.int64)[torch.randint(ACTION, (BATCH,))],
        {"action_space": "one-hot"},
    ),
}


@pytest.mark.parametrize("direction", ["theirs into ours", "ours into theirs"])
@pytest.mark.parametrize(
    ("expectile", "temperature"), [(0.5, 1.0), (0.7, 3.0), (0.9, 10.0), (0.95, 0.0)]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_equal_torchrl(
    case: Case, expectile: float, temperature: float, direction: str
) -> None:
    """From a shared state dict both libraries compute the same losses, entropy and priority."""
    torch.manual_seed(0)
    kwargs = {**case.kwargs, "expectile": expectile, "temperature": temperature}
    ours = case.ours(*case.networks(), **kwargs)
    theirs = case.theirs(*case.networks(), loss_function="l2", **kwargs)
    theirs.make_value_estimator(gamma=0.99)
    source, destination = (theirs, ours) if direction == "theirs into ours" else (ours, theirs)
    scatter(source)
    destination.load_state_dict(source.state_dict())

    rng = np.random.default_rng(0)
    td = to_tensordict(random_transitions(rng, np.zeros(OBSERVATION), np.ones(OBSERVATION)))
    td = td.apply(lambda x: x.float() if x.is_floating_point() else x).set("action", case.action())
    td_ours, td_theirs = td.clone(), td.clone()
    actual, expected = ours(td_ours), theirs(td_theirs)
    for name in ("loss_actor", "loss_qvalue", "loss_value", "entropy"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(td_ours["td_error"], td_theirs["td_error"], rtol=1e-5, atol=1e-6)
