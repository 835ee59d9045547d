"""The loss of the Decision Transformer on windows of episodes."""

from __future__ import annotations

from typing import get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torchrl import objectives

from torchrl_iql.objectives import functional
from torchrl_iql.objectives.base import Reduction, check_choice
from torchrl_iql.objectives.mended import Modes

__all__ = ["DTLoss"]


class DTLoss(Modes, objectives.DTLoss):
    """TorchRL's ``DTLoss``: the squared error of the actions, here of windows that end with their episode.

    A window of a data set, :meth:`~torchrl_iql.OfflineDataset.windows`, goes on into the next episode. Its
    first episode alone counts: the steps whose ``"time"`` follows on that of the first one.

    Args:
        actor_network: reads what a Decision Transformer does of windows ``[*B, K]``, and writes
            ``"action"``.

    Keyword Args:
        loss_function: the distance of actions: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.
        reduction: ``"mean"`` (the default) or ``"sum"``, over the steps that count; ``"none"`` gives these in
            a row.

    Raises:
        ValueError: an argument is none of these, or a batch is not of windows.

    Differences from TorchRL's: the mask, in place of ``("collector", "mask")``, the name of the loss,
    ``"loss_actor"`` instead of ``"loss"``, and that ``eval()`` reaches the policy. Neither reads importance
    weights.
    """

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        *,
        loss_function: functional.Distance = "l2",
        reduction: Reduction | None = None,
    ) -> None:
        check_choice("loss_function", loss_function, functional.DISTANCES)
        check_choice("reduction", reduction, (None, *get_args(Reduction)))
        super().__init__(actor_network, loss_function=loss_function, reduction=reduction)  # pyright: ignore
        self.loss_mask_key = "mask"
        self.out_keys = ["loss_actor"]

    @dispatch()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss."""
        time = tensordict["time"]
        if tensordict.ndim < 2 or time.shape != tensordict.shape:
            raise ValueError(
                f"a batch of shape {list(tensordict.shape)} with time {list(time.shape)}, expected windows "
                "[*B, K], as minibatches of dataset.windows(K) are"
            )
        follows = time[..., :1] + torch.arange(time.shape[-1], device=time.device)
        masked = tensordict.copy().set("mask", time == follows)
        return TensorDict(loss_actor=super().forward(masked)["loss"])
