"""The losses with TorchRL's prioritized replay, beside NumPy in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import SoftUpdate

from iql_losses import ACT, CHOICES, OBS, cast, transitions
from torchrl_iql import DiscreteIQLLoss, IQLLoss, models

try:
    import torchrl._torchrl as torchrl_extension
except ImportError:  # built for another version of torch
    torchrl_extension = None

pytestmark = pytest.mark.skipif(
    torchrl_extension is None, reason="TorchRL's extension is built for another torch"
)

KINDS = ("continuous", "categorical")
LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
SIZE, BATCH = 64, 32
EXPECTILE, TEMPERATURE, CLIP, GAMMA = 0.7, 3.0, 5.0, 0.9
ALPHA, BETA, EPSILON = 0.6, 0.4, 1e-3

Arrays = dict[str, NDArray[np.float64]]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # the sampler's


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Joined(nn.Linear):
    """A linear function of all its inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(torch.cat(inputs, dim=-1))


def linear_loss(kind: str, dtype: torch.dtype, **options: str) -> IQLLoss:
    """Make a loss on networks of one layer, which NumPy can repeat in a line each."""
    if kind == "continuous":
        layers = nn.Sequential(nn.Linear(OBS, 2 * ACT), NormalParamExtractor(scale_mapping="exp"))
        parameters, distribution, cls = ["loc", "scale"], IndependentNormal, IQLLoss
        inputs, sizes = ["observation", "action"], (OBS + ACT, 1)
    else:
        layers, parameters = nn.Linear(OBS, CHOICES), ["logits"]
        distribution, cls = torch.distributions.Categorical, DiscreteIQLLoss
        inputs, sizes = ["observation"], (OBS, CHOICES)
        options["action_space"] = "categorical"
    policy = ProbabilisticActor(
        TensorDictModule(layers, ["observation"], parameters),
        in_keys=parameters,
        distribution_class=distribution,
    )
    qvalues = [TensorDictModule(Joined(*sizes), inputs, ["state_action_value"]) for _ in range(2)]
    value = ValueOperator(nn.Linear(OBS, 1), in_keys=["observation"])
    numbers = {"expectile": EXPECTILE, "temperature": TEMPERATURE, "weight_clip": CLIP}
    loss = cls(policy, qvalues, value, **numbers, **options).to(dtype)
    loss.make_value_estimator(gamma=GAMMA)
    for target in loss.target_qvalue_network_params.values(True, True):
        target.data.add_(0.3 * torch.randn_like(target))  # the targets are networks of their own
    return loss


def filled(data: TensorDict, batch_size: int = BATCH) -> TensorDictPrioritizedReplayBuffer:
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=ALPHA,
        beta=BETA,
        eps=EPSILON,
        storage=LazyTensorStorage(len(data)),
        batch_size=batch_size,
        priority_key="td_error",
    )
    buffer.extend(data)
    return buffer


def stored_priorities(buffer: TensorDictPrioritizedReplayBuffer) -> NDArray[np.float64]:
    """Return what the sampler draws in proportion to, of every transition."""
    sums = buffer.sampler._sum_tree[torch.arange(len(buffer))].double().numpy()
    smallest = buffer.sampler._min_tree[torch.arange(len(buffer))].double().numpy()
    np.testing.assert_array_equal(sums, smallest)
    return sums


def by_hand(loss: IQLLoss, batch: TensorDict) -> Arrays:
    """Compute the losses and the priority of each transition, from the parameters alone."""

    def layer(network: str, x: NDArray) -> NDArray:
        """Compute ``[B, out]``, or ``[N, B, out]`` of an ensemble."""
        weight, bias = (
            next(v for k, v in parameters.items() if k.startswith(network) and k.endswith(name))
            for name in ("weight", "bias")
        )
        return x @ np.swapaxes(weight, -1, -2) + bias[..., None, :]

    parameters = {key: value.double().numpy() for key, value in loss.state_dict().items()}
    observation, action = batch["observation"].double().numpy(), batch["action"].numpy()
    outputs = layer("actor", observation)
    if isinstance(loss, DiscreteIQLLoss):
        rows = np.arange(len(action))
        log_prob = (outputs - np.log(np.exp(outputs).sum(-1, keepdims=True)))[rows, action]
        q, target_q = (layer(n, observation)[:, rows, action] for n in ("qvalue", "target_qvalue"))
    else:
        mean, log_std = np.split(outputs, 2, axis=-1)
        square = ((action - mean) / np.exp(log_std)) ** 2
        log_prob = -(square / 2 + log_std + np.log(2 * np.pi) / 2).sum(-1)
        pair = np.concatenate([observation, action], axis=-1)
        q, target_q = (layer(n, pair)[..., 0] for n in ("qvalue", "target_qvalue"))
    v = layer("value", observation)[:, 0]
    reward, terminated = (batch["next", n].numpy()[:, 0] for n in ("reward", "terminated"))
    next_v = layer("value", batch["next", "observation"].double().numpy())[:, 0]
    goal = reward + GAMMA * np.where(terminated, 0, next_v)
    advantage = target_q.min(0) - v
    return {
        "loss_actor": -np.minimum(np.exp(TEMPERATURE * advantage), CLIP) * log_prob,
        "loss_qvalue": ((q - goal) ** 2).sum(0),
        "loss_value": np.where(advantage < 0, 1 - EXPECTILE, EXPECTILE) * advantage**2,
        "td_error": ((q - goal) ** 2).max(0),
    }


def weights_by_hand(priorities: NDArray) -> NDArray[np.float64]:
    """Compute (N P(i)) ** -beta, relative to the largest of the buffer: Schaul et al., 2016."""
    weights = (len(priorities) * priorities / priorities.sum()) ** -BETA
    return weights / weights.max()


def sample_of_various_weights(kind: str) -> TensorDict:
    """Draw a batch in double precision whose transitions have had priorities from 0.01 to 100."""
    buffer = filled(cast(transitions(kind, (SIZE,)), torch.float64))
    errors = np.geomspace(1e-2, 1e2, SIZE)
    buffer.update_priority(torch.arange(SIZE), torch.as_tensor(errors).float())
    batch = buffer.sample()
    weights = weights_by_hand((errors + EPSILON) ** ALPHA)[batch["index"].numpy()]
    np.testing.assert_allclose(batch["priority_weight"], weights, rtol=1e-5)
    assert weights.max() > 3 * weights.min()
    return batch


@pytest.mark.parametrize(
    "reduction, tolerance",
    [("mean", 1e-6), ("sum", 1e-12), ("none", 1e-12)],  # their own sum is in single precision
)
def test_the_weights_of_the_buffer_enter_each_loss(
    kind: str, reduction: str, tolerance: float
) -> None:
    """A mean with the weights w of the batch, sum(w l) / sum(w), or their sum, or w l itself."""
    batch = sample_of_various_weights(kind)
    options = {"reduction": reduction, "scalar_output_mode": "exclude"}
    loss = linear_loss(kind, torch.float64, **options)
    expected, found = by_hand(loss, batch), loss(batch)
    weight = batch["priority_weight"].double().numpy()
    for key in LOSSES:
        weighted, unweighted = weight * expected[key], expected[key]
        if reduction == "mean":
            weighted, unweighted = weighted.sum() / weight.sum(), unweighted.mean()
        elif reduction == "sum":
            weighted, unweighted = weighted.sum(), unweighted.sum()
        np.testing.assert_allclose(found[key].detach(), weighted, rtol=tolerance, err_msg=key)
        assert not np.allclose(weighted, unweighted, rtol=0.01), key


def test_the_weights_can_be_left_out(kind: str) -> None:
    """``use_prioritized_weights = False``, as in the losses of TorchRL that read them."""
    batch, loss = sample_of_various_weights(kind), linear_loss(kind, torch.float64)
    loss.use_prioritized_weights = False
    expected, found = by_hand(loss, batch), loss(batch)
    for key in LOSSES:
        assert found[key].item() == pytest.approx(expected[key].mean(), rel=1e-12), key


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-12)], ids=str
)
def test_the_priorities_of_the_loss_enter_the_buffer(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """(squared TD error + eps) ** alpha of what was sampled; the rest keeps what it had."""
    loss, buffer = linear_loss(kind, dtype), filled(cast(transitions(kind, (SIZE,)), dtype))
    initial = (1 + EPSILON) ** ALPHA  # the priority of a transition that was never sampled is 1
    expected = np.full(SIZE, initial)
    np.testing.assert_allclose(stored_priorities(buffer), expected, rtol=1e-6)
    for _ in range(3):
        batch = buffer.sample()
        assert "td_error" not in batch.keys()
        errors, index = by_hand(loss, batch)["td_error"], batch["index"].numpy()
        loss(batch)
        assert batch["td_error"].dtype is dtype
        np.testing.assert_allclose(batch["td_error"], errors, rtol=tolerance, atol=tolerance)
        batch["td_error"] = batch["td_error"].float()  # the buffer takes no other
        buffer.update_tensordict_priority(batch)
        stored = stored_priorities(buffer)
        np.testing.assert_array_equal(stored[index], (batch["td_error"] + EPSILON) ** ALPHA)
        expected[index] = (errors + EPSILON) ** ALPHA
        np.testing.assert_allclose(stored, expected, rtol=max(1e-6, tolerance))
    assert 0 < (expected == initial).sum() < SIZE
    assert expected.max() > 5 * expected.min()


def test_transitions_with_a_large_error_are_sampled_more_often(kind: str) -> None:
    """As often as their share of the priorities says, within the noise of the draws."""
    data, surprising, draws = transitions(kind, (SIZE,)), torch.tensor([3, 17, 40]), 20_000
    data["next", "reward"][surprising] += 20.0
    loss, buffer = linear_loss(kind, torch.float32), filled(data, batch_size=draws)

    def count(shares: NDArray) -> NDArray:
        counts = np.bincount(buffer.sample()["index"].numpy(), minlength=SIZE)
        deviation = np.sqrt(draws * shares * (1 - shares))
        assert (np.abs(counts - draws * shares) < 4.5 * deviation).all()
        return counts

    before = count(np.full(SIZE, 1 / SIZE))
    everything = buffer[:]
    everything["index"] = torch.arange(SIZE)
    loss(everything)
    buffer.update_tensordict_priority(everything)
    priorities = (by_hand(loss, everything)["td_error"] + EPSILON) ** ALPHA
    after = count(priorities / priorities.sum())
    assert (after[surprising] > 5 * before[surprising]).all()


# --- A problem with a known solution ------------------------------------------------------------------

STATES, CHOSEN = 4, 3
REWARDS = torch.tensor([[0.0, 1.0, -1.0], [1.0, 0.0, 0.5], [-1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])


def bandit(kind: str) -> TensorDict:
    """Make every choice in every state once, with its reward, after which the episode ends."""
    state = torch.arange(STATES).repeat_interleave(CHOSEN)
    choice = torch.arange(CHOSEN).repeat(STATES)
    observation = F.one_hot(state, STATES).float()
    ended = torch.ones(len(state), 1, dtype=torch.bool)
    following = {
        "observation": observation,
        "reward": REWARDS[state, choice].unsqueeze(-1),
        "done": ended,
        "terminated": ended,
    }
    action = 0.8 * (choice.float().unsqueeze(-1) - 1) if kind == "continuous" else choice
    return TensorDict({"observation": observation, "action": action, "next": following}, [12])


def expectile_by_hand(samples: NDArray) -> float:
    """Find where the weighted distances of the samples above and below are equal."""
    low, high = samples.min(), samples.max()
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.where(samples < middle, 1 - EXPECTILE, EXPECTILE)
        low, high = (middle, high) if (weights * (samples - middle)).sum() > 0 else (low, middle)
    return low


def test_a_training_loop_solves_a_bandit(kind: str) -> None:
    """Sample, descend, follow, write the priorities back: Q, V and the policy near what is known."""
    sizes = {"hidden_sizes": (32, 32)}
    value = models.value_network(STATES, **sizes)
    if kind == "continuous":
        policy = models.gaussian_policy(STATES, 1, **sizes)
        loss = IQLLoss(policy, models.qvalue_ensemble(STATES, 1, **sizes), value)
    else:
        policy = models.categorical_policy(STATES, CHOSEN, **sizes)
        q = models.discrete_qvalue_network(STATES, CHOSEN, **sizes)
        loss = DiscreteIQLLoss(policy, q, value, action_space="categorical")
    data = bandit(kind)
    buffer = filled(data)
    target = SoftUpdate(loss, tau=0.5)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    solution = [expectile_by_hand(rewards) for rewards in REWARDS.double().numpy()]
    one_each = data[::CHOSEN]

    @torch.no_grad()
    def distance() -> float:
        v = loss.get_stateful_net("value_network")(one_each.copy())["state_value"]
        return float(np.abs(v[:, 0].numpy() - solution).mean())

    before, far = loss(data.copy()), distance()
    priorities = []
    for _ in range(50):
        batch = buffer.sample()
        losses = loss(batch)
        optimizer.zero_grad()
        sum(losses[key] for key in LOSSES).backward()
        optimizer.step()
        target.step()
        buffer.update_tensordict_priority(batch)
        priorities.append(stored_priorities(buffer))
    assert len(np.unique(priorities, axis=0)) == 50
    assert loss(data.copy())["loss_qvalue"] < 0.1 * before["loss_qvalue"]
    assert distance() < 0.6 * far
    policy = loss.get_stateful_net("actor_network").get_dist(one_each.copy())
    if kind == "continuous":
        choice = (policy.mean[:, 0] / 0.8 + 1).round().long()
    else:
        choice = policy.probs.argmax(-1)
    assert torch.equal(choice, REWARDS.argmax(-1))
