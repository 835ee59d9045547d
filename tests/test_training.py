"""The training step: its parts, its schedule, and that nothing is lost between two sessions."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import ValueOperator
from torchrl.objectives import BCLoss, SoftUpdate

from torchrl_iql import DiscreteIQLLoss, IQLLoss, TrainStep, models
from torchrl_iql.models import Architecture


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


def make_loss(**settings) -> IQLLoss:
    sizes = {"hidden_sizes": (16, 16)}
    return IQLLoss(
        models.gaussian_policy(3, 2, **sizes),
        models.qvalue_ensemble(3, 2, **sizes),
        models.value_network(3, **sizes),
        **settings,
    )


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_equals_the_plain_composition_of_the_public_pieces() -> None:
    torch.manual_seed(0)
    loss, batches = make_loss(), [transitions(32) for _ in range(5)]
    plain = make_loss()
    plain.load_state_dict(loss.state_dict())
    target = SoftUpdate(plain, tau=0.1)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    step = TrainStep(loss, learning_rate=1e-2, target_rate=0.1)
    for batch in batches:
        metrics = step(batch)
        losses = plain(batch)
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        target.step()
        for key in losses.keys():
            torch.testing.assert_close(metrics[key], losses[key].detach(), rtol=1e-5, atol=1e-6)
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert step.steps == 5
    assert not any(value.requires_grad for value in metrics.values())


def test_the_policys_learning_rate_follows_a_cosine_to_zero_and_stays_there() -> None:
    step = TrainStep(make_loss(), learning_rate=0.1, actor_decay_steps=4)
    rates = []
    for _ in range(6):
        rates.append(step.policy_lr)
        step(transitions(8))
    cosine = [0.05 * (1 + math.cos(math.pi * min(t / 4, 1))) for t in range(6)]
    assert rates == pytest.approx(cosine)
    assert step.optimizer.param_groups[1]["lr"] == 0.1  # Q and V


def test_a_restored_step_continues_as_if_nothing_had_happened() -> None:
    torch.manual_seed(0)
    batches = [transitions(32) for _ in range(6)]
    uninterrupted = TrainStep(make_loss(), actor_decay_steps=6)
    restored = TrainStep(make_loss(), actor_decay_steps=6)
    for batch in batches[:3]:
        uninterrupted(batch)
    restored.load_state_dict(deepcopy(uninterrupted.state_dict()))
    for batch in batches[3:]:
        uninterrupted(batch)
        restored(batch)
    assert restored.steps == 6
    assert restored.policy_lr == uninterrupted.policy_lr
    assert equal(restored.loss, uninterrupted.loss)


def test_temperature_zero_is_torchrls_behaviour_cloning() -> None:
    torch.manual_seed(0)
    loss = make_loss(temperature=0.0)
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


@pytest.mark.parametrize("kind", ["gaussian", "squashed", "deterministic", "categorical"])
def test_the_direct_evaluation_equals_the_loss_to_the_last_bit(kind: str) -> None:
    torch.manual_seed(0)
    architecture = Architecture(
        observation_size=3,
        action_size=2,
        policy=kind,
        hidden_sizes=(16, 16),
        normalize_observation=True,
    )
    networks = architecture.build((torch.ones(3), torch.full((3,), 2.0)))
    settings = {"action_space": "categorical"} if architecture.discrete else {}
    loss = (DiscreteIQLLoss if architecture.discrete else IQLLoss)(*networks, **settings)
    step = TrainStep(loss)
    assert step._direct is not None
    for _ in range(3):  # the networks are those of the loss, also after a step
        batch = transitions(32)
        if architecture.discrete:
            batch["action"] = torch.randint(2, (32,))
        batch["steps_to_next_obs"] = torch.randint(1, 4, (32, 1))
        batch["priority_weight"] = torch.rand(32)
        direct, plain = step._direct(batch), loss(batch)
        assert set(direct.keys()) == set(plain.keys())
        assert all(torch.equal(direct[key], plain[key]) for key in plain.keys())
        step(batch)


def test_the_direct_evaluation_is_float32_under_autocast_too() -> None:
    torch.manual_seed(0)
    step, batch = TrainStep(make_loss()), transitions(32)
    assert step._direct is not None
    with torch.autocast("cpu", torch.bfloat16):
        direct, plain = step._direct(batch), step.loss(batch)
    assert all(torch.equal(direct[key], plain[key]) for key in plain.keys())
    assert {value.dtype for value in direct.values()} == {torch.float32}


def test_other_networks_and_keys_are_evaluated_by_the_loss() -> None:
    renamed = make_loss()
    renamed.set_keys(reward="cost")
    single = IQLLoss(
        models.gaussian_policy(3, 2),
        models.qvalue_network(3, 2),
        models.value_network(3),
        num_qvalue_nets=1,
    )
    own = IQLLoss(
        models.gaussian_policy(3, 2),
        models.qvalue_ensemble(3, 2),
        ValueOperator(torch.nn.Linear(3, 1), in_keys=["observation"]),
    )
    for loss in (renamed, single, own):
        assert TrainStep(loss)._direct is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("target_rate", 0.0),
        ("target_rate", 1.5),
        ("actor_decay_steps", 0),
    ],
)
def test_bad_settings_are_named(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}.*{value}"):
        TrainStep(make_loss(), **{setting: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu_equals_one_on_the_cpu() -> None:
    torch.manual_seed(0)
    loss, batch = make_loss().double(), transitions(32)
    batch = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    on_gpu = make_loss().double()
    on_gpu.load_state_dict(loss.state_dict())
    metrics = TrainStep(loss)(batch)
    metrics_gpu = TrainStep(on_gpu.to("cuda"))(batch.to("cuda"))
    for key, value in metrics.items():
        torch.testing.assert_close(metrics_gpu[key].cpu(), value, rtol=1e-8, atol=1e-10)
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), value, rtol=1e-8, atol=1e-10)
