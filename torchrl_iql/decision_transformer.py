"""The Decision Transformer (Chen et al., 2021): actions by the return that they are to lead to.

* :class:`TimedDTActor`: TorchRL's ``DTActor`` on windows of episodes, with an embedding of time.
* :class:`ReturnConditioned`: the policy that it is in an environment, with a context of its own.

:func:`torchrl_iql.models.decision_transformer` makes them. They need the package ``transformers``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import DTActor

__all__ = ["ReturnConditioned", "TimedDTActor"]


class TimedDTActor(DTActor):
    """TorchRL's ``DTActor``, with what it lacks of the official code.

    The tokens of a step have an embedding of its time in the episode. Returns are scaled, observations
    and actions normalised, and the actions that are put out lie within bounds. Dropout is the same
    everywhere: TorchRL's configuration has none for the tokens, which lose a tenth whatever it says.

    Attention is causal: what is put out for a step depends on the steps up to it, on its return and its
    observation, and not on its action or on what comes later, be it padding.

    Args:
        observation_size: D.
        action_size: A.
        window: K, the number of steps that it sees at most.
        episode_length: the number of times with an embedding; later ones have the last one's.
        return_scale: what returns are divided by.
        width: of the embeddings.
        layers: of the transformer.
        heads: of each layer, a divisor of ``width``.
        dropout: of tokens, attention and residuals.
        normalize: of observations.
        scale_action: from the bounds to -1 and 1.
        squash: what bounds the actions that are put out.

    Raises:
        ImportError: ``transformers`` is not installed.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        window: int,
        episode_length: int,
        return_scale: float,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        normalize: nn.Module,
        scale_action: nn.Module,
        squash: nn.Module,
    ) -> None:
        if find_spec("transformers") is None:
            raise ImportError(
                "the Decision Transformer needs the package transformers: "
                "pip install 'torchrl-iql[dt]'"
            )
        config = {
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": 4 * width,
            "activation": "relu",
            "n_positions": 3 * window,
            "resid_pdrop": dropout,
            "attn_pdrop": dropout,
        }
        with _quiet():
            super().__init__(observation_size, action_size, config)
        gpt: nn.Module = self.transformer.transformer
        gpt.drop.p = dropout  # pyright: ignore
        gpt.config.use_cache = False  # pyright: ignore
        self.embed_time = nn.Embedding(episode_length, width)
        self.return_scale = return_scale
        self.normalize, self.scale_action, self.squash = normalize, scale_action, squash

    def forward(
        self, observation: Tensor, action: Tensor, return_to_go: Tensor, time: Tensor
    ) -> Tensor:
        """Return the action of each step.

        Args:
            observation: ``[*B, K, D]``.
            action: ``[*B, K, A]``, of which those up to the step before are seen.
            return_to_go: ``[*B, K, 1]``, the sum of the rewards from the step on.
            time: of the step in its episode, from 0, ``[*B, K]`` int64.

        Returns:
            tensor ``[*B, K, A]``.
        """
        its = self.transformer
        when = self.embed_time(time.clamp_max(self.embed_time.num_embeddings - 1))
        returns = (return_to_go / self.return_scale).to(when.dtype)
        observations = self.normalize(observation.to(when.dtype))
        embedded = [
            its.embed_return(returns),
            its.embed_state(observations),
            its.embed_action(self.scale_action(action)),
        ]
        tokens = torch.stack([each + when for each in embedded], dim=-2)
        sequences = its.embed_ln(tokens).reshape(-1, 3 * time.shape[-1], tokens.shape[-1])
        hidden = its.transformer(inputs_embeds=sequences).last_hidden_state
        return self.squash(self.action_layer(hidden[:, 1::3].reshape(when.shape)))


class ReturnConditioned(TensorDictModuleBase):
    """The policy that a Decision Transformer is: it aims at a return, less what it was paid on the way.

    It keeps the last K steps of each episode itself, and attends to all of them. It reads

    - ``"observation"``: ``[*B, D]``;
    - ``"context"``: what it wrote under ``("next", "context")`` one step before; without one, episodes
      begin;
    - ``"reward"``: ``[*B, 1]``, of the step before, as the environment pays it, if there is a context;
    - ``"is_init"``: ``[*B, 1]`` bool, whether an episode begins; without it, none that has a context;

    and writes ``"action"``, ``[*B, A]``, and as the context ``"observation"``, ``"action"`` and
    ``"return_to_go"`` of the last steps, ``[*B, K, ...]``, the earliest first, and the number of the
    present one, ``"step"``, ``[*B, 1]`` int64.

    Args:
        actor: on windows.
        window: K.
        target_return: to aim at, a sum of rewards as the environment pays them. It may be changed.
    """

    def __init__(self, actor: TimedDTActor, window: int, target_return: float) -> None:
        super().__init__()
        self.in_keys = ["observation", "context", "reward", "is_init"]
        self.out_keys = ["action", ("next", "context")]  # pyright: ignore
        self.module = actor
        self.window = window
        self.target_return = target_return

    def on_windows(self) -> TensorDictModule:
        """Return what is trained on windows of the data: the same parameters, by the same names."""
        return TensorDictModule(
            self.module,
            in_keys=["observation", "action", "return_to_go", "time"],
            out_keys=["action"],
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict["observation"]
        context = tensordict.get("context", default=None)
        if context is None:
            context = self._empty(observation)
            step, left = context["step"], self.target_return
        else:
            begins = tensordict.get("is_init", default=torch.zeros_like(context["step"])).bool()
            left = self._present(context["return_to_go"], context["step"]) - tensordict["reward"]
            left = left.masked_fill(begins, self.target_return)
            step = (context["step"] + 1).masked_fill(begins, 0)
        window = {
            key: self._moved_on(context[key], step)
            for key in ("observation", "action", "return_to_go")
        }
        window["observation"] = self._put(window["observation"], observation, step)
        window["return_to_go"] = self._put(window["return_to_go"], left, step)
        first = (step - self.window + 1).clamp_min(0)
        time = first + torch.arange(self.window, device=step.device)
        action = self._present(self.module(*window.values(), time), step)
        window["action"] = self._put(window["action"], action, step)
        tensordict["action"] = action
        tensordict["next", "context"] = TensorDict({**window, "step": step}, observation.shape[:-1])
        return tensordict

    def _empty(self, observation: Tensor) -> TensorDict:
        layer, batch = self.module.action_layer, observation.shape[:-1]
        actions = layer.weight.new_zeros(*batch, self.window, layer.out_features)
        return TensorDict(
            {
                "observation": observation.new_zeros(*batch, self.window, observation.shape[-1]),
                "action": actions,
                "return_to_go": actions[..., :1],
                "step": torch.zeros(*batch, 1, dtype=torch.int64, device=observation.device),
            },
            batch,
        )

    def _moved_on(self, rows: Tensor, step: Tensor) -> Tensor:
        """Return a window with room for a step: of a full one, the earliest makes it.

        What lies there and behind is of an episode before: attention is causal, and does not see it.
        """
        full = (step >= self.window).unsqueeze(-1)
        return torch.where(full, rows.roll(-1, dims=-2), rows)

    def _place(self, step: Tensor) -> Tensor:
        return step.clamp_max(self.window - 1).unsqueeze(-1)

    def _present(self, rows: Tensor, step: Tensor) -> Tensor:
        """Return what a window holds of a step, ``[*B, F]`` of ``[*B, K, F]``."""
        return rows.take_along_dim(self._place(step), dim=-2).squeeze(-2)

    def _put(self, rows: Tensor, value: Tensor | float, step: Tensor) -> Tensor:
        """Return a window with another value of a step, ``[*B, F]``, or one for all."""
        here = torch.arange(self.window, device=step.device).unsqueeze(-1) == self._place(step)
        value = value.unsqueeze(-2) if isinstance(value, Tensor) else value
        return torch.where(here, value, rows)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of the tokens of a text, of which there is none."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
