"""Checkpoints: complete, whole or absent, and readable without the run that wrote them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from iql_losses import built
from test_training import transitions
from torchrl_iql import DiscreteIQLLoss, IQLLoss, TrainStep, checkpoint, load_policy
from torchrl_iql.models import Architecture
from torchrl_iql.training import cosine_decay

ARCHITECTURE = Architecture(
    observation_size=3,
    action_size=2,
    action_bounds=([-1.0, -2.0], [1.0, 0.5]),
    hidden_sizes=(8, 8),
    dropout=0.1,
    normalize_observation=True,
)
STATISTICS = (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0]))


def learner(architecture: Architecture = ARCHITECTURE) -> TrainStep:
    networks = built(architecture, STATISTICS)
    if architecture.discrete:
        return TrainStep(DiscreteIQLLoss(*networks, action_space="categorical"))
    return TrainStep(IQLLoss(*networks), schedule={"actor_network": cosine_decay(10)})


@pytest.mark.parametrize("kind", ["gaussian", "squashed", "deterministic", "categorical"])
def test_the_policy_loads_from_the_file_alone(kind: str, tmp_path: Path) -> None:
    discrete = kind == "categorical"
    architecture = Architecture(
        observation_size=3,
        action_size=2,
        action_bounds=None if discrete else ARCHITECTURE.action_bounds,
        policy=kind,
        normalize_observation=True,
    )
    source = learner(architecture)
    path = checkpoint.save(tmp_path / "a.ckpt", source, architecture)
    policy = load_policy(path)
    trained = source.losses[0].get_stateful_net("actor_network").eval()
    observation = torch.randn(5, 3)
    batch = transitions(5).set("observation", observation)
    assert not policy.training
    expected = trained(batch.copy())["action"]
    torch.testing.assert_close(policy(batch.copy())["action"], expected, rtol=1e-6, atol=1e-6)


def test_training_and_random_numbers_continue_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = learner()
    for _ in range(3):
        first(transitions(16))
    path = checkpoint.save(tmp_path / "a.ckpt", first, ARCHITECTURE, best={"score": 1.5})
    expected = [first(transitions(16)) for _ in range(3)]  # dropout and data draw random numbers
    drawn = np.random.rand()

    torch.manual_seed(123)
    second = learner()
    assert checkpoint.load_learner(path, second)["best"] == {"score": 1.5}
    assert second.steps == 3
    for metrics in expected:
        again = second(transitions(16))
        assert all(torch.equal(metrics[key], again[key]) for key in metrics.keys())
    for name, value in first.losses[0].state_dict().items():
        assert torch.equal(value, second.losses[0].state_dict()[name]), name
    assert np.random.rand() == drawn


def test_the_target_networks_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    source = learner()
    for _ in range(3):
        source(transitions(16))
    source.losses[0].target_qvalue_network_params.data.mul_(2.0)  # far from the online networks
    path = checkpoint.save(tmp_path / "a.ckpt", source, ARCHITECTURE)
    restored = learner()
    checkpoint.load_learner(path, restored)
    for ours, theirs in zip(
        restored.losses[0].target_qvalue_network_params.values(True, True),
        source.losses[0].target_qvalue_network_params.values(True, True),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_holds_one_replica_and_no_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    together = TrainStep([IQLLoss(*built(ARCHITECTURE, STATISTICS)) for _ in range(20)])
    together(torch.stack([transitions(16) for _ in range(20)]))
    path = checkpoint.save(tmp_path / "a.ckpt", together, ARCHITECTURE, replica=7)
    alone = learner()
    checkpoint.load_learner(path, alone)
    for name, value in together.losses[7].state_dict().items():
        assert torch.equal(value, alone.losses[0].state_dict()[name]), name
    single = checkpoint.save(tmp_path / "b.ckpt", alone, ARCHITECTURE)
    assert path.stat().st_size == pytest.approx(single.stat().st_size, rel=0.01)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = learner()
    path = checkpoint.save(tmp_path / "a.ckpt", source, ARCHITECTURE)
    before = path.read_bytes()

    def full(self: TrainStep, replica: int) -> dict:
        raise OSError("No space left on device")

    monkeypatch.setattr(TrainStep, "state_dict", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, source, ARCHITECTURE)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """Of a real disk: files that are mapped into memory would end this process by SIGBUS."""
    size = ["-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)]
    if subprocess.run(["mount", *size], capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not permitted")
    try:
        architecture = Architecture(observation_size=3, action_size=2)
        with pytest.raises(
            OSError, match=r"could not write the checkpoint .*a\.ckpt \(0 MB are free"
        ):
            checkpoint.save(
                tmp_path / "a.ckpt", TrainStep(IQLLoss(*built(architecture))), architecture
            )
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_other_components_are_saved_and_restored(tmp_path: Path) -> None:
    source, other = learner(), torch.nn.Linear(2, 2)
    path = checkpoint.save(tmp_path / "a.ckpt", source, ARCHITECTURE, components={"other": other})
    expected, again = other.weight.clone(), torch.nn.Linear(2, 2)
    checkpoint.load_learner(path, learner(), components={"other": again})
    assert torch.equal(again.weight, expected)
    load_policy(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing\.ckpt"):
        load_policy(tmp_path / "missing.ckpt")


def test_a_checkpoint_of_a_later_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", 99)
        path = checkpoint.save(tmp_path / "a.ckpt", learner(), ARCHITECTURE)
    for load in (load_policy, lambda path: checkpoint.load_learner(path, learner())):
        with pytest.raises(ValueError, match=r"a.ckpt has format 99, this version reads up to 3"):
            load(path)


def test_networks_that_could_not_be_loaded_are_not_saved(tmp_path: Path) -> None:
    wide = built(replace(ARCHITECTURE, hidden_sizes=(16,)), STATISTICS)
    own = built(ARCHITECTURE, STATISTICS)
    for what, networks in (
        ("the policy", (wide[0], *own[1:])),
        ("a Q network", (own[0], wide[1], own[2])),
        ("V", (*own[:2], wide[2])),
    ):
        step = TrainStep(IQLLoss(*networks))
        with pytest.raises(
            ValueError, match=rf"{what} is not of the .* is \((2, )?16, .*, expected \("
        ):
            checkpoint.save(tmp_path / "own.ckpt", step, ARCHITECTURE)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("network", [0, 1, 2])
@pytest.mark.parametrize("change", ["another layer", "a hook"])
def test_networks_that_would_compute_something_else_are_not_saved(
    network: int, change: str, tmp_path: Path
) -> None:
    """Tensors of the same names and shapes, that are loaded into networks of another function."""
    networks = built(ARCHITECTURE, STATISTICS)
    its = networks[network]
    modules = nn.ModuleList(its if isinstance(its, list) else [its]).modules()
    parents = [m for m in modules if any(isinstance(c, nn.ReLU) for c in m.children())]
    if change == "a hook":
        parents[0].register_forward_hook(lambda *_: None)
    for parent in parents if change == "another layer" else ():
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Tanh())
    step = TrainStep(IQLLoss(*networks))
    with pytest.raises(ValueError, match=r"would be loaded as another: it has a? ?(Tanh|hook)"):
        checkpoint.save(tmp_path / "own.ckpt", step, ARCHITECTURE)
    assert not list(tmp_path.iterdir())


def test_metadata_that_the_checkpoint_has_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metadata has \['steps'\]"):
        checkpoint.save(tmp_path / "own.ckpt", learner(), ARCHITECTURE, steps=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["squashed", "heteroscedastic"])
def test_a_policy_that_would_act_in_other_bounds_is_not_saved(kind: Any, tmp_path: Path) -> None:
    its = replace(ARCHITECTURE, policy=kind, action_bounds=([-2.0, -2.0], [2.0, 2.0]))
    other = replace(its, action_bounds=([-2.0, -2.0], [2.0, 3.0]))
    policy, qvalues, value = built(its, STATISTICS)
    step = TrainStep(IQLLoss(policy, built(other, STATISTICS)[1], value))
    with pytest.raises(ValueError, match="would be loaded as another: its distribution has"):
        checkpoint.save(tmp_path / "own.ckpt", step, other)
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path / "own.ckpt", TrainStep(IQLLoss(policy, qvalues, value)), its)


def test_of_several_learners_it_is_said_which(tmp_path: Path) -> None:
    networks = [built(ARCHITECTURE, STATISTICS) for _ in range(2)]
    step = TrainStep([IQLLoss(*its) for its in networks])
    with pytest.raises(ValueError, match="there are 2 learners, each with a state of its own"):
        checkpoint.save(tmp_path / "a.ckpt", step, ARCHITECTURE)
    path = checkpoint.save(tmp_path / "a.ckpt", step, ARCHITECTURE, replica=1)
    with pytest.raises(ValueError, match="there are 2 learners, each with a state of its own"):
        checkpoint.load_learner(path, step)


@pytest.mark.parametrize("load", [load_policy, checkpoint.load_networks])
def test_loading_draws_no_random_numbers(load: Callable, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "a.ckpt", learner(), ARCHITECTURE)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(path)
    assert torch.equal(torch.rand(3), expected)
