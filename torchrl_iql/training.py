"""One gradient step of all networks, and the state that it carries from step to step."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_iql.objectives.direct import DirectEvaluation

__all__ = ["TrainStep"]


class TrainStep:
    r"""Losses, gradients, Adam, learning-rate schedule and target networks, as one callable.

    All losses are taken from the same parameters and descended in one Adam step; the target networks
    follow by :math:`\hat\theta \leftarrow (1 - \alpha) \hat\theta + \alpha \theta`. Nothing waits for
    the device: the returned metrics stay there until somebody reads them.

    Args:
        loss: a LossModule whose outputs named ``loss_*`` are minimised, with ``actor_network`` among
            its networks and target networks that nobody else updates.
        learning_rate: of Adam, for all networks.
        target_rate: :math:`\alpha` in (0, 1].
        actor_decay_steps: length of the cosine schedule that takes the policy's learning rate to 0, as
            in the paper's offline runs; it stays 0 afterwards. None keeps it constant.

    Attributes:
        steps: the number of gradient steps taken.
    """

    def __init__(
        self,
        loss: LossModule,
        *,
        learning_rate: float = 3e-4,
        target_rate: float = 0.005,
        actor_decay_steps: int | None = None,
    ) -> None:
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be in (0, inf), got {learning_rate!r}")
        if not 0 < target_rate <= 1:
            raise ValueError(f"target_rate must be in (0, 1], got {target_rate!r}")
        if actor_decay_steps is not None and actor_decay_steps < 1:
            raise ValueError(f"actor_decay_steps must be at least 1, got {actor_decay_steps!r}")

        def cosine(step: int) -> float:
            done = 0.0 if actor_decay_steps is None else min(step / actor_decay_steps, 1.0)
            return 0.5 * (1 + math.cos(math.pi * done))

        self.loss = loss
        # The updater copies the networks into their targets when it is made: a checkpoint loads after it.
        self.target_updater = SoftUpdate(loss, tau=target_rate)
        actor = list(loss.actor_network_params.parameters())  # pyright: ignore
        actor_ids = set(map(id, actor))
        critics = [p for p in loss.parameters() if id(p) not in actor_ids]
        self.optimizer = torch.optim.Adam(
            [{"params": actor}, {"params": critics}], lr=learning_rate, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, [cosine, lambda step: 1.0]
        )
        self.steps = 0
        self._direct = DirectEvaluation.of(loss)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Take one gradient step.

        Args:
            batch: transitions, ``[B]``, on the device of the networks.

        Returns:
            the output of the loss before the step, detached.
        """
        metrics = self.loss(batch) if self._direct is None else self._direct(batch)
        total = torch.stack([v for k, v in metrics.items() if k.startswith("loss_")]).sum()
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.schedule.step()
        self.target_updater.step()
        self.steps += 1
        return metrics.detach()

    @property
    def policy_lr(self) -> float:
        """The current learning rate of the policy."""
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Networks, targets, optimiser, schedule and counter."""
        return {
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]
