"""The losses in C++: against the equations of the objectives by autograd, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal, TruncatedNormal

from iql_losses import built
from torchrl_iql import DiscreteIQLLoss, IQLLoss, TrainStep, models
from torchrl_iql.models import Architecture
from torchrl_iql.objectives import functional as iql
from torchrl_iql.training import adam_, native
from torchrl_iql.training.losses import MEANS
from torchrl_iql.training.stacked import StackedProgram

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

B, A, EXPECTILE, TEMPERATURE, DISCOUNT, CLIP = 61, 3, 0.8, 2.0, 0.9, 1.5
LOW, HIGH = torch.tensor([-1.0, -3.0, 0.5]).double(), torch.tensor([1.0, 2.0, 4.0]).double()
LOG_STD = (-6.0, 0.3, 2.0)  # clipped; free; at a bound
STEP_SIZE, EPSILON = 1e-2, 1e-3
POLICIES = ("gaussian", "squashed", "deterministic", "categorical", "one-hot")


def program(kind: str, **settings: Any) -> StackedProgram:
    """Make a learner with such a policy, whose networks are compiled."""
    discrete = kind in ("categorical", "one-hot")
    policy: Any = "categorical" if discrete else kind
    bounds = None if discrete else (LOW.tolist(), HIGH.tolist())
    architecture = Architecture(
        observation_size=3, action_size=A, policy=policy, hidden_sizes=(16,), action_bounds=bounds
    )
    num = settings.pop("num", 2)
    settings = {
        **{"temperature": TEMPERATURE, "expectile": EXPECTILE, "weight_clip": CLIP},
        **{"num_qvalue_nets": num, **settings},
    }
    policy_network, qvalues, value = built(architecture, num=num)
    if kind == "one-hot":
        policy_network = models.categorical_policy(3, models.OneHot(A), hidden_sizes=(16,))
    if discrete:
        space = "one-hot" if kind == "one-hot" else "categorical"
        loss = DiscreteIQLLoss(policy_network, qvalues, value, action_space=space, **settings)
    else:
        loss = IQLLoss(policy_network, qvalues, value, **settings)
    loss.make_value_estimator(gamma=DISCOUNT)
    step = TrainStep(loss.double(), execution="compiled")
    assert "by kernels" in step.path
    (made,) = (each for each, _ in step._programs)
    assert isinstance(made, StackedProgram)
    return made


def minibatches(kind: str, random: torch.Generator, extra: set[str]) -> dict[str, Tensor]:
    """Draw two of them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, B, *shape, generator=random, dtype=torch.float64)

    batches = {"reward": normal(), "terminated": normal() > 1}
    choice = torch.randint(A, (2, B), generator=random)
    batches["action"] = {
        "categorical": choice,
        "one-hot": torch.eye(A, dtype=torch.int64)[choice],
    }.get(kind, LOW + (HIGH - LOW) * torch.rand(2, B, A, generator=random, dtype=torch.float64))
    if "steps" in extra:
        batches["steps_to_next_obs"] = torch.randint(1, 6, (2, B), generator=random)
    if "weight" in extra:
        batches["priority_weight"] = normal().square().float()  # as buffers write them
    if "mask" in extra:
        batches["mask"] = normal() > -1
    return batches


def distribution(kind: str, outputs: Tensor, log_std: Tensor) -> Distribution:
    """Make what the policies of `models` make of their networks' outputs."""
    if kind in ("categorical", "one-hot"):
        return Categorical(logits=outputs)
    deviation = log_std.clamp(-5, 2).exp()
    if kind == "squashed":
        return TanhNormal(outputs, deviation.expand_as(outputs), low=LOW.float(), high=HIGH.float())
    mean = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * outputs.tanh()
    return IndependentNormal(mean, ((HIGH - LOW) / 2 * deviation).expand_as(mean))


def expected(
    kind: str,
    outputs: Tensor,
    log_std: Tensor,
    batch: dict[str, Tensor],
    distance: iql.Distance,
    num: int,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return means, squared TD errors and gradients, by the equations and autograd."""
    leaves = [outputs.clone().requires_grad_(), log_std.clone().requires_grad_()]
    rows, log_std = leaves
    action = batch["action"]
    if kind == "one-hot":
        action = action.argmax(-1)
    if kind == "deterministic":
        mean = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * rows[0, :, :A].tanh()
        log_prob = -(mean - action).square().sum(-1)
    else:
        log_prob = distribution(kind, rows[0, :, :A], log_std).log_prob(action)
    column = action if kind in ("categorical", "one-hot") else torch.zeros(B, dtype=torch.int64)
    q, target_q = (
        rows[first : first + num].gather(-1, column.expand(num, B).unsqueeze(-1)).squeeze(-1)
        for first in (2, 3 + num)
    )
    discount = torch.full((B,), DISCOUNT, dtype=torch.float64) ** batch.get("steps_to_next_obs", 1)
    target = iql.td_target(batch["reward"], rows[2 + num, :, 0], batch["terminated"], discount)
    values = iql.losses(
        iql.Outputs(log_prob, target_q, q, rows[1, :, 0], target),
        expectile=EXPECTILE,
        temperature=TEMPERATURE,
        weight_clip=CLIP,
        distance=distance,
    )
    mask = batch.get("mask", torch.ones(B, dtype=torch.bool))
    means = {}
    for name in MEANS:
        share = mask.double()
        if name.startswith("loss_"):
            share = share * batch.get("priority_weight", torch.ones(B))
        means[name] = (share * values[name])[mask].sum() / share.sum()
    total = means["loss_actor"] + means["loss_qvalue"] + means["loss_value"]
    by_rows, by_log_std = torch.autograd.grad(total, leaves, allow_unused=True)
    by_log_std = torch.zeros(A).double() if by_log_std is None else by_log_std
    return means, values["td_error"], by_rows[: 2 + num], by_log_std


def close(actual: Tensor, desired: Tensor) -> None:
    torch.testing.assert_close(actual, desired, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distance", iql.DISTANCES)
@pytest.mark.parametrize("kind", POLICIES)
def test_gradients_and_means_are_those_of_the_equations(kind: str, distance: Any) -> None:
    random = torch.Generator().manual_seed(0)
    for num in (1, 2, 3):
        made = program(kind, loss_function=distance, num=num)
        networks, losses = made.kernels(B, 2)
        vectors = [x[-1][0, 0, -A:] for x in (made._online, *zip(*made._moments, strict=True))]
        for extra in itertools.chain.from_iterable(
            itertools.combinations(("steps", "weight", "mask"), n) for n in range(4)
        ):
            batches = minibatches(kind, random, set(extra))
            for s, its in enumerate(losses.read(batches)):
                batch = {name: column[s] for name, column in batches.items()}
                networks.outputs.normal_(generator=random)
                networks.outputs[2 + num, batch["terminated"]] = math.nan  # is not read there
                plain = networks.outputs.clone()
                if "mask" in batch:  # is read and does not count; in autograd, 0 * NaN would
                    networks.outputs[0, ~batch["mask"]] = math.nan
                learned = kind in ("gaussian", "squashed")
                if learned:
                    vectors[0].copy_(torch.tensor(LOG_STD))
                    vectors[1].normal_(generator=random)
                    vectors[2].normal_(generator=random).square_()
                before = [x.clone() for x in vectors]
                losses.descend(its, STEP_SIZE, EPSILON)
                means, td_error, by_rows, by_log_std = expected(
                    kind, plain, before[0], batch, distance, num
                )
                close(networks.gradients, by_rows)
                close(its.td_errors, td_error)
                close(its.means, torch.stack(list(means.values())))
                assert 0 < means["clip_fraction"] < 1
                if learned:
                    numbers = torch.tensor([STEP_SIZE, EPSILON], dtype=torch.float64)
                    adam_(before[0], by_log_std, *before[1:], *numbers)
                    for x, y in zip(vectors, before, strict=True):
                        close(x, y)


@pytest.mark.parametrize("kind", POLICIES)
def test_what_is_not_a_number_is_seen_and_stays_in_its_row(kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    batches = minibatches(kind, random, set())
    reads = {0: {0}, 1: {0, 1}, 3: {3}, 6: {0, 1}}  # by each network, who learns from it
    for network, its in itertools.product(reads, (math.nan, math.inf)):
        networks, losses = program(kind).kernels(B, 2)
        (batch, _) = losses.read(batches)
        networks.outputs.normal_(generator=random)
        networks.outputs[network, 5] = its
        losses.descend(batch, STEP_SIZE, EPSILON)
        if math.isnan(its):
            assert not batch.means[:3].isfinite().all()
            seen = networks.gradients.isnan().any(-1)
            assert set(seen[:, 5].nonzero().flatten().tolist()) == reads[network]
        bad = ~networks.gradients.isfinite()
        assert not bad[:, :5].any() and not bad[:, 6:].any()


def test_a_choice_that_is_none_is_refused() -> None:
    made = program("categorical")
    _, losses = made.kernels(B, 2)
    batches = minibatches("categorical", torch.Generator(), set())
    for choice in (-1, A):
        batches["action"][1, 3] = choice
        with pytest.raises(ValueError, match=f"'action' holds {choice}, expected .* 0 to {A - 1}"):
            losses.read(batches)


def test_a_policy_that_is_another_is_not_taken_for_one_of_these() -> None:
    torso = models.gaussian_policy(3, A)[0].module

    def policy(kind: type, **settings: Any) -> ProbabilisticActor:
        module = TensorDictModule(torso, in_keys=["observation"], out_keys=["loc", "scale"])
        return ProbabilisticActor(
            module, ["loc", "scale"], distribution_class=kind, distribution_kwargs=settings
        )

    for kind, settings, known in (
        (IndependentNormal, {}, True),
        (IndependentNormal, {"tanh_loc": True}, False),
        (TanhNormal, {"low": LOW.float(), "high": HIGH.float()}, True),
        (TanhNormal, {"tanh_loc": True}, False),
        (TruncatedNormal, {}, False),
    ):
        loss = IQLLoss(
            policy(kind, **settings), models.qvalue_ensemble(3, A), models.value_network(3)
        )
        step = TrainStep(loss, execution="compiled")
        assert step.path.startswith("stacked"), step.path
        assert ("by kernels" in step.path) == known, (kind, settings)
