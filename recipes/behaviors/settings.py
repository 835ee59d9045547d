"""The settings of collect.py and of sac.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from torchrl_iql_recipes.experiment.schema import (
    LATER,
    Count,
    Natural,
    NotNegative,
    Part,
    Positive,
    Rate,
    Text,
)

__all__ = ["Collection", "SoftActorCritic"]


class Collection(Part):
    """What data sets are made."""

    suite: Literal["mini"] | None = Field(None, description="all data sets of the mini suite")
    data: Text | tuple[Text, ...] | None = Field(
        None, description="or the name of one, as hopper/medium-replay, or several"
    )
    env: Text | None = Field(None, description="or episodes in a Gymnasium environment")
    policy: Text | None = Field(
        None, description="of env: a checkpoint of recipes/offline.py; random: random actions"
    )
    stages: Text | None = Field(
        None, description="of the policy of data, left by recipes/sac.py; null: the shipped ones"
    )
    id: Text | None = Field(
        None,
        description="of the Minari data set; null: mini/<name>-v0, with transitions, seed and stages as here",
    )
    transitions: Count | None = Field(None, description="at least; null: as many as the suite's")
    seed: Natural = Field(0, description="of everything")
    workers: Count | None = Field(None, description="processes; null: one per core")

    @model_validator(mode="after")
    def _one_request(self) -> Collection:
        given = [key for key in ("suite", "data", "env") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of suite, data and env, got {' and '.join(given) or 'none of them'}"
            )
        if self.env is None:
            self._suites()
        elif self.policy is None or self.id is None:
            raise ValueError("env needs a policy, a checkpoint or random, and an id")
        elif self.stages is not None:
            raise ValueError("stages are for data; what plays in env is policy")
        return self

    def _suites(self) -> None:
        if self.policy is not None:
            raise ValueError("policy plays in env; data and suite have behaviours of their own")
        several = self.data is None or (isinstance(self.data, tuple) and len(self.data) != 1)
        if self.id is not None and several:
            raise ValueError(f"id={self.id} names one data set, but several are to be made")
        changed = [key for key in ("transitions", "seed", "stages") if getattr(self, key)]
        if self.id is None and changed:
            raise ValueError(
                f"with {' and '.join(changed)} give id=: mini/<name>-v0 is the suite's data"
            )


class SoftActorCritic(Part):
    """How a policy that makes data is trained."""

    behavior: Literal["hopper", "halfcheetah", "walker2d", "ant"] = Field(
        "hopper", description="who is trained; the ant walks to goals"
    )
    frames: Annotated[Count, LATER] = Field(250_000, description="environment steps")
    seed: Natural = Field(0, description="of everything")
    random_frames: Natural = Field(5000, description="of random actions, at the beginning")
    frames_per_batch: Count = Field(50, description="collected between two rounds of updates")
    updates_per_frame: NotNegative = Field(1.0, description="gradient steps per environment step")
    batch_size: Count = Field(128, description="transitions")
    learning_rate: Positive = Field(1e-3, description="of Adam")
    target_rate: Rate = Field(0.005, description="of the target networks")
    discount: Rate = Field(0.99, description="of rewards, per step")
    actor_sizes: tuple[Count, ...] = Field(
        (128, 128), description="units of hidden layers: few, policies of many stages are kept"
    )
    critic_sizes: tuple[Count, ...] = Field((256, 256), description="units of hidden layers")
    stage_interval: Count = Field(
        5000, description="frames from one stage of the policy that is kept to the next"
    )
    eval_episodes: Annotated[Count, LATER] = Field(5, description="of each stage, stochastic")
    threads: Annotated[Count | None, LATER] = Field(
        None, description="of PyTorch; null: one per core"
    )

    execution: Annotated[Literal["auto", "eager", "compiled"], LATER] = Field(
        "auto",
        description="of gradient steps; compiling takes up to a minute, then they are faster",
    )

    @model_validator(mode="after")
    def _stages_are_whole_batches(self) -> SoftActorCritic:
        if self.stage_interval % self.frames_per_batch:
            raise ValueError(
                f"stage_interval={self.stage_interval}: expected a multiple of frames_per_batch, "
                f"{self.frames_per_batch}"
            )
        return self
