"""Two processes under DistributedDataParallel compute what one does with the whole batch."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torch.testing import assert_close
from torchrl.envs import CatTensors
from torchrl.modules import IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import SoftUpdate

from iql_losses import (
    ACT,
    CHOICES,
    OBS,
    cast,
    gradients,
    iql_loss,
    networks,
    total,
    transitions,
)
from torchrl_iql import IQLLoss

CASES = [
    f"{kind}, {nets}" for kind in ("continuous", "categorical") for nets in ("models", "plain")
]
STEPS, BATCH, UNITS, SECONDS = 5, 16, 16, 120
EXACT = {"rtol": 1e-12, "atol": 1e-12}

SCRIPT = """
import os, pickle, signal, sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchrl.objectives import SoftUpdate

signal.alarm(int(sys.argv[1]))  # a process that hangs ends itself
dist.init_process_group("gloo")
rank = dist.get_rank()
with open("cases.pickle", "rb") as file:
    cases = pickle.load(file)

found = {"pid": os.getpid()}
for name, (loss, batches) in cases.items():
    for tensor in loss.state_dict().values():
        tensor.add_(rank)  # all but the first process start from networks that are wrong
    target = SoftUpdate(loss, tau=0.1)
    model = DistributedDataParallel(loss)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    gradients, priorities = [], []
    for batch in batches:
        batch = batch.chunk(dist.get_world_size())[rank]
        losses = model(batch)
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        gradients.append({key: p.grad.clone() for key, p in loss.named_parameters()})
        priorities.append(batch["td_error"])
        optimizer.step()
        target.step()
    found[name] = gradients, priorities, loss.state_dict()
torch.save(found, f"{rank}.pt")
dist.destroy_process_group()
"""

Found = tuple[list[dict], list[torch.Tensor], dict]

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


def plain_networks(kind: str) -> dict:
    """Make sequences of layers, of which the loss makes an ensemble that it maps over."""

    def layers(inputs: int, outputs: int, *more: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, UNITS), nn.Tanh(), nn.Linear(UNITS, outputs), *more)

    if kind == "continuous":
        policy, parameters = layers(OBS, 2 * ACT, NormalParamExtractor()), ["loc", "scale"]
        joined = CatTensors(["observation", "action"], out_key="pair", del_keys=False)
        values = TensorDictModule(layers(OBS + ACT, 1), ["pair"], ["state_action_value"])
        qvalue, distribution = TensorDictSequential(joined, values), IndependentNormal
    else:
        policy, parameters = layers(OBS, CHOICES), ["logits"]
        qvalue = TensorDictModule(layers(OBS, CHOICES), ["observation"], ["state_action_value"])
        distribution = torch.distributions.Categorical
    policy = TensorDictModule(policy, ["observation"], parameters)
    return {
        "actor_network": ProbabilisticActor(
            policy, in_keys=parameters, distribution_class=distribution
        ),
        "qvalue_network": qvalue,
        "value_network": ValueOperator(layers(OBS, 1), in_keys=["observation"]),
    }


def make_case(name: str) -> tuple[IQLLoss, TensorDict]:
    """Make a loss in double precision and a batch for each step."""
    kind, nets = name.split(", ")
    torch.manual_seed(CASES.index(name))
    loss = iql_loss(kind, networks(kind) if nets == "models" else plain_networks(kind)).double()
    return loss, cast(transitions(kind, (STEPS, BATCH)), torch.float64)


def train_alone(loss: IQLLoss, batches: TensorDict) -> Found:
    """Do what the script does, in one process with the whole of each batch."""
    loss = copy.deepcopy(loss)
    target = SoftUpdate(loss, tau=0.1)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    found, priorities = [], []
    for batch in batches.unbind(0):
        optimizer.zero_grad()
        total(loss(batch)).backward()
        found.append({name: parameter.grad.clone() for name, parameter in loss.named_parameters()})
        priorities.append(batch["td_error"])
        optimizer.step()
        target.step()
    return found, priorities, loss.state_dict()


def torchrun(script: Path, processes: int) -> str:
    """Run a script as a user would, and end what is still there after a while."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*command, f"--nproc-per-node={processes}", script.name, str(SECONDS)],
        cwd=script.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.terminate()  # it ends its workers, which a kill would leave behind
        process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[IQLLoss, TensorDict]]:
    return {name: make_case(name) for name in CASES}


@pytest.fixture(scope="module")
def ranks(cases: dict, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return what each of two processes found."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    (folder / "script.py").write_text(SCRIPT)
    torchrun(folder / "script.py", 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_those_of_the_whole_batch(name: str, cases: dict, ranks: list) -> None:
    """In every process, though each has seen one half; a half alone has other gradients."""
    loss, batches = cases[name]
    expected, _, _ = train_alone(loss, batches.clone())
    for rank, half in zip(ranks, batches[0].chunk(2), strict=True):
        found, _, _ = rank[name]
        for step in range(STEPS):
            assert found[step].keys() == expected[step].keys()
            for key, gradient in expected[step].items():
                assert_close(found[step][key], gradient, **EXACT, msg=lambda m, k=key: f"{k}: {m}")
                assert gradient.abs().max() > 1e-6, key
        of_half = gradients(copy.deepcopy(loss), half)
        for key, gradient in expected[0].items():
            assert (of_half[key] - gradient).abs().max() > 1e-6, key


@pytest.mark.parametrize("name", CASES)
def test_training_leaves_the_same_networks_in_every_process(
    name: str, cases: dict, ranks: list
) -> None:
    """Networks, targets and coefficients, bit for bit; they are those of one process."""
    loss, batches = cases[name]
    _, _, expected = train_alone(loss, batches.clone())
    first, second = (rank[name][2] for rank in ranks)
    assert first.keys() == second.keys() == expected.keys()
    moved = [key for key, value in loss.state_dict().items() if (expected[key] != value).any()]
    assert {key.split(".")[0] for key in moved} == {
        "actor_network_params",
        "qvalue_network_params",
        "target_qvalue_network_params",
        "value_network_params",
    }
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        assert_close(first[key], value, **EXACT, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_each_process_writes_the_priorities_of_its_transitions(
    name: str, cases: dict, ranks: list
) -> None:
    """The batch that is passed to the wrapper is the one that receives them."""
    loss, batches = cases[name]
    _, expected, _ = train_alone(loss, batches.clone())
    halves = [torch.stack(rank[name][1]) for rank in ranks]
    assert_close(torch.cat(halves, 1), torch.stack(expected), **EXACT)


def test_no_process_is_left(ranks: list) -> None:
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank["pid"], 0)
