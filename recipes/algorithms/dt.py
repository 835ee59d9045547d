"""Decision Transformer (Chen et al., 2021): actions by the return that is to follow, without values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from torchrl_iql_recipes.algorithms.base import Algorithm, DecaySteps, LearningRate
from torchrl_iql_recipes.experiment.schema import (
    Count,
    Natural,
    NotNegative,
    Number,
    Positive,
    SettingsError,
    is_installed,
)

if TYPE_CHECKING:
    from torchrl_iql import OfflineDataset
    from torchrl_iql.models import Architecture
    from torchrl_iql.objectives import DTLoss
    from torchrl_iql_recipes.experiment.networks import Networks


class DT(Algorithm):
    """The defaults are those of the official code."""

    title: ClassVar[str] = "DT"
    of_networks: ClassVar[tuple[str, ...]] = ("context", "target_return")
    is_offline: ClassVar[bool] = True
    is_continuous: ClassVar[bool] = True

    learning_rate: LearningRate = 1e-4
    decay_steps: DecaySteps = 0
    warm_up_steps: Natural = Field(
        10_000, description="gradient steps over which the learning rate rises"
    )
    weight_decay: NotNegative = Field(1e-4, description="in units of the learning rate, as AdamW's")
    max_grad_norm: Positive = Field(0.25, description="the largest norm of the gradient")
    context: Count = Field(20, description="steps that the policy sees, the present one included")
    target_return: Number | None = Field(
        None,
        description="what the policy aims at, as the environment pays it, whatever the reward rule; null: "
        "the best return of the data",
    )

    @model_validator(mode="after")
    def _has_its_package(self) -> DT:
        if not is_installed("transformers"):
            raise ValueError(
                "algorithm=dt: the package transformers is not installed; "
                "pip install 'torchrl-iql[dt]', or give another algorithm"
            )
        return self

    def data(self, dataset: OfflineDataset) -> OfflineDataset:
        return dataset.windows(self.context)

    def architecture(self, architecture: Architecture, dataset: OfflineDataset) -> Architecture:
        if architecture.policy not in ("gaussian", "deterministic"):
            raise SettingsError(
                f"policy={architecture.policy}: without effect, a Decision Transformer is deterministic; "
                "give policy=deterministic"
            )
        if architecture.images:
            raise SettingsError("encoder=cnn: the Decision Transformer here sees no images")
        sizes = list(architecture.hidden_sizes)
        if len(set(sizes)) != 1:
            raise SettingsError(
                f"hidden_sizes={sizes}: expected the width of the transformer, once for each layer, as "
                "[128,128,128]"
            )
        best = dataset.episode_returns.max().item()
        return replace(
            architecture,
            policy="decision_transformer",
            policy_options={
                "context": self.context,
                "episode_length": int(dataset.episode_lengths.max()),
                "target_return": best if self.target_return is None else self.target_return,
                "return_scale": dataset.transitions["return_to_go"].abs().max().item() or 1.0,
            },
        )

    def loss(self, networks: Networks) -> DTLoss:
        from torchrl_iql.objectives import DTLoss

        return DTLoss(networks.policy().on_windows())

    def optimization(self, steps: int) -> dict[str, Any]:
        from torchrl_iql.training import warm_up

        its = super().optimization(steps)
        fall = its["schedule"].get("actor_network", lambda step: 1.0)
        rise = warm_up(self.warm_up_steps) if self.warm_up_steps else lambda step: 1.0
        return {
            **its,
            "schedule": {"actor_network": lambda step: rise(step) * fall(step)},
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }
