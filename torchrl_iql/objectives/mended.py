"""What losses of TorchRL lack that learn Q of a policy, and :class:`~torchrl_iql.IQLLoss` has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn

from torchrl_iql.objectives.base import (
    check_gamma,
    check_qvalue_networks,
    drawn_like,
    missing,
)

if TYPE_CHECKING:
    from torchrl.objectives.common import LossModule
else:
    LossModule = object  # whose metaclass would put a forward here, before that of the loss

__all__ = ["Mended", "Modes", "as_list"]


class Modes(LossModule):
    """Stands before a loss of TorchRL, whose ``eval()`` does not reach the networks: their dropout stays."""

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the loss and of its networks (dropout, for example)."""
        super().train(mode)
        for name in ("actor_network", "qvalue_network"):
            if (network := self.__dict__.get(name)) is not None:
                network.train(mode)
        return self


class Mended(Modes):
    """Stands before a loss of TorchRL, of a policy ``actor_network`` and networks ``qvalue_network``.

    Of TorchRL 0.14.1 it mends:

    - ``copy.deepcopy`` of a loss that was called copies parameters of Q that the policy's loss has cached:
      that of the copy goes up the values that Q had then, for ever. And a loss can not be pickled.
    - ``eval()`` does not reach the networks, as :class:`Modes` says.
    - A state dict is without the discount before the first call, and with it afterwards.
    - NaN in what comes after a termination makes losses NaN, or is an error.
    - A batch can not be locked, nor its importance weights be of shape ``[*B, 1]``; of an entry that it lacks
      the error does not say which.
    """

    actor_network: TensorDictModule
    qvalue_network: TensorDictModule

    def _begin(self) -> None:
        """Do what is left at the end of ``__init__``."""
        self.make_value_estimator()
        self.register_load_state_dict_pre_hook(_with_estimator)

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> Self:
        """Choose how the target of Q is estimated; TD(0) with ``gamma=0.99`` if never called.

        Args:
            value_type: one of :class:`torchrl.objectives.utils.ValueEstimators`, or an estimator.
            **hyperparams: what the estimator takes, for example ``gamma`` in [0, 1].

        Returns:
            the loss.
        """
        check_gamma(hyperparams)
        hyperparams.setdefault("device", next(self.parameters()).device)
        super().make_value_estimator(value_type, **hyperparams)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {k: v for k, v in state.items() if not k.startswith(("_cache", "_vmap_"))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_vmap()  # pyright: ignore[reportAttributeAccessIssue]

    def _readable(self, given: TensorDictBase) -> TensorDictBase:
        """Return a copy to write into, of which nothing that counts is NaN.

        Raises:
            KeyError: an entry is missing.
            ValueError: Q observes what the policy does not.
        """
        keys: Any = self.tensor_keys
        ends: list[NestedKey] = [("next", keys.terminated), ("next", keys.done)]
        needed = [*self.actor_network.in_keys, keys.action, ("next", keys.reward), ends[1]]
        if lacking := [key for key in needed if given.get(key, default=None) is None]:
            raise KeyError(missing(given, lacking, "the loss"))
        known = {keys.action, *self.actor_network.in_keys}
        if other := [key for key in self.qvalue_network.in_keys if key not in known]:
            raise ValueError(
                f"qvalue_network reads {other[0]!r}, which is no input of actor_network: this loss is of "
                "networks that observe the same"
            )
        td = given.copy()
        over: Tensor = td.get(ends[0], default=None)  # pyright: ignore
        over = (td.get(ends[1]) if over is None else over).bool()
        for key in self.actor_network.in_keys:
            after = td.get(("next", key), default=None)
            if isinstance(after, Tensor) and after.is_floating_point():
                ended = over.view(*td.shape, *[1] * (after.ndim - td.ndim))
                td.set(("next", key), after.masked_fill(ended & ~after.isfinite(), 0))
        if hasattr(keys, "priority_weight"):
            weight = td.get(keys.priority_weight, default=None)
            if weight is not None and weight.shape == (*td.shape, 1):
                td.set(keys.priority_weight, weight.squeeze(-1))
        return td

    def _write_back(self, given: TensorDictBase, td: TensorDictBase, *names: str) -> None:
        """Write the priority, and other entries, into the batch that was given, unless it is locked."""
        for name in ("priority", *names) if not given.is_locked else ():
            key = getattr(self.tensor_keys, name)
            given.set(key, td.get(key))


@torch.no_grad()
def as_list(
    networks: TensorDictModule | Sequence[TensorDictModule],
    number: int,
    others: TensorDictModule,
) -> Any:
    """Return so many networks: the given one, and others of its kind, where TorchRL draws all of them anew.

    Args:
        networks: a network, or a list of them, which is what is returned then.
        number: of them.
        others: a network with which they may share parameters; then TorchRL expands them.
    """
    networks = check_qvalue_networks(networks, number)  # pyright: ignore
    shared = set(map(id, others.parameters()))
    if not isinstance(networks, nn.Module) or shared & set(map(id, networks.parameters())):
        return networks
    made = [networks]
    for _ in range(number - 1):
        made.append(copy.deepcopy(networks))
        for name, parameter in made[-1].named_parameters():
            parameter.copy_(drawn_like(parameter, is_bias=name.endswith("bias")))
    return made if number > 1 else networks


def _with_estimator(loss: Mended, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept what TorchRL's losses have saved before their first call: without a value estimator."""
    for key, own in loss.state_dict().items():
        if key.startswith("_value_estimator."):
            state_dict.setdefault(prefix + key, own)
