"""An episode as it looks: a video, or a strip of its frames."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import RenderCollection
from tensordict.nn import TensorDictModuleBase

from torchrl_iql import Evaluator
from torchrl_iql.environments import flat_environment
from torchrl_iql_recipes.experiment.schema import SettingsError, is_installed
from torchrl_iql_recipes.files import whole

__all__ = ["require", "write"]

FRAMES = 12
"""Of a strip, in two rows."""

FPS = 30
"""Where an environment does not say."""


def require(path: Path, spec: EnvSpec) -> None:
    """Find out whether a film can be made, by its first frame.

    Raises:
        SettingsError: a package is not installed, or this machine or the environment can not render.
    """
    if path.suffix == ".mp4" and not is_installed("imageio_ffmpeg"):
        raise SettingsError(
            f"video={path}: .mp4 needs imageio-ffmpeg, pip install 'torchrl-iql[video]'; .png does not"
        )
    try:
        with warnings.catch_warnings():  # of a backend that is not there, before another is tried
            warnings.simplefilter("ignore")
            env = _rendered(spec)
            try:
                env.reset(seed=0)
                frame = env.render()
            finally:
                env.close()
    except Exception as error:  # of OpenGL, of MuJoCo, of the environment
        reason = " ".join(str(error).split())
        if not isinstance(error, gymnasium.error.DependencyNotInstalled):
            reason += " (MuJoCo renders without a screen by EGL or OSMesa, libegl1 or libosmesa6)"
        raise SettingsError(
            f"video={path}: {spec.id} can not be rendered on this machine: {reason}"
        ) from error
    if not isinstance(frame, np.ndarray):
        raise SettingsError(
            f"video={path}: {spec.id} has no pictures, its render() gives {frame!r}"
        )


def write(path: Path, spec: EnvSpec, policy: TensorDictModuleBase, seed: int) -> None:
    """Play an episode and film it.

    Args:
        path: of the film; an old one is replaced.
        spec: the environment.
        policy: who plays.
        seed: of the episode.
    """
    films: list[RenderCollection] = []

    def make() -> gymnasium.Env:
        films.append(RenderCollection(_rendered(spec), pop_frames=False))
        return films[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Evaluator(make, episodes=1, seed=seed) as evaluate:
            evaluation = evaluate(policy)
            frames = np.stack(films[0].frame_list)
    if path.suffix == ".mp4":
        fps = films[0].metadata.get("render_fps", FPS)
        _video(path, frames, fps)
    else:
        _strip(path, frames, f"{spec.id}, return {evaluation.returns[0]:.1f}")


def _rendered(spec: EnvSpec) -> gymnasium.Env:
    env = flat_environment(replace(spec, kwargs={**spec.kwargs, "render_mode": "rgb_array"}))
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and renderer.camera_id == -1:
        # Gymnasium 1.4 looks from where it stands, and whoever walks leaves the picture.
        renderer.camera_id = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    return env


def _video(path: Path, frames: np.ndarray, fps: float) -> None:
    import imageio.v2 as imageio

    # Players want even sides.
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    content = imageio.mimwrite(imageio.RETURN_BYTES, even, "mp4", fps=fps, macro_block_size=2)  # pyright: ignore
    with whole(path) as new:
        new.write_bytes(content)


def _strip(path: Path, frames: Sequence[np.ndarray] | np.ndarray, title: str) -> None:
    from matplotlib.figure import Figure

    steps = np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for place, axes in zip(steps, figure.subplots(2, FRAMES // 2).flat, strict=False):
        axes.imshow(frames[place])
        axes.set_title(f"step {place}", fontsize=9)
    for axes in figure.axes:
        axes.axis("off")
    figure.suptitle(title)
    with whole(path) as new:
        figure.savefig(new, format="png", dpi=120)
