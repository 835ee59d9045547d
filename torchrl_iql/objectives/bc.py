"""Behaviour cloning: TorchRL's loss, for discrete actions, too."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torchrl import objectives

from torchrl_iql.objectives.base import Reduction, unannotated
from torchrl_iql.objectives.mended import Modes

__all__ = ["BCLoss"]


class BCLoss(Modes, objectives.BCLoss):
    r"""Behaviour cloning: :math:`- E_D [ \log \pi(a | s) ]`, of a deterministic policy the squared error.

    Args:
        actor_network: the policy.

    Keyword Args:
        reduction: ``"mean"`` (the default), ``"sum"`` or ``"none"``.

    Returns:
        a TensorDict with ``loss_bc``.

    Differences from :class:`torchrl.objectives.BCLoss` of TorchRL 0.14.1:
        - Of discrete actions it is minus their log-likelihood. TorchRL's takes the action that the policy has
          drawn for its logits, which is an error, or where shapes happen to fit another number.
        - ``eval()`` reaches the policy.
    """

    def __init__(
        self, actor_network: TensorDictModule, *, reduction: Reduction | None = None
    ) -> None:
        with unannotated():
            super().__init__(actor_network, reduction=reduction)

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss."""
        action = tensordict.get(self.tensor_keys.action)
        if action.is_floating_point() or not hasattr(self.actor_network, "get_dist"):
            return super().forward(tensordict)
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            dist = self.actor_network.get_dist(tensordict.copy())  # pyright: ignore
        if not dist.event_shape and action.shape == (*dist.batch_shape, 1):
            action = action.squeeze(-1)
        loss = self._reduce_loss(-dist.log_prob(action), tensordict=tensordict)
        return TensorDict(loss_bc=loss, batch_size=loss.shape)
