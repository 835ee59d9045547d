"""A contender that is not ours: unifloral, the fastest public code for offline RL that we found, in JAX.

The files of a checkout of https://github.com/EmptyJackson/unifloral are run as they are, as far as their
gradient step, which needs jax, flax, distrax and tyro. What they import for environments and logging is left
out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tensordict import TensorDictBase

__all__ = ["FILES", "NAME", "Unifloral", "checkout"]

NAME = "unifloral"
FILES = {"bc": "bc", "iql": "iql", "td3bc": "td3_bc"}
"""The algorithms whose losses and networks are there what they are here, and their files."""

STEPS_PER_CALL = 100
UNUSED = ("d4rl", "gym", "wandb")


def checkout(text: str) -> Path:
    """Return the folder that an argument names, which must be a checkout."""
    folder = Path(text).resolve()
    missing = [file for name in FILES.values() if not (file := _file(folder, name)).is_file()]
    if missing:
        raise argparse.ArgumentTypeError(f"{text} must be a checkout of unifloral: no {missing[0]}")
    return folder


class Unifloral:
    """An algorithm of unifloral, a hundred steps in one program.

    Its cloning is of a deterministic policy. What it calls a step of TD3+BC, two of Q and then one of the
    policy and the targets, all on one minibatch, are two here.

    Args:
        algorithm: its name here, of :data:`FILES`.
        checkout: of the repository.
        data: transitions.
        device: ``"cpu"`` or ``"cuda"``.

    Attributes:
        name: of the contender.
        replicas: 1.
    """

    name = NAME
    replicas = 1

    def __init__(self, algorithm: str, checkout: Path, data: TensorDictBase, device: str) -> None:
        module = _load(_file(checkout, FILES[algorithm]), device)
        import jax

        self._wait = jax.block_until_ready
        step, agent = _start(module, data)
        self._at_once = 2 if algorithm == "td3bc" else 1
        self._carry: Any = (jax.random.PRNGKey(1), agent)
        self._steps = jax.jit(
            lambda carry, number: jax.lax.scan(step, carry, None, number)[0], static_argnums=1
        )

    def run(self, steps: int) -> None:
        """Take at least so many gradient steps, and wait for them."""
        calls, rest = divmod(steps, STEPS_PER_CALL)
        for _ in range(calls):
            self._carry = self._steps(self._carry, STEPS_PER_CALL // self._at_once)
        for _ in range(0, rest, self._at_once):
            self._carry = self._steps(self._carry, 1)
        self._wait(self._carry)


def _file(checkout: Path, name: str) -> Path:
    return checkout / "algorithms" / f"{name}.py"


def _load(file: Path, device: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"unifloral_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for name in UNUSED:
        sys.modules[name] = ModuleType(name)
    spec.loader.exec_module(module)
    if device == "cpu":  # the files ask for what only a GPU has
        os.environ.pop("XLA_FLAGS", None)
        os.environ["JAX_PLATFORMS"] = "cpu"
    return module


def _start(module: ModuleType, data: TensorDictBase) -> tuple[Any, Any]:
    """Return the step and the first state, put together as the files do."""
    import jax
    from jax import numpy as jnp

    columns = data["observation"], data["action"], data["next", "reward"].squeeze(-1)
    columns += data["next", "observation"], data["next", "terminated"].squeeze(-1).float()
    transitions = module.Transition(*(jnp.asarray(each.numpy()) for each in columns))
    mean, std = transitions.obs.mean(axis=0), transitions.obs.std(axis=0)
    observation, action = transitions.obs[0], transitions.action[0]
    policy = getattr(module, "TanhGaussianActor", None) or module.DeterministicTanhActor
    networks: dict[str, Any] = {"actor": (policy(len(action), mean, std), [observation])}
    parts = module.AgentTrainState._fields
    if "dual_q" in parts:
        networks["dual_q"] = module.DualQNetwork(mean, std), [observation, action]
    if "value" in parts:
        networks["value"] = module.StateValueFunction(mean, std), [observation]
    arguments = module.Args()
    seed = jax.random.PRNGKey(0)
    agent = module.AgentTrainState(
        *(
            module.create_train_state(arguments, seed, *networks[part.removesuffix("_target")])
            for part in parts
        )
    )
    applied = [network.apply for network, _ in networks.values()]
    return module.make_train_step(arguments, *applied, transitions), agent
