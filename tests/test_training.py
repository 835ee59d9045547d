"""The training step: its parts, its schedule, its replicas, and that nothing is lost between sessions."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map_only
from torchrl import objectives
from torchrl.data import OneHot
from torchrl.modules import ValueOperator
from torchrl.objectives import BCLoss, SoftUpdate

from iql_losses import built
from torchrl_iql import DiscreteIQLLoss, IQLLoss, TrainStep, models
from torchrl_iql.data import Minibatches
from torchrl_iql.data.minibatches import BLOCK
from torchrl_iql.models import Architecture
from torchrl_iql.training import adam_, cosine_decay, nonfinite, warm_up
from torchrl_iql.training import execution as execution_room
from torchrl_iql.training.stacked import StackedProgram

LOSSES = ("loss_actor", "loss_qvalue", "loss_value")


def transitions(n: int) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.randn(n, 3),
            "action": torch.rand(n, 2) * 2 - 1,
            "next": {
                "observation": torch.randn(n, 3),
                "reward": torch.randn(n, 1),
                "done": torch.rand(n, 1) < 0.2,
                "terminated": torch.rand(n, 1) < 0.1,
            },
        },
        [n],
    )


def make_loss(seed: int | None = None, discount: float = 0.99, **settings: Any) -> IQLLoss:
    if seed is not None:
        torch.manual_seed(seed)
    sizes = {"hidden_sizes": (16, 16)}
    loss = IQLLoss(
        models.gaussian_policy(3, 2, **sizes),
        models.qvalue_ensemble(3, 2, **sizes),
        models.value_network(3, **sizes),
        **settings,
    )
    return loss.make_value_estimator(gamma=discount)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def assert_close(a: torch.nn.Module, b: torch.nn.Module, tolerance: float = 1e-5) -> None:
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=tolerance, atol=tolerance)


class PlainLoop:
    """The loop of the README: the loss, torch's Adam, TorchRL's target updater."""

    def __init__(self, loss: IQLLoss, learning_rate: float = 3e-4, target_rate: float = 0.005):
        self.loss = loss
        self.target = SoftUpdate(loss, tau=target_rate)
        self.optimizer = torch.optim.Adam(loss.parameters(), lr=learning_rate)

    def __call__(self, batch: TensorDict) -> TensorDict:
        losses = self.loss(batch)
        self.optimizer.zero_grad()
        sum(losses[key] for key in LOSSES).backward()
        self.optimizer.step()
        self.target.step()
        return losses.detach()


# --- One learner ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_equals_the_plain_composition_of_the_public_pieces(execution: str) -> None:
    loss, plain = make_loss(0), PlainLoop(make_loss(0), 1e-2, 0.1)
    step = TrainStep(loss, learning_rate=1e-2, target_rate=0.1, execution=execution)
    for _ in range(20):
        batch = transitions(32)
        metrics, expected = step(batch), plain(batch)
        assert set(metrics.keys()) == set(expected.keys())
        for key in expected.keys():
            torch.testing.assert_close(metrics[key], expected[key], rtol=1e-4, atol=1e-5)
    assert_close(loss, plain.loss, 1e-4)
    assert step.steps == 20
    assert not any(value.requires_grad for value in metrics.values())


NETWORKS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "squashed": {"policy": "squashed"},
    "deterministic": {"policy": "deterministic"},
    "categorical": {"policy": "categorical"},
    "one network": {"num": 1},
    "five networks": {"num": 5},
    "three layers": {"hidden_sizes": (16, 8, 12)},
    "no layer": {"hidden_sizes": ()},
    "scaled": {"action_bounds": ([-1.0, -3.0], [2.0, 5.0]), "normalize_observation": True},
}


@pytest.mark.parametrize("execution", ["eager", "compiled"])
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_kind_of_network_is_trained_as_the_loss_says(
    settings: dict[str, Any], execution: str
) -> None:
    settings = {"hidden_sizes": (16, 16), **settings}
    num = settings.pop("num", 2)
    architecture = Architecture(observation_size=3, action_size=2, **settings)

    def loss() -> IQLLoss:
        torch.manual_seed(0)
        networks = built(architecture, (torch.ones(3), torch.full((3,), 2.0)), num)
        kwargs = {"num_qvalue_nets": num}
        if architecture.discrete:
            return DiscreteIQLLoss(*networks, action_space="categorical", **kwargs)
        return IQLLoss(*networks, **kwargs)

    ours, plain = loss(), PlainLoop(loss())
    assert_trained_alike(ours, plain, execution, discrete=architecture.discrete)


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_one_hot_actions_are_trained_as_the_loss_says(execution: str) -> None:
    def loss() -> IQLLoss:
        torch.manual_seed(0)
        return DiscreteIQLLoss(
            models.categorical_policy(3, OneHot(2)),
            models.discrete_qvalue_network(3, 2),
            models.value_network(3),
            action_space="one-hot",
        )

    assert_trained_alike(loss(), PlainLoop(loss()), execution, discrete=True, one_hot=True)


def assert_trained_alike(
    ours: IQLLoss,
    plain: PlainLoop,
    execution: Any,
    *,
    discrete: bool = False,
    one_hot: bool = False,
) -> None:
    step = TrainStep(ours, execution=execution)
    assert step.path.startswith("stacked"), step.path
    for _ in range(3):
        batch = transitions(32)
        batch["steps_to_next_obs"] = torch.randint(1, 4, (32, 1))
        if discrete:
            integers = torch.randint(2, (32,))
            batch["action"] = torch.eye(2, dtype=torch.int64)[integers] if one_hot else integers
        metrics, expected = step(batch), plain(batch)
        assert set(metrics.keys()) == set(expected.keys())
        for key in expected.keys():
            torch.testing.assert_close(metrics[key], expected[key], rtol=1e-4, atol=1e-6)
    assert_close(ours, plain.loss)


@pytest.mark.parametrize("execution", ["eager", "compiled"])
@pytest.mark.parametrize("policy", ["gaussian", "squashed", "deterministic"])
@pytest.mark.parametrize("moved", [True, False])
def test_bounds_and_statistics_are_those_that_the_loss_has_now(
    policy: str, execution: Any, moved: bool
) -> None:
    """Elsewhere in memory after a cast and back, or others after a state was loaded."""
    settings = {**NETWORKS["scaled"], "policy": policy, "hidden_sizes": (16, 16)}
    architecture = Architecture(observation_size=3, action_size=2, **settings)

    def loss() -> IQLLoss:
        torch.manual_seed(0)
        return IQLLoss(*built(architecture, (torch.ones(3), torch.full((3,), 2.0)), 2))

    ours, plain = loss(), PlainLoop(loss())
    step = TrainStep(ours, execution=execution)
    for t in range(4):
        if t == 2 and moved:
            held = [buffer.data for buffer in ours.buffers()]  # so that no new one is where it was
            ours.double().float()
            here = {buffer.data_ptr() for buffer in ours.buffers()}
            left = [buffer for buffer in held if buffer.data_ptr() not in here]
            assert len(left) > 5
            for buffer in left:
                buffer.fill_(math.nan)  # nobody is to read it
        elif t == 2:
            state = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
            constants = [key for key in state if key.endswith(("mean", "std", "unit", "range"))]
            assert len(constants) > 5
            for key in constants:
                state[key] *= 1.25
            for each in (ours, plain.loss):
                each.load_state_dict(state)
        batch = transitions(32)
        metrics, expected = step(batch), plain(batch)
        for key in expected.keys():
            torch.testing.assert_close(metrics[key], expected[key], rtol=1e-4, atol=1e-6)
    assert_close(ours, plain.loss)


def test_dropout_acts_on_the_policy_and_on_nothing_else() -> None:
    def losses(dropout: float) -> TensorDict:
        torch.manual_seed(0)
        policy = models.gaussian_policy(3, 2, dropout=dropout)
        loss = IQLLoss(policy, models.qvalue_ensemble(3, 2), models.value_network(3))
        batch = transitions(256)
        return TrainStep(loss)(batch)

    without, dropped, again = losses(0.0), losses(0.5), losses(0.5)
    assert all(torch.equal(dropped[key], again[key]) for key in again.keys())
    for key in without.keys():
        policy = key in ("loss_actor", "entropy")
        assert torch.equal(without[key], dropped[key]) != policy, key


@pytest.mark.parametrize("autocast", [True, False])
def test_losses_are_float32_from_bfloat16_products_too(autocast: bool) -> None:
    loss, batch = make_loss(0), transitions(256)
    if not autocast:
        loss = loss.bfloat16()
        batch = batch.apply(lambda x: x.bfloat16() if x.is_floating_point() else x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, metrics = loss(batch.clone()), TrainStep(loss)(batch)
    assert {value.dtype for value in metrics.values()} == {torch.float32}
    for key in plain.keys():
        torch.testing.assert_close(metrics[key], plain[key].detach(), rtol=2e-2, atol=1e-2)


def test_adam_is_torchs() -> None:
    torch.manual_seed(0)
    ours = torch.randn(3, 5)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.Adam([theirs], lr=1e-2)
    first, second = torch.zeros(3, 5), torch.zeros(3, 5)
    for t in range(1, 11):
        gradients = torch.randn(3, 5) * 10.0 ** torch.randint(-8, 3, (3, 5))
        theirs.grad = gradients.clone()
        optimizer.step()
        root = math.sqrt(1 - 0.999**t)
        step_size, epsilon = torch.tensor([1e-2 * root / (1 - 0.9**t), 1e-8 * root])
        adam_(ours, gradients, first, second, step_size, epsilon)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_the_policys_learning_rate_follows_a_cosine_to_zero_and_stays_there() -> None:
    loss = make_loss(0)
    step = TrainStep(loss, learning_rate=0.1, schedule={"actor_network": cosine_decay(4)})
    rates = []
    for t in range(6):
        before = deepcopy(loss)
        rates += step.learning_rates()["actor_network"]
        step(transitions(8))
        moved = {
            name: any(
                not torch.equal(a, b)
                for a, b in zip(
                    getattr(before, f"{name}_network_params").values(True, True),
                    getattr(loss, f"{name}_network_params").values(True, True),
                    strict=True,
                )
            )
            for name in ("actor", "value", "qvalue")
        }
        assert moved == {"actor": t < 4, "value": True, "qvalue": True}
    cosine = [0.05 * (1 + math.cos(math.pi * min(t / 4, 1))) for t in range(6)]
    assert rates == pytest.approx(cosine)


def test_temperature_zero_is_torchrls_behaviour_cloning() -> None:
    loss = make_loss(0, temperature=0.0)
    cloning = BCLoss(models.gaussian_policy(3, 2, hidden_sizes=(16, 16)))
    cloning.actor_network_params.data.update_(loss.actor_network_params.data)
    step = TrainStep(loss, learning_rate=1e-2)
    optimizer = torch.optim.Adam(cloning.parameters(), lr=1e-2)
    for _ in range(20):
        batch = transitions(32)
        step(batch)
        optimizer.zero_grad()
        cloning(batch)["loss_bc"].backward()
        optimizer.step()
    for ours, theirs in zip(
        loss.actor_network_params.parameters(), cloning.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_loss_stays_what_it_is_and_both_see_what_the_other_changes() -> None:
    loss, plain = make_loss(0), PlainLoop(make_loss(0))
    policy = loss.get_stateful_net("actor_network")
    step, batch = TrainStep(loss), transitions(32)
    for change in (
        lambda each: None,
        lambda each: each.load_state_dict(make_loss(1).state_dict()),
        lambda each: setattr(each, "temperature", 0.5),
        lambda each: setattr(each, "expectile", 0.9),
        lambda each: setattr(each, "weight_clip", 0.8),
        lambda each: setattr(each, "loss_function", "smooth_l1"),
        lambda each: each.make_value_estimator(gamma=0.5),
        lambda each: each.make_value_estimator("td1", gamma=0.6),
        lambda each: each.value_network_params.data.mul_(1.1),
    ):
        change(loss)
        change(plain.loss)
        expected, direct, metrics = plain(batch), loss(batch), step(batch)
        for key in expected.keys():
            torch.testing.assert_close(direct[key].detach(), expected[key], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(metrics[key], expected[key], rtol=1e-4, atol=1e-5)
    assert_close(loss, plain.loss)
    assert torch.equal(policy(batch)["loc"], loss.get_stateful_net("actor_network")(batch)["loc"])


def test_a_restored_step_continues_as_if_nothing_had_happened() -> None:
    torch.manual_seed(0)
    batches = [transitions(32) for _ in range(6)]
    uninterrupted = TrainStep(make_loss(), schedule={"actor_network": cosine_decay(6)})
    restored = TrainStep(make_loss(), schedule={"actor_network": cosine_decay(6)})
    for batch in batches[:3]:
        uninterrupted(batch)
    restored.load_state_dict(uninterrupted.state_dict())
    for batch in batches[3:]:
        uninterrupted(batch)
        restored(batch)
    assert restored.steps == 6
    assert (
        restored.learning_rates()["actor_network"]
        == uninterrupted.learning_rates()["actor_network"]
    )
    assert equal(restored.losses[0], uninterrupted.losses[0])


# --- Minibatches, and compiled code --------------------------------------------------------------------


def test_a_run_draws_its_minibatches_and_can_be_cut_anywhere() -> None:
    torch.manual_seed(0)
    minibatches = Minibatches(transitions(500), 16, seeds=[7])
    whole, parts, single = (TrainStep(make_loss(0)) for _ in range(3))
    steps = BLOCK + 30
    metrics = whole.run(minibatches, steps)
    for part in (1, 70, 40, 19):
        again = parts.run(minibatches, part)
    for t in range(steps):
        source, indices = minibatches(t // BLOCK)
        one_by_one = single(source[indices[t % BLOCK, 0]])
    assert whole.steps == parts.steps == single.steps == steps
    assert equal(whole.losses[0], parts.losses[0])
    assert equal(whole.losses[0], single.losses[0])
    assert all(torch.equal(metrics[key], again[key]) for key in metrics.keys())
    assert all(torch.equal(metrics[key], one_by_one[key]) for key in metrics.keys())


def cloning(seed: int) -> BCLoss:
    torch.manual_seed(seed)
    return BCLoss(models.gaussian_policy(3, 2, hidden_sizes=(16,), dropout=0.2))


@pytest.mark.parametrize("execution", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [make_loss, cloning])
@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_means_are_those_of_all_steps(
    make: Callable[[int], Any], seeds: list[int], execution: str
) -> None:
    torch.manual_seed(0)
    minibatches = Minibatches(transitions(500), 16, seeds=seeds)
    step, single, restored = (
        TrainStep([make(s) for s in seeds], execution=execution) for _ in "abc"
    )
    by_step = [single.run(minibatches, 1).to_dict() for _ in range(BLOCK + 30)]
    for part in (1, 70, 40):
        step.run(minibatches, part)
    for r in range(len(seeds)):
        restored.load_state_dict(step.state_dict(r), r)
    found = []
    for each in (step, restored):
        each.run(minibatches, 19)
        found.append(each.means().to_dict())
    assert list(found[0]) == list(found[1]) == list(by_step[0])  # in one order in every process
    for key, mean in found[0].items():
        assert torch.equal(mean, found[1][key])
        expected = np.mean([its[key].double().numpy() for its in by_step], axis=0)
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-6, atol=1e-8)
    step.run(minibatches, 2)  # after that, they are of what follows
    two = [single.run(minibatches, 1).to_dict() for _ in range(2)]
    for key, mean in step.means().to_dict().items():
        expected = np.mean([its[key].double().numpy() for its in two], axis=0)
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_compiled_code_is_compiled_once_and_never_left() -> None:
    torch._dynamo.reset()
    minibatches = Minibatches(transitions(500), 16)
    loss, eager = make_loss(0), make_loss(0)
    compiled = TrainStep(loss, schedule={"actor_network": cosine_decay(200)}, execution="compiled")
    plain = TrainStep(eager, schedule={"actor_network": cosine_decay(200)})
    compiled.run(minibatches, 3)
    plain.run(minibatches, 3)
    counters.clear()
    with torch.compiler.set_stance("fail_on_recompile"):
        for temperature, expectile in ((1.0, 0.8), (0.5, 0.9), (2.0, 0.6)):
            for each in (loss, eager):
                each.temperature, each.expectile = temperature, expectile
            compiled.run(minibatches, 40)
            plain.run(minibatches, 40)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 0
    assert_close(loss, eager, 1e-4)


@pytest.mark.slow
def test_one_training_step_does_not_use_up_the_compilations_of_another() -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for replicas in (1, 2):
            step = TrainStep([make_loss(r) for r in range(replicas)], execution="compiled")
            step.run(Minibatches(transitions(50), 4, seeds=range(replicas)), 2)


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_replayed_graph_gets_every_index_and_schedule(
    streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that surrounds CUDA's recording, with a recording that runs its code again."""
    replays = []

    def record(steps: Callable) -> tuple:
        first = tree_map_only(Tensor, torch.clone, steps())
        recorded = tree_map_only(Tensor, lambda x: torch.full_like(x, math.nan), first)

        def replay() -> None:
            for place, its in zip(tree_leaves(recorded), tree_leaves(steps()), strict=True):
                if its is not None:
                    place.copy_(its)
            replays.append(recorded)

        return first, replay, recorded

    monkeypatch.setattr(execution_room, "record", record)
    torch.manual_seed(0)
    data = transitions(500)
    plain = TrainStep([make_loss(0), make_loss(1)], schedule={"actor_network": cosine_decay(150)})
    expected = plain.run(Minibatches(data, 16, seeds=[0, 1]), 137)
    replayed = TrainStep(
        [make_loss(0), make_loss(1)], schedule={"actor_network": cosine_decay(150)}
    )
    replayed._executor.execution = "cudagraph"
    with Minibatches(data, 16, seeds=[0, 1], streaming=streaming) as minibatches:
        for steps in (1, 40, 63, 33):
            metrics = replayed.run(minibatches, steps)
    # Of each learner 4 of the 40, the first of which is recorded, 5 of 59 to the end of the block, none
    # of the 4 after it, 3 of the 33 left.
    assert len(replays) == 2 * (4 + 5 + 3 - 1)
    for key in expected.keys():
        torch.testing.assert_close(metrics[key], expected[key], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(replayed.means(), plain.means(), rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(replayed.losses, plain.losses, strict=True):
        assert_close(ours, theirs)


# --- Replicas ------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"expectile": 0.5, "temperature": 3.0, "discount": 0.99},
    {"expectile": 0.9, "temperature": 0.0, "discount": 0.9},
    {"expectile": 0.7, "temperature": 10.0, "discount": 0.5},
]
RATES = [3e-4, 1e-3, 1e-2]


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_a_replica_equals_the_same_learner_trained_alone(execution: str) -> None:
    data, seeds = transitions(500), [5, 6, 5]
    losses = [make_loss(seed, **each) for seed, each in zip(seeds, SETTINGS, strict=True)]
    together = TrainStep(
        losses,
        learning_rate=RATES,
        schedule={"actor_network": cosine_decay(150)},
        execution=execution,
    )
    metrics = together.run(Minibatches(data, 32, seeds=seeds), 100)
    for r, (seed, each) in enumerate(zip(seeds, SETTINGS, strict=True)):
        alone = TrainStep(
            make_loss(seed, **each),
            learning_rate=RATES[r],
            schedule={"actor_network": cosine_decay(150)},
        )
        expected = alone.run(Minibatches(data, 32, seeds=[seed]), 100)
        if execution == "eager":  # bit for bit
            assert all(torch.equal(metrics[key][r], expected[key]) for key in expected.keys())
            assert equal(losses[r], alone.losses[0])
        else:
            assert_close(losses[r], alone.losses[0], 1e-4)
        assert (
            together.learning_rates()["actor_network"][r]
            == alone.learning_rates()["actor_network"][0]
        )


def test_a_batch_of_learners_is_computed_as_each_of_them() -> None:
    """What a GPU does with all replicas at once, here on the CPU."""
    losses = [make_loss(seed, **each) for seed, each in enumerate(SETTINGS)]
    batches = torch.stack([transitions(32) for _ in SETTINGS])
    totals = []
    for loss, batch in zip(losses, batches, strict=True):
        outputs = loss(batch.clone())
        totals.append(sum(outputs[key] for key in LOSSES))
        totals[-1].backward()
    gradients = [[p.grad.clone() for p in loss.parameters()] for loss in losses]
    alone = TrainStep(losses)
    program = StackedProgram(losses, alone._optimizations)
    columns = program.columns(batches.reshape(-1))
    batch = {key: column.unflatten(0, (3, 32)) for key, column in columns.items()}
    stack, _, coefficients = program.state
    program.shared.read_value(stack)
    found, metrics, _ = program.shared.gradients(stack, coefficients, batch)
    rows = [program.shared.metrics.index(key) for key in LOSSES]
    torch.testing.assert_close(metrics[rows].sum(0), torch.stack(totals).detach())
    for tensor, gradient in zip(stack, found, strict=True):
        tensor[: len(gradient)] = gradient  # the parameters, views of it, now show their gradients
    for loss, expected in zip(losses, gradients, strict=True):
        for parameter, gradient in zip(loss.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_replicas_do_not_touch_each_other() -> None:
    def trained(poison: bool) -> list[IQLLoss]:
        losses = [make_loss(seed) for seed in range(3)]
        step = TrainStep(losses)
        if poison:
            losses[1].value_network_params.data.mul_(math.nan)
        step.run(Minibatches(data, 16, seeds=range(3)), 10)
        return losses

    torch.manual_seed(0)
    data = transitions(200)
    clean, poisoned = trained(False), trained(True)
    assert equal(clean[0], poisoned[0])
    assert equal(clean[2], poisoned[2])
    assert not equal(clean[1], poisoned[1])


def test_a_replica_moves_on_alone() -> None:
    torch.manual_seed(0)
    data = transitions(200)
    together = TrainStep([make_loss(seed) for seed in range(3)])
    together.run(Minibatches(data, 16, seeds=range(3)), 10)
    alone = TrainStep(make_loss(9))
    alone.load_state_dict(together.state_dict(replica=2))
    together.run(Minibatches(data, 16, seeds=range(3)), 10)
    alone.run(Minibatches(data, 16, seeds=[2]), 10)
    assert alone.steps == 20
    assert_close(alone.losses[0], together.losses[2])


def test_batches_for_replicas_are_stacked() -> None:
    losses, batches = [make_loss(seed) for seed in range(2)], [transitions(8) for _ in range(2)]
    expected = [loss(batch.clone()) for loss, batch in zip(losses, batches, strict=True)]
    metrics = TrainStep(losses)(torch.stack(batches))
    assert metrics.shape == (2,)
    for r in range(2):
        for key in expected[r].keys():
            torch.testing.assert_close(metrics[key][r], expected[r][key].detach())


# --- Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", [1e-3, 1e-4]),
        ("target_rate", 0.0),
        ("target_rate", 1.5),
        ("target_every", 0),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
        ("every", {"actor_network": 0}),
        ("every", {"actor": 2}),
        ("learning_rate", {"policy": 1e-3}),
        ("schedule", {"actor": None}),
        ("schedule", {"actor_network": 0.5}),
        ("schedule", cosine_decay(5)),
        ("learning_rate", "3e-4"),
        ("every", [2]),
        ("entries", ()),
        ("execution", "fast"),
    ],
)
def test_bad_settings_are_named(setting: str, value: Any) -> None:
    shown = next(iter(value)) if isinstance(value, dict) else value
    with pytest.raises(
        (TypeError, ValueError), match=f"{setting}.*{re.escape(str(shown))}"
    ) as error:
        TrainStep(make_loss(), **{setting: value})
    if setting == "schedule" and not isinstance(value, dict):
        assert "{'actor_network': cosine_decay(1000)}" in str(error.value)


@pytest.mark.parametrize("steps", [0, math.nan, "5"])
def test_a_schedule_has_steps(steps: Any) -> None:
    for make in (cosine_decay, warm_up):
        with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps!r}"):
            make(steps)


def own_value_network() -> IQLLoss:
    value = ValueOperator(torch.nn.Linear(3, 1), in_keys=["observation"])
    return IQLLoss(models.gaussian_policy(3, 2), models.qvalue_ensemble(3, 2), value)


def uneven(value: tuple[int, ...] = (256, 256), statistics: Any = None) -> IQLLoss:
    return IQLLoss(
        models.gaussian_policy(3, 2, observation_statistics=statistics),
        models.qvalue_ensemble(3, 2),
        models.value_network(3, hidden_sizes=value),
    )


def theirs() -> objectives.IQLLoss:
    return objectives.IQLLoss(
        models.gaussian_policy(3, 2), models.qvalue_ensemble(3, 2), models.value_network(3)
    )


def other_keys() -> IQLLoss:
    loss = make_loss()
    loss.set_keys(reward="cost")
    return loss


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        (lambda: own_value_network(), "value_network is not a network of torchrl_iql.models"),
        (lambda: other_keys(), "default keys"),
        (lambda: make_loss(reduction="sum"), "reduction='mean'"),
        (lambda: make_loss().make_value_estimator("td1"), "TD0"),
        (lambda: make_loss().make_value_estimator(average_rewards=True), "average_rewards"),
        (lambda: theirs(), "IQLLoss of torchrl.objectives.iql is not this project's IQL"),
        (
            lambda: uneven(value=(16, 8)),
            r"different hidden_sizes, \[256, 256\], \[16, 8\], \[256, 256\]",
        ),
        (lambda: uneven(statistics=(torch.ones(3), torch.ones(3))), "different observation_stat"),
    ],
)
def test_losses_without_a_stack_are_trained_as_they_are(
    losses: Callable[[], Any], reason: str
) -> None:
    step = TrainStep(losses())
    assert re.search(f"^general: .*{reason}", step.path), step.path


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        (lambda: [make_loss(), make_loss(weight_clip=5.0)], "different weight_clip, 100.0 and 5.0"),
        (
            lambda: [
                make_loss(),
                IQLLoss(
                    models.gaussian_policy(3, 2),
                    models.qvalue_ensemble(3, 2),
                    models.value_network(3),
                ),
            ],
            "different sizes",
        ),
    ],
)
def test_learners_that_differ_are_trained_one_after_the_other(
    losses: Callable[[], Any], reason: str
) -> None:
    assert re.search(
        f"^stacked: .*one learner after the other: .*{reason}", TrainStep(losses()).path
    )


# --- Losses that others have changed ---------------------------------------------------------------------


class TenTimes(models.Torso):
    def forward(self, *inputs: Tensor) -> Tensor:
        return 10 * super().forward(*inputs)


def reading_another_entry(policy: Any, value: Any) -> None:
    value.in_keys = ["privileged"]


def activated_otherwise(policy: Any, value: Any) -> None:
    value.module.mlp[1] = torch.nn.ELU()


def without_an_activation(policy: Any, value: Any) -> None:
    value.module.mlp[1] = torch.nn.Identity()


def normalised_between_layers(policy: Any, value: Any) -> None:
    value.module.mlp[1] = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.ReLU())


def of_a_class_of_its_own(policy: Any, value: Any) -> None:
    value.module = TenTimes(3, 1, (16, 16))


def hooked(policy: Any, value: Any) -> None:
    value.module.mlp[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def reparametrised(policy: Any, value: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(value.module.mlp[0])


def with_another_layer(policy: Any, value: Any) -> None:
    policy[0].module.squash = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())


@pytest.mark.parametrize(
    "change",
    [
        reading_another_entry,
        activated_otherwise,
        without_an_activation,
        normalised_between_layers,
        of_a_class_of_its_own,
        hooked,
        reparametrised,
        with_another_layer,
    ],
)
def test_networks_that_are_not_as_they_were_made_are_called(change: Callable) -> None:
    def loss() -> IQLLoss:
        torch.manual_seed(0)
        networks = (
            models.gaussian_policy(3, 2, hidden_sizes=(16, 16)),
            models.value_network(3, hidden_sizes=(16, 16)),
        )
        change(*networks)
        q = models.qvalue_ensemble(3, 2, hidden_sizes=(16, 16))
        return IQLLoss(networks[0], q, networks[1])

    plain = PlainLoop(loss(), 1e-2, 0.1)
    step = TrainStep(loss(), learning_rate=1e-2, target_rate=0.1)
    for _ in range(3):
        batch = transitions(8)
        batch["privileged"] = torch.randn(8, 3)
        batch["next", "privileged"] = torch.randn(8, 3)
        metrics, expected = step(batch.clone()), plain(batch)
        for key in LOSSES:
            torch.testing.assert_close(metrics[key], expected[key])
    assert_close(step.losses[0], plain.loss)
    assert step.path.startswith("general: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss.set_keys(reward="other"),
        lambda loss: setattr(loss, "loss_mask_key", None),
        lambda loss: setattr(loss, "use_prioritized_weights", False),
    ],
)
def test_what_a_loss_reads_can_be_changed_between_steps(change: Callable) -> None:
    batch = transitions(8)
    batch["next", "other"] = 100 * batch["next", "reward"]
    batch["priority_weight"] = torch.rand(8)
    batch["collector", "mask"] = torch.arange(8) < 5
    plain, step = PlainLoop(make_loss(0)), TrainStep(make_loss(0))
    for later in (False, True):
        if later:
            change(plain.loss)
            change(step.losses[0])
        metrics, expected = step(batch.clone()), plain(batch.clone())
        for key in LOSSES:
            torch.testing.assert_close(metrics[key], expected[key])


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("frozen", ["actor_network", "qvalue_network_params.module.mlp.0"])
@pytest.mark.parametrize("later", [False, True])
def test_frozen_parameters_stay_as_they_are(general: bool, frozen: str, later: bool) -> None:
    step = TrainStep(make_loss(0), weight_decay=1e-9 if general else 0.0)
    batch = transitions(8)
    if later:
        step(batch)
    for name, parameter in step.losses[0].named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    if not later:
        step = TrainStep(step.losses[0], weight_decay=1e-9 if general else 0.0)
    before = {name: p.clone() for name, p in step.losses[0].named_parameters()}
    step(batch)
    moved = {
        name for name, p in step.losses[0].named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == {name for name in before if not name.startswith(frozen)}


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("copied", [deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_copies_of_a_step_go_on(general: bool, copied: Callable) -> None:
    step = TrainStep([make_loss(0), make_loss(1)], weight_decay=1e-9 if general else 0.0)
    step(torch.stack([transitions(8)] * 2))
    twin = copied(step)
    before = twin.state_dict(1)["loss"]
    for _ in range(3):
        batch = torch.stack([transitions(8)] * 2)
        found, expected = twin(batch.clone()), step(batch)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
    for r in range(2):
        assert equal(step.losses[r], twin.losses[r])
        state, its = step.state_dict(r), twin.state_dict(r)
        for name, pair in state["moments"].items():
            assert all(map(torch.equal, pair, its["moments"][name]))
    assert not torch.equal(
        *(x["actor_network_params.module.0.module.log_std"] for x in (before, its["loss"]))
    )


def test_dropout_rests_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": (16, 16)}
    policy = models.gaussian_policy(3, 2, dropout=0.5, **sizes)
    loss = IQLLoss(policy, models.qvalue_ensemble(3, 2, **sizes), models.value_network(3, **sizes))
    step, batch = TrainStep(loss), transitions(8)
    trained = step(batch)
    loss.eval()
    expected = loss(batch.clone())
    found = step(batch)
    assert step.path.startswith("stacked")
    for key in LOSSES:
        torch.testing.assert_close(found[key], expected[key])
    loss.train()
    assert trained["loss_actor"] != found["loss_actor"] != step(batch)["loss_actor"]


# --- Batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch.reshape(2, 4),
        lambda batch: batch.set("observation", batch["observation"].double()),
        lambda batch: batch.set(("next", "reward"), batch["next", "reward"].double()),
        lambda batch: batch.set("action", batch["action"].double()),
        lambda batch: batch.exclude(("next", "terminated")),
        lambda batch: batch.set("steps_to_next_obs", torch.arange(8).view(8, 1) % 3 + 1),
    ],
)
def test_whatever_form_a_loss_reads_a_step_reads(change: Callable) -> None:
    batch = change(transitions(8))
    plain, step = PlainLoop(make_loss(0)), TrainStep(make_loss(0))
    for _ in range(2):
        metrics, expected = step(batch), plain(batch.clone())
        for key in LOSSES:
            torch.testing.assert_close(metrics[key], expected[key], check_dtype=False)
    assert step.path.startswith("stacked")
    torch.testing.assert_close(batch["td_error"].shape, batch.shape)
    assert_close(step.losses[0], plain.loss)


@pytest.mark.parametrize(
    ("space", "form"),
    [
        ("one-hot", lambda index: torch.nn.functional.one_hot(index, 2).bool()),
        ("one-hot", lambda index: torch.nn.functional.one_hot(index, 2).float()),
        ("categorical", lambda index: index.int()),
        ("categorical", lambda index: index.unsqueeze(-1)),
    ],
)
def test_choices_are_read_in_every_form_that_a_loss_reads(space: str, form: Callable) -> None:
    def loss() -> DiscreteIQLLoss:
        torch.manual_seed(0)
        choices = OneHot(2) if space == "one-hot" else 2
        sizes = {"hidden_sizes": (16, 16)}
        policy = models.categorical_policy(3, choices, **sizes)
        q = [models.discrete_qvalue_network(3, 2, **sizes) for _ in range(2)]
        return DiscreteIQLLoss(policy, q, models.value_network(3, **sizes), action_space=space)

    batch = transitions(8).set("action", form(torch.arange(8) % 2))
    step, expected = TrainStep(loss()), loss()(batch.clone())
    assert step.path.startswith("stacked")
    found = step(batch)
    for key in LOSSES:
        torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda: [], "at least one loss"),
        (lambda: torch.nn.Linear(2, 2), "LossModules of TorchRL, got Linear"),
        (lambda: [make_loss()] * 2, "twice"),
    ],
)
def test_what_is_no_loss_is_refused(losses: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        TrainStep(losses())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.exclude(("next", "reward")), r"\('next', 'reward'\)"),
        (lambda batch: batch.set("observation", batch["observation"] > 0), "torch.bool"),
        (lambda batch: batch.set("action", torch.rand(8, 3)), r"'action' is \(8, 3\)"),
        (lambda batch: batch.set("priority_weight", torch.rand(8, 2)), "'priority_weight'"),
    ],
)
def test_bad_batches_are_explained(
    change: Callable[[TensorDict], TensorDict], message: str
) -> None:
    step = TrainStep(make_loss(0))
    before = deepcopy(step.losses[0])
    with pytest.raises((KeyError, ValueError), match=message):
        step(change(transitions(8)))
    assert step.steps == 0
    assert equal(step.losses[0], before)


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_a_category_that_there_is_not_is_named(execution: Any) -> None:
    sizes = {"observation_size": 3, "action_size": 2, "hidden_sizes": (16, 16)}
    architecture = Architecture(**sizes, policy="categorical")
    loss = DiscreteIQLLoss(*built(architecture), action_space="categorical")
    step = TrainStep(loss, execution=execution)
    assert step.path.startswith("stacked")
    for category in (2, -1):
        action = torch.tensor([0, 1, 1, category])
        with pytest.raises(ValueError, match=f"'action' holds {category}, .* from 0 to 1"):
            step(transitions(4).set("action", action))


def test_categories_where_one_hot_actions_are_read_have_a_remedy() -> None:
    sizes = {"observation_size": 3, "action_size": 2, "hidden_sizes": (16, 16)}
    architecture = Architecture(**sizes, policy="categorical")
    step = TrainStep(DiscreteIQLLoss(*built(architecture), action_space="one-hot"))
    assert step.path.startswith("stacked")
    with pytest.raises(ValueError, match=r"'action' is \(4,\) .*action_space=\"categorical\""):
        step(transitions(4).set("action", torch.tensor([0, 1, 1, 0])))


def test_minibatches_for_another_number_of_learners_are_refused() -> None:
    step, data = TrainStep(make_loss()), transitions(8)
    with pytest.raises(ValueError, match="2 learners, but there are 1 losses"):
        step.run(Minibatches(data, 4, seeds=[0, 1]), 1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        step.run(Minibatches(data, 4, seeds=[0]), 0)
    with pytest.raises(
        TypeError, match=r"minibatches is a TensorDict, expected .*step\(batch\) takes"
    ):
        step.run(data, 1)  # pyright: ignore


def test_learners_have_networks_of_their_own() -> None:
    """One that is made outside of the loop over the losses would be trained by all of them."""
    networks = models.gaussian_policy(3, 2), models.qvalue_ensemble(3, 2), models.value_network(3)
    losses = [IQLLoss(*networks), IQLLoss(networks[0], *deepcopy(networks[1:]))]
    with pytest.raises(ValueError, match="losses 0 and 1 have the same actor_network_params"):
        TrainStep(losses)
    TrainStep([losses[0], IQLLoss(*deepcopy(networks))])


def test_of_several_learners_it_is_said_whose_state_is_meant() -> None:
    alone, together = TrainStep(make_loss(0)), TrainStep([make_loss(1), make_loss(2)])
    state = alone.state_dict()
    with pytest.raises(
        ValueError, match="2 learners, each with a state of its own: give replica=0"
    ):
        together.state_dict()
    with pytest.raises(
        ValueError, match="2 learners, each with a state of its own: give replica=0"
    ):
        together.load_state_dict(state)
    for replica in (2, -1):
        with pytest.raises(IndexError, match=f"2 learners, replica={replica} is none of them"):
            together.state_dict(replica)
    together.load_state_dict(state, 1)
    assert equal(together.losses[1], alone.losses[0])


def test_learners_go_on_from_the_same_step() -> None:
    """Else the corrections of Adam and the schedules of some would be those of others."""
    alone, together = TrainStep(make_loss(0)), TrainStep([make_loss(1), make_loss(2)])
    alone.run(Minibatches(transitions(50), 8, seeds=[0]), 3)
    minibatches = Minibatches(transitions(50), 8, seeds=[0, 1])
    together.load_state_dict(alone.state_dict(), 1)
    with pytest.raises(ValueError, match=r"the learners have taken \[0, 3\] steps: load states of"):
        together.run(minibatches, 1)
    together.load_state_dict(alone.state_dict(), 0)
    together.run(minibatches, 1)
    assert together.steps == 4


def test_a_coefficient_of_another_shape_is_refused() -> None:
    alone = TrainStep(make_loss(0))
    state = alone.state_dict()
    state["coefficients"] = {**state["coefficients"], "expectile": torch.ones(3)}
    with pytest.raises(ValueError, match=r"expectile has shape \(3,\), expected that of .*, \(\)"):
        alone.load_state_dict(state)


def test_a_cuda_graph_needs_cuda() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device, the losses are on cpu"):
        TrainStep(make_loss(), execution="cudagraph")


# --- On a GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("execution", ["eager", "compiled", "cudagraph"])
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_gpu_trains_as_the_cpu(execution: str, replicas: int, streaming: bool) -> None:
    torch.manual_seed(0)
    data, seeds = transitions(500), range(replicas)
    data = data.apply(lambda x: x.double() if x.is_floating_point() else x)
    on_cpu = TrainStep(
        [make_loss(s).double() for s in seeds], schedule={"actor_network": cosine_decay(200)}
    )
    expected = on_cpu.run(Minibatches(data, 32, seeds=seeds), 137)
    on_gpu = TrainStep(
        [make_loss(s).double().to("cuda") for s in seeds],
        schedule={"actor_network": cosine_decay(200)},
        execution=execution,
    )
    with Minibatches(data, 32, seeds=seeds, device="cuda", streaming=streaming) as minibatches:
        for part in (1, 40, 63, 33):
            metrics = on_gpu.run(minibatches, part)
    for key in expected.keys():
        torch.testing.assert_close(metrics[key].cpu(), expected[key], rtol=1e-6, atol=1e-8)
    means, expected = on_gpu.means().cpu(), on_cpu.means()
    for key in expected.keys():
        torch.testing.assert_close(means[key], expected[key], rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(on_gpu.losses, on_cpu.losses, strict=True):
        assert_close(ours.to("cpu"), theirs, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_wait_for_the_gpu_once_in_a_hundred() -> None:
    minibatches = Minibatches(transitions(500).to("cuda"), 32, device="cuda")
    step = TrainStep(make_loss(0).to("cuda"), execution="cudagraph")
    step.run(minibatches, 100)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.run(minibatches, 500)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) == 500 // nonfinite.STEPS  # whether all is finite, and nothing else
