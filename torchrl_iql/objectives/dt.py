"""The loss of the Decision Transformer on windows of episodes."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl import objectives

__all__ = ["DTLoss"]


class DTLoss(objectives.DTLoss):
    """TorchRL's ``DTLoss``: the squared error of the actions, here of windows that end with their episode.

    A window of a data set, :meth:`~torchrl_iql.OfflineDataset.windows`, goes on into the next episode. Its
    first episode alone counts: the steps whose ``"time"`` follows on that of the first one.

    Args:
        actor_network: reads what a Decision Transformer does of windows ``[B, K]``, and writes
            ``"action"``.

    Differences from TorchRL's: the mask, which it knows under other names, and the name of the loss,
    ``"loss_actor"`` instead of ``"loss"``.
    """

    def __init__(self, actor_network: TensorDictModuleBase) -> None:
        super().__init__(actor_network)  # pyright: ignore
        self.loss_mask_key = "mask"
        self.out_keys = ["loss_actor"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        time = tensordict["time"]
        follows = time[..., :1] + torch.arange(time.shape[-1], device=time.device)
        masked = tensordict.copy().set("mask", time == follows)
        return TensorDict(loss_actor=super().forward(masked)["loss"])
