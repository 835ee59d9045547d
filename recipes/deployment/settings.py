"""The settings of evaluate.py, of export.py and of estimate.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from torchrl_iql_recipes.experiment.schema import (
    Count,
    Flag,
    Fraction,
    Natural,
    Part,
    Positive,
    Rate,
    Text,
    written,
)

__all__ = ["Estimation", "Export", "Play"]

FILMS = (".mp4", ".png")
FILES = (".pt2", ".onnx", ".npz")


class Play(Part):
    """What is played."""

    checkpoint: Text | None = Field(None, description="whose policy plays; has to be given")
    env: Text | dict | None = Field(
        None,
        description="to play in: an id, {id: ..., arguments of gymnasium.make}, or null for that of the data",
    )
    episodes: Count = Field(100, description="complete ones")
    seed: Natural = Field(
        20_000,
        description="of the first; data are made from 0 on, evaluations of runs from 10,000 on",
    )
    video: Text | None = Field(
        None, description="a file of the first episode: .mp4, or .png for a strip of its frames"
    )
    trust_env: Flag = Field(
        False,
        description="the environment that the checkpoint names may run code that nobody has registered here",
    )

    @model_validator(mode="after")
    def _is_complete(self) -> Play:
        _require("checkpoint", self.checkpoint)
        if isinstance(self.env, dict) and "id" not in self.env:
            raise ValueError(
                f"env={written(self.env)}: expected an id beside the arguments of gymnasium.make"
            )
        if self.video is not None:
            _require_suffix("video", self.video, FILMS)
        return self


class Export(Part):
    """What is written."""

    checkpoint: Text | None = Field(None, description="whose policy it is; has to be given")
    output: Text | None = Field(
        None,
        description="the file: .pt2, a program of PyTorch, .onnx, or .npz, arrays; has to be given",
    )

    @model_validator(mode="after")
    def _is_complete(self) -> Export:
        _require("checkpoint", self.checkpoint)
        _require("output", self.output)
        _require_suffix("output", str(self.output), FILES)
        return self


class Estimation(Part):
    """What is estimated, and from what."""

    checkpoint: Text | tuple[Text, ...] | None = Field(
        None, description="whose policy is judged, or [a,b,c] to be ranked; has to be given"
    )
    dataset: Text | tuple[Text, ...] | None = Field(
        None,
        description="to judge by, as of offline.py; null: what the runs of the checkpoints learned from",
    )
    layout: dict | None = Field(
        None,
        description="of CSV, Parquet, NPZ and HDF5 files, as of offline.py; null: that of the runs",
    )
    episodes: Literal["as_stored", "until_success"] | None = Field(
        None, description="until_success: they end at the first success; null: as in the runs"
    )
    fit_on: Literal["all", "learned", "held_out"] = Field(
        "all",
        description="all episodes, those learned from, or those that validation= held out",
    )
    discount: Fraction | None = Field(
        None, description="of rewards, per step; null: that of the runs, or 0.99 if they have none"
    )
    log_prob: Text | None = Field(
        None,
        description="the info with the log-probability of every action under who recorded it, for weighted "
        "importance sampling beside fitted Q; null: not known",
    )
    networks: Count = Field(5, description="each on its own draw of episodes, with replacement")
    hidden_sizes: tuple[Count, ...] = Field((256, 256), description="units of every hidden layer")
    steps: Count = Field(10_000, description="gradient steps for each checkpoint")
    batch_size: Count = Field(256, description="transitions")
    learning_rate: Positive = Field(1e-3, description="of Adam, falls to 0 by half a cosine")
    target_rate: Rate = Field(0.05, description="of the target networks, per gradient step")
    seed: Natural = Field(0, description="of networks, draws and minibatches")
    output: Text | None = Field(
        None,
        description="a file for the results, .json; the page of a run shows estimate*.json in its folder",
    )
    trust_env: Flag = Field(
        False,
        description="the environment that the checkpoints name may run code that nobody has registered here",
    )

    @model_validator(mode="after")
    def _is_complete(self) -> Estimation:
        if not self.checkpoint:
            raise ValueError("give checkpoint=<file>, or checkpoint=[<file>,<file>]")
        if self.output is not None:
            _require_suffix("output", self.output, (".json",))
        return self

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Those that are given."""
        given = self.checkpoint or ()
        return (given,) if isinstance(given, str) else given


def _require(name: str, value: str | None) -> None:
    if value is None:
        raise ValueError(f"give {name}=<file>")


def _require_suffix(name: str, value: str, known: tuple[str, ...]) -> None:
    if Path(value).suffix not in known:
        raise ValueError(f"{name}={value}: expected a file that ends in {' or '.join(known)}")
    if not (folder := Path(value).parent).is_dir():
        raise ValueError(f"{name}={value}: there is no folder {folder}")
