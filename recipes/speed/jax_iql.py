"""IQL in JAX and Optax: the contender that compiles whole stretches of training into one program.

The networks, initialisation and losses are those of ``torchrl_iql`` (:class:`torchrl_iql.IQLLoss` on the
networks of :mod:`torchrl_iql.models`); a test compares losses and gradients. Sampling, losses, Adam and
target networks of many steps are one :func:`jax.lax.scan` on the device. Importing this module starts no
device and no threads. JAX and Optax are optional: without them ``update.py`` leaves this contender out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import Array, lax
from jax.scipy.stats import norm
from tensordict import TensorDict

from torchrl_iql_recipes.speed.work import Work

__all__ = ["JaxIQL", "State", "columns", "initial_state", "losses", "step"]

Layers = list[tuple[Array, Array]]
"""Weight ``[in, out]`` and bias ``[out]`` of each layer; of an ensemble with N in front."""

STEPS_PER_CALL = 100
STEPS_PER_ITERATION = 2
"""Of the loop: between iterations XLA copies parameters, which then are 3 to 5 % of the time on a CPU."""
LOG_STD_BOUNDS = (-5.0, 2.0)
WEIGHT_CLIP = 100.0


class State(NamedTuple):
    """What a gradient step changes.

    Attributes:
        parameters: of ``policy``, ``log_std``, ``value`` and ``qvalue``.
        target: the layers of the target Q networks.
        optimizer: the state of Adam.
    """

    parameters: dict[str, Any]
    target: Layers
    optimizer: optax.OptState


def mlp(layers: Layers, x: Array) -> Array:
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def losses(work: Work, parameters: dict, target: Layers, batch: dict) -> dict[str, Array]:
    """Compute the three losses from the same parameters, by the names of ``torchrl_iql.IQLLoss``.

    Args:
        work: expectile, temperature and discount.
        parameters: as in :class:`State`.
        target: as in :class:`State`.
        batch: ``observation``, ``action``, ``next_observation``, ``reward`` and ``terminated``.

    Returns:
        scalars.
    """
    observation, action = batch["observation"], batch["action"]
    v = mlp(parameters["value"], observation)[..., 0]
    next_v = mlp(parameters["value"], batch["next_observation"])[..., 0]
    inputs = jnp.concatenate([observation, action], axis=-1)
    ensemble = jax.vmap(mlp, in_axes=(0, None))
    q = ensemble(parameters["qvalue"], inputs)[..., 0]
    min_target_q = ensemble(target, inputs)[..., 0].min(axis=0)

    difference = lax.stop_gradient(min_target_q) - v
    asymmetry = jnp.where(difference < 0, 1 - work.expectile, work.expectile)
    td_target = batch["reward"] + work.discount * jnp.where(batch["terminated"], 0.0, next_v)
    mean = jnp.tanh(mlp(parameters["policy"], observation))
    std = jnp.exp(jnp.clip(parameters["log_std"], *LOG_STD_BOUNDS))
    log_prob = norm.logpdf(action, mean, std).sum(axis=-1)
    weight = jnp.minimum(jnp.exp(work.temperature * difference), WEIGHT_CLIP)
    return {
        "loss_actor": -(lax.stop_gradient(weight) * log_prob).mean(),
        "loss_qvalue": jnp.square(lax.stop_gradient(td_target) - q).sum(axis=0).mean(),
        "loss_value": (asymmetry * jnp.square(difference)).mean(),
    }


def stack(trees: Sequence[Any]) -> Any:
    """Stack trees of arrays into one, whose arrays have the number of trees in front."""
    # Initialised one by one: a vmapped orthogonal initialiser can hang on the threads of a CPU.
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def initial_state(work: Work, key: Array) -> State:
    """Draw orthogonal weights with gain sqrt 2, zero biases, targets equal to the Q networks."""
    orthogonal = jax.nn.initializers.orthogonal(math.sqrt(2))

    def layers(key: Array, inputs: int, outputs: int) -> Layers:
        sizes = [inputs, *work.hidden_sizes, outputs]
        shapes = list(pairwise(sizes))
        keys = jax.random.split(key, len(shapes))
        return [
            (orthogonal(k, shape), jnp.zeros(shape[1]))
            for k, shape in zip(keys, shapes, strict=True)
        ]

    observation, action = work.observation_size, work.action_size
    policy, value, *qvalues = jax.random.split(key, 2 + work.num_qvalue_nets)
    parameters = {
        "policy": layers(policy, observation, action),
        "log_std": jnp.zeros(action),
        "value": layers(value, observation, 1),
        "qvalue": stack([layers(k, observation + action, 1) for k in qvalues]),
    }
    # A copy: two arguments that are the same array can not both be donated.
    target = jax.tree.map(jnp.copy, parameters["qvalue"])
    return State(parameters, target, optax.adam(work.learning_rate).init(parameters))


def step(work: Work, state: State, batch: dict) -> tuple[State, dict[str, Array]]:
    """Take one gradient step on a minibatch."""

    def total(parameters: dict) -> tuple[Array, dict[str, Array]]:
        parts = losses(work, parameters, state.target, batch)
        return sum(parts.values()), parts

    gradients, parts = jax.grad(total, has_aux=True)(state.parameters)
    updates, optimizer = optax.adam(work.learning_rate).update(gradients, state.optimizer)
    parameters = optax.apply_updates(state.parameters, updates)
    target = optax.incremental_update(parameters["qvalue"], state.target, work.target_rate)
    return State(parameters, target, optimizer), parts


class JaxIQL:
    """IQL in JAX, one learner or several independent ones that share the data.

    On a GPU, matrix products have the precision that PyTorch is set to when this is built.

    Args:
        work: what to do in a step.
        name: of the contender.
        replicas: the number of learners. With more than one, a step is one of each, vmapped.

    Attributes:
        name: of the contender.
        replicas: the number of learners.
        state: of the learners, with ``replicas`` in front if there is more than one.
        losses: before the last step taken.
    """

    def __init__(self, work: Work, *, name: str = "JAX", replicas: int = 1) -> None:
        self.name = name
        self.replicas = replicas
        device = jax.devices("gpu" if work.device == "cuda" else "cpu")[0]
        # On a CPU, JAX has float32 products only.
        precision = "highest" if work.device == "cpu" else torch.get_float32_matmul_precision()
        lead = (replicas,) if replicas > 1 else ()

        def advance(
            state: State, key: Array, data: dict, steps: int
        ) -> tuple[State, Array, dict[str, Array]]:
            def body(state: State, indices: Array) -> tuple[State, dict[str, Array]]:
                batch = {name: column[indices] for name, column in data.items()}
                take_step = partial(step, work)
                return (jax.vmap(take_step) if lead else take_step)(state, batch)

            key, draw = jax.random.split(key)
            shape = (steps, *lead, work.batch_size)
            indices = jax.random.randint(draw, shape, 0, work.transitions)
            with jax.default_matmul_precision(precision):
                state, parts = lax.scan(body, state, indices, unroll=STEPS_PER_ITERATION)
            return state, key, jax.tree.map(lambda x: x[-1], parts)

        self._advance = jax.jit(advance, static_argnames="steps", donate_argnames="state")
        with jax.default_device(device):
            key, *keys = jax.random.split(jax.random.key(work.seed), 1 + replicas)
            states = [initial_state(work, key) for key in keys]
            state = stack(states) if lead else states[0]
        # All on the device from the start, as what comes out is: else the second call compiles anew.
        self.state, self._key, self._data = jax.device_put(
            (state, key, columns(work.data())), device
        )
        self.losses: dict[str, Array] = {}

    def run(self, steps: int) -> None:
        """Take gradient steps, and wait for them. Only two numbers of steps are ever compiled."""
        calls, rest = divmod(steps, STEPS_PER_CALL)
        for length in [STEPS_PER_CALL] * calls + [1] * rest:
            self.state, self._key, self.losses = self._advance(
                self.state, self._key, self._data, steps=length
            )
        jax.block_until_ready(self.state)

    def peak_memory(self) -> int | None:
        """Return the most bytes of the GPU in use; None on a CPU, where JAX does not count them."""
        statistics = next(iter(self._key.devices())).memory_stats() or {}
        return statistics.get("peak_bytes_in_use")


def columns(transitions: TensorDict) -> dict[str, np.ndarray]:
    """Return transitions ``[n]`` as the arrays that a batch consists of."""
    arrays = {
        "observation": transitions["observation"],
        "action": transitions["action"],
        "next_observation": transitions["next", "observation"],
        "reward": transitions["next", "reward"].squeeze(-1),
        "terminated": transitions["next", "terminated"].squeeze(-1),
    }
    return {name: array.numpy() for name, array in arrays.items()}
