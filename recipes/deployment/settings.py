"""The settings of evaluate.py and of export.py."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from torchrl_iql_recipes.experiment.schema import Count, Flag, Natural, Part, Text, written

__all__ = ["Export", "Play"]

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


def _require(name: str, value: str | None) -> None:
    if value is None:
        raise ValueError(f"give {name}=<file>")


def _require_suffix(name: str, value: str, known: tuple[str, ...]) -> None:
    if Path(value).suffix not in known:
        raise ValueError(f"{name}={value}: expected a file that ends in {' or '.join(known)}")
    if not (folder := Path(value).parent).is_dir():
        raise ValueError(f"{name}={value}: there is no folder {folder}")
