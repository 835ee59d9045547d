"""Losses of recurrent networks, beside TorchRL's; and networks that vmap can not evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.testing import assert_close
from torchrl.modules import (
    GRUModule,
    LSTMModule,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
)

from iql_losses import (
    ACT,
    CHOICES,
    OBS,
    Concatenate,
    assert_entries,
    gradients,
    iql_loss,
    networks,
    torchrl_loss,
    transitions,
)

STATES = {LSTMModule: ["h", "c"], GRUModule: ["h"]}
WIDTH = 5
ROWS, TIME = 3, 6

pytestmark = pytest.mark.usefixtures("seed")


def recurrent(module: type, **kwargs: Any) -> LSTMModule | GRUModule:
    return module(
        input_size=OBS,
        hidden_size=WIDTH,
        in_keys=["observation", *STATES[module]],
        out_keys=["embedding", *(("next", key) for key in STATES[module])],
        **{"python_based": True} | kwargs,
    )


def recurrent_networks(kind: str, module: type, *, shared: bool = False, **kwargs: Any) -> dict:
    """Make a policy, two Q networks and V, each of a recurrent one and a head, or all of the same one."""
    first = recurrent(module, **kwargs)

    def over_time(head: nn.Module, keys: list[str], *written: str) -> TensorDictSequential:
        trunk = first if shared else recurrent(module, **kwargs)
        return TensorDictSequential(
            trunk, TensorDictModule(head, ["embedding", *keys], list(written))
        )

    if kind == "continuous":
        head = nn.Sequential(nn.Linear(WIDTH, 2 * ACT), NormalParamExtractor())
        parameters, distribution = ["loc", "scale"], TanhNormal
        q = [over_time(Concatenate(WIDTH, ACT), ["action"], "state_action_value") for _ in range(2)]
    else:
        head, parameters = nn.Linear(WIDTH, CHOICES), ["logits"]
        distribution = OneHotCategorical
        q = [over_time(nn.Linear(WIDTH, CHOICES), [], "state_action_value") for _ in range(2)]
    return {
        "actor_network": ProbabilisticActor(
            over_time(head, [], *parameters), in_keys=parameters, distribution_class=distribution
        ),
        "qvalue_network": q,
        "value_network": over_time(nn.Linear(WIDTH, 1), [], "state_value"),
    }


def sequences(kind: str, states: Sequence[str] = ()) -> TensorDict:
    """Make one trajectory per row, with recurrent states if they are named."""
    td = transitions(kind, (ROWS, TIME))
    td["is_init"] = torch.zeros(ROWS, TIME, 1, dtype=torch.bool)
    td["is_init"][:, 0] = True
    td["next", "is_init"] = torch.zeros_like(td["is_init"])  # as InitTracker writes it
    for key in states:
        td[key], td["next", key] = torch.randn(2, ROWS, TIME, 1, WIDTH)
    return td


@pytest.mark.parametrize("kind", ["continuous", "one-hot"])
@pytest.mark.parametrize("module", STATES)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("with_states", [False, True], ids=["without states", "with states"])
def test_losses_and_gradients_are_torchrls(kind, module, shared, with_states):
    """Recurrent states are optional, in all networks and under ``"next"``."""
    nets = recurrent_networks(kind, module, shared=shared)
    td = sequences(kind, STATES[module] if with_states else ())
    ours, theirs = iql_loss(kind, deepcopy(nets)), torchrl_loss(kind, deepcopy(nets))
    # One by one: in TorchRL's forward, the policy writes its states over the recorded ones.
    expected = {
        f"loss_{name}": getattr(theirs, f"{name}_loss")(td.clone())[0]
        for name in ("actor", "qvalue", "value")
    }
    assert_entries(ours(td.clone()), expected, rtol=1e-5, atol=1e-6)
    sum(expected.values()).backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert their_gradients.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in gradients(ours, td).items():
        assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("module", STATES)
@pytest.mark.parametrize("with_states", [False, True], ids=["without states", "with states"])
def test_trajectories_in_one_row_count_as_in_rows_of_their_own(module, with_states):
    """Also for V(s'), whose states no environment marks as the first of a trajectory."""
    nets = recurrent_networks("continuous", module)
    td = sequences("continuous", STATES[module] if with_states else ())
    loss = iql_loss(nets=nets)
    row = td.reshape(1, ROWS * TIME)
    expected = loss(td.clone())
    assert_entries(loss(row.clone()), expected)
    assert_entries(loss(row.exclude(("next", "is_init"))), expected)
    theirs = torchrl_loss("continuous", nets)(row)["loss_qvalue"]
    # TorchRL's goes on from the trajectory before.
    assert not torch.isclose(theirs, expected["loss_qvalue"], rtol=1e-4)


class Optional(nn.Module):
    """Takes a second input, or none."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(OBS, outputs)

    def forward(self, observation: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.linear(observation) * (1 if scale is None else scale)


def test_any_input_that_a_network_can_do_without_is_optional():
    def optional(outputs: int, key: str) -> TensorDictModule:
        return TensorDictModule(Optional(outputs), ["observation", "scale"], [key])

    nets = networks("one-hot") | {
        "actor_network": ProbabilisticActor(
            optional(CHOICES, "logits"), in_keys=["logits"], distribution_class=OneHotCategorical
        ),
        "qvalue_network": [optional(CHOICES, "state_action_value") for _ in range(2)],
        "value_network": optional(1, "state_value"),
    }
    td = transitions("one-hot")
    loss, theirs = iql_loss("one-hot", nets), torchrl_loss("one-hot", nets)
    for scale in (None, 2.0):
        if scale is not None:
            td["scale"] = td["next", "scale"] = torch.full((*td.shape, 1), scale)
        assert_entries(loss(td.clone()), theirs(td.clone()))


@pytest.mark.parametrize("key", ["observation", "is_init", ("next", "observation")], ids=str)
@pytest.mark.parametrize("method", ["forward", "qvalue_loss", "value_loss"])
def test_an_input_that_a_recurrent_network_needs_is_named(key, method):
    if key == ("next", "observation") and method == "value_loss":
        return
    loss = iql_loss(nets=recurrent_networks("continuous", LSTMModule))
    with pytest.raises(KeyError) as error:
        getattr(loss, method)(sequences("continuous").exclude(key))
    assert repr(key) in error.value.args[0].split(", and the batch holds")[0]


# --- vmap -------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(OBS + ACT, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        q = self.linear(torch.cat([observation, action], -1))
        return q.tanh() if q.mean() > 0 else q


class Counts(Branches):
    """Writes to a tensor that is none of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        q = self.linear(torch.cat([observation, action], -1))
        self.total.add_(q.detach().mean())
        return q


class Draws(Branches):
    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        observation = nn.functional.dropout(observation, 0.5)
        return self.linear(torch.cat([observation, action], -1))


@pytest.mark.parametrize("critic", [Branches, Counts, Draws, LSTMModule, GRUModule])
def test_what_vmap_can_not_evaluate_is_told_so(critic):
    """The remedy is one."""
    if critic in STATES:
        nets = recurrent_networks("continuous", critic, python_based=False)
        td = sequences("continuous")
    else:
        nets, td = networks(), transitions()
        nets["qvalue_network"] = [
            TensorDictModule(critic(), ["observation", "action"], ["state_action_value"])
            for _ in range(2)
        ]
    with pytest.raises(RuntimeError, match=r"qvalue_network.*deactivate_vmap=True"):
        iql_loss(nets=deepcopy(nets))(td.clone())
    loss = iql_loss(nets=nets, deactivate_vmap=True)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, td).values())


def test_what_vmap_has_no_part_in_is_told_as_it_is():
    nets = networks()
    nets["qvalue_network"] = [
        TensorDictModule(
            Concatenate(OBS, ACT + 1), ["observation", "action"], ["state_action_value"]
        )
        for _ in range(2)
    ]
    with pytest.raises(RuntimeError) as error:
        iql_loss(nets=nets)(transitions())
    assert "deactivate_vmap" not in str(error.value)
