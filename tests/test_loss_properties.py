"""What holds for the losses whatever the batch, the sizes, the dtype and the keys are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.testing import assert_close

from iql_losses import (
    KINDS,
    Sizes,
    assert_entries,
    cast,
    iql_loss,
    mean_by_hand,
    networks,
    perturb,
    renamed,
    transitions,
)
from torchrl_iql import IQLLoss
from torchrl_iql.objectives import functional as iql

quick = settings(max_examples=20, derandomize=True, deadline=None, database=None)
thorough = settings(quick, max_examples=200)
DTYPES = torch.float64, torch.float32, torch.bfloat16
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 5e-2}
OWNERS = "actor", "qvalue", "value"
NAMES = "observation", "action", "state_action_value", "value", "reward", "done", "terminated"


class Case:
    """A loss and a batch for it.

    Attributes:
        description: what was drawn.
        loss: the loss.
        td: the batch.
        dtype: of networks and batch.
        plain: networks and batch under the default keys.
        make: how loss and batch were made of them, to be done again.
    """

    def __init__(
        self,
        description: str,
        dtype: torch.dtype,
        plain: tuple[dict, TensorDict],
        make: Callable[..., tuple[IQLLoss, TensorDict]],
    ) -> None:
        self.description = description
        self.dtype = dtype
        self.plain = plain
        self.make = make
        self.loss, self.td = make(*plain)

    def __repr__(self) -> str:
        return self.description

    def close(self, found: Any, expected: Any) -> None:
        tolerance = TOLERANCE[self.dtype]
        assert_entries(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, NestedKey]:
    """Draw other keys for some entries: renamed, nested, or nested twice."""
    forms = None, lambda name: f"my_{name}", lambda name: ("a", name), lambda name: ("a", "b", name)
    drawn = {name: draw(st.sampled_from(forms)) for name in NAMES}
    return {name: form(name) for name, form in drawn.items() if form is not None}


@st.composite
def cases(draw: st.DrawFn, **kwargs: Any) -> Case:
    """Draw the kind of actions, sizes, dtype, keys and all numbers."""
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    batch = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    sizes = Sizes(
        observation=draw(st.integers(1, 4)),
        action=draw(st.integers(1, 3)),
        choices=draw(st.integers(2, 5)),
        hidden=tuple(draw(st.lists(st.integers(1, 9), max_size=2))),
    )
    keys = draw(layouts())
    num, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**32 - 1))
    torch.manual_seed(seed)
    nets = networks(kind, num, sizes=sizes)
    for network in (nets["actor_network"], nets["value_network"], *nets["qvalue_network"]):
        perturb(network.parameters())
        network.to(dtype)
    td = cast(transitions(kind, batch, sizes), dtype)

    def make(nets: dict, td: TensorDict, **settings_: Any) -> tuple[IQLLoss, TensorDict]:
        nets, td = renamed(kind, nets, td, keys)
        loss = iql_loss(kind, nets, **kwargs | settings_)
        loss.set_keys(**{name: key for name, key in keys.items() if name != "observation"})
        return loss, td

    drawn = f"{kind}, {num} Q networks, {dtype}, {batch}, {sizes}, {keys}, seed {seed}"
    return Case(drawn, dtype, (nets, td), make)


def flat(td: TensorDict) -> TensorDict:
    return td.reshape(-1)


def gradient(value: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))


def trained(loss: IQLLoss, owner: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a network, by their names in the loss."""
    prefix = f"{owner}_network_params."
    return {name: p for name, p in loss.named_parameters() if name.startswith(prefix)}


# --- Values ------------------------------------------------------------------------------------------


@quick
@given(cases())
def test_are_the_papers_in_every_dtype_and_under_every_key(case: Case) -> None:
    """The reference calls the networks, in float64, as ordinary modules under the default keys."""
    nets, td = copy.deepcopy(case.plain)
    for network in (nets["actor_network"], nets["value_network"], *nets["qvalue_network"]):
        network.double()
    out = case.loss(case.td)
    assert {value.dtype for value in out.values()} == {
        torch.promote_types(case.dtype, torch.float32)
    }
    expected = mean_by_hand(nets, cast(td, torch.float64))
    if case.dtype is torch.bfloat16:
        del expected["clip_fraction"]  # rounding moves a weight over the clip
    case.close(out, expected)


def of_numpy(
    outputs: iql.Outputs, expectile: float, temperature: float, weight_clip: float, distance: str
) -> dict[str, np.ndarray]:
    """Compute the equations in float64."""
    log_prob, target_q, q, v, target = (x.double().numpy() for x in outputs)
    u = target_q.min(0) - v
    weight = np.minimum(np.exp(temperature * u), weight_clip)
    error = np.abs(q - target)
    distances = {
        "l2": error**2,
        "l1": error,
        "smooth_l1": np.where(error < 1, error**2 / 2, error - 0.5),
    }
    return {
        "loss_actor": -weight * log_prob,
        "loss_qvalue": distances[distance].sum(0),
        "loss_value": np.abs(expectile - (u < 0)) * u**2,
        "td_error": (error**2).max(0),
        "advantage": u,
        "value": v,
        "qvalue": q.mean(0),
        "entropy": -log_prob,
    }


@thorough
@given(
    dtype=st.sampled_from(DTYPES[:2]),
    shape=st.lists(st.integers(1, 4), max_size=3),
    nets=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    expectile=st.floats(0.01, 1.0),
    temperature=st.floats(0.0, 10.0),
    weight_clip=st.floats(0.1, 1000.0),
    distance=st.sampled_from(iql.DISTANCES),
)
def test_equations_are_numpys(
    dtype: torch.dtype, shape: list[int], nets: int, seed: int, **hyperparameters: Any
) -> None:
    torch.manual_seed(seed)
    sizes = shape, [nets, *shape], [nets, *shape], shape, shape
    outputs = iql.Outputs(*(torch.randn(size, dtype=dtype) for size in sizes))
    expected = of_numpy(outputs, **hyperparameters)
    found = iql.losses(outputs, **hyperparameters)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    for name, value in expected.items():
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


# --- The batch ---------------------------------------------------------------------------------------


@quick
@given(case=cases(), data=st.data())
def test_the_order_and_the_shape_of_the_batch_do_not_matter(
    case: Case, data: st.DataObject
) -> None:
    whole, td = case.loss(case.td), flat(case.td)
    order = torch.tensor(data.draw(st.permutations(range(len(td)))))
    case.close(case.loss(td[order]), whole)
    case.close(case.loss(td), whole)
    key = case.loss.tensor_keys.priority
    tolerance = TOLERANCE[case.dtype]
    moved = td[order].copy()
    case.loss(moved)
    assert_close(moved[key], td[key][order], rtol=tolerance, atol=tolerance)


@quick
@given(case=cases(), share=st.floats(0, 1))
def test_a_loss_is_the_mean_over_the_parts_of_its_batch(case: Case, share: float) -> None:
    td = flat(case.td)
    td = torch.cat([td, td]) if len(td) == 1 else td
    first = min(max(1, round(share * len(td))), len(td) - 1)
    parts = [case.loss(part) for part in td.split([first, len(td) - first])]
    weights = first / len(td), 1 - first / len(td)
    joined = {
        key: sum(w * part[key] for w, part in zip(weights, parts, strict=True))
        for key in parts[0].keys()
    }
    case.close(case.loss(td), joined)


# --- Hyper-parameters ----------------------------------------------------------------------------------


@thorough
@given(
    targets=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12),
    expectiles=st.lists(st.floats(0.02, 0.98), min_size=2, max_size=5),
)
def test_v_is_the_expectile_of_its_targets(targets: list[float], expectiles: list[float]) -> None:
    """Its loss is least at SciPy's expectile, which rises with tau."""
    q = torch.tensor([targets], dtype=torch.float64)
    found = []
    for expectile in sorted(expectiles):
        v = torch.tensor(scipy.stats.expectile(np.array(targets), expectile)).requires_grad_()
        loss = iql.value_loss(q, v.expand(len(targets)), expectile).mean()
        (slope,) = torch.autograd.grad(loss, v)
        assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-6)
        found.append(v.item())
    assert (np.diff(found) >= -1e-6).all()


@quick
@given(case=cases(), low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_a_higher_expectile_pulls_v_up(case: Case, low: float, high: float) -> None:
    (bias,) = list(trained(case.loss, "value").items())[-1:]
    assert bias[0].endswith("bias")
    slopes = []
    for expectile in sorted((low, high)):
        case.loss.expectile = expectile
        slopes += gradient(case.loss(case.td)["loss_value"], [bias[1]])
    tolerance = TOLERANCE[case.dtype]
    assert slopes[1] <= slopes[0] + tolerance * slopes[0].abs()


def scaled(nets: Mapping[str, Any], scale: float) -> dict:
    """Return networks whose values are ``scale`` times those given."""
    nets = copy.deepcopy(dict(nets))
    for network in (nets["value_network"], *nets["qvalue_network"]):
        head = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        head.weight.data.mul_(scale)
        head.bias.data.mul_(scale)
    return nets


@quick
@given(case=cases(), power=st.integers(-6, 6), distance=st.sampled_from(["l2", "l1"]))
def test_the_unit_of_the_reward_does_not_matter_to_the_policy(
    case: Case, power: int, distance: str
) -> None:
    """Scaled by a power of 2, losses and gradients follow to the last bit, and the policy's stay."""
    scale = 2.0**power
    nets, td = case.plain
    loss, td_ = case.make(nets, td, loss_function=distance)
    rewarded = td.clone()
    rewarded["next", "reward"] *= scale
    other, rewarded = case.make(
        scaled(nets, scale), rewarded, loss_function=distance, temperature=3.0 / scale
    )
    before, after = loss(td_), other(rewarded)
    degree = {"l2": 2, "l1": 1}[distance]
    factors = {
        "loss_actor": 1,
        "loss_qvalue": scale**degree,
        "loss_value": scale**2,
        "entropy": 1,
        "advantage": scale,
        "value": scale,
        "qvalue": scale,
        "clip_fraction": 1,
    }
    assert_entries(after, {key: before[key] * f for key, f in factors.items()}, rtol=0, atol=0)
    gradients = [
        gradient(out["loss_actor"], list(trained(its, "actor").values()))
        for its, out in ((loss, before), (other, after))
    ]
    assert_close(*gradients, rtol=0, atol=0)


# --- Gradients ---------------------------------------------------------------------------------------


@quick
@given(case=cases(), owner=st.sampled_from(OWNERS))
def test_a_loss_reaches_its_own_network_only(case: Case, owner: str) -> None:
    """By forward and by its own method; no target and nothing of the batch takes part."""
    loss, td = case.loss, case.td
    reward = td["next"].get(loss.tensor_keys.reward).requires_grad_()
    parameters = dict(loss.named_parameters())
    own = trained(loss, owner)
    assert own
    for value in (
        loss(td.copy())[f"loss_{owner}"],
        getattr(loss, f"{owner}_loss")(td.copy())[0],
    ):
        found = dict(zip(parameters, gradient(value, list(parameters.values())), strict=True))
        assert {name for name, its in found.items() if its is not None} == set(own)
        assert gradient(value, [reward]) == [None]
    targets = [p for name, p in loss.named_buffers() if name.startswith("target_")]
    assert targets
    assert not any(p.requires_grad for p in targets)
    assert not [name for name in parameters if name.startswith("target_")]
