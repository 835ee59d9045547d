"""Images: bytes from the data to the networks, which see them channels first through convolutions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch.nn import functional as F

from episodes import MARKS, leaves, record, walk, write
from runs import TINY, rows
from torchrl_iql import load_dataset, load_policy, models
from torchrl_iql.data import OfflineDataset
from torchrl_iql.data.report import report
from torchrl_iql.models import Architecture
from torchrl_iql.spaces import images_of, observed_rows
from torchrl_iql_recipes.experiment import offline, online
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.training import OFFLINE, ONLINE

pytestmark = MARKS

CAMERA = spaces.Box(0, 255, (40, 36, 3), np.uint8)
JOINTS = spaces.Box(-2, 2, (2,), np.float32)


class Lamp(gymnasium.Env):
    """A lamp that is moved sideways, seen by a camera, with or without its position."""

    def __init__(self, with_joints: bool) -> None:
        both: dict[str, spaces.Space] = {"camera": CAMERA, "joints": JOINTS}
        self.observation_space = spaces.Dict(both) if with_joints else CAMERA
        self.action_space = spaces.Box(-1, 1, (1,))
        self.with_joints = with_joints

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.place = float(self.np_random.uniform(-2, 2))
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.place = float(np.clip(self.place + 0.5 * action[0], -2, 2))
        return self._seen(), -abs(self.place), abs(self.place) < 0.1, False, {}

    def _seen(self) -> Any:
        image = np.zeros(CAMERA.shape, np.uint8)
        column = int((self.place + 2) / 4 * 30)
        image[5:30, column : column + 5] = 255, 128, 3
        joints = np.array([self.place, 1.0], np.float32)
        return {"camera": image, "joints": joints} if self.with_joints else image


for kind in (False, True):
    gymnasium.register(
        f"Lamp{'Joints' if kind else ''}-v0",
        "test_images:Lamp",
        max_episode_steps=12,
        kwargs={"with_joints": kind},
    )


def recorded(name: str) -> str:
    env = gymnasium.make(name)
    env.action_space.seed(0)
    played = [record(env, seed, lambda _: env.action_space.sample()) for seed in range(6)]
    return write(
        *played, dataset_id=f"test/{name.lower()}", env=gymnasium.spec(name), jpeg_encoding=False
    )


@pytest.mark.parametrize("name", ["Lamp-v0", "LampJoints-v0"])
def test_the_recipes_train_on_images(name: str, tmp_path: Path) -> None:
    source = recorded(name)
    for algorithm in ("iql", "bc"):
        given = [
            *TINY,
            f"dataset={source}",
            "trust_env=true",
            "encoder=cnn",
            f"algorithm={algorithm}",
        ]
        offline.run(OFFLINE.settings(given), tmp_path / algorithm)
        (policy,) = {load_policy(tmp_path / algorithm / "last.ckpt")}
        (vision,) = (part for part in policy.modules() if isinstance(part, models.Vision))
        assert vision.images == [(0, CAMERA.shape)]
        assert len(rows(tmp_path / algorithm)) == 2
    given = [
        f"checkpoint={tmp_path}/iql/last.ckpt",
        "env_steps=20",
        "eval_episodes=1",
        "trust_env=true",
    ]
    given += ["collector.frames_per_batch=10", "log_interval=5", "compute.execution=eager"]
    scores = online.run(ONLINE.settings(given), tmp_path / "online")
    assert scores["replicas"]
    with pytest.raises(SettingsError, match="encoder: the checkpoint has networks of its own"):
        ONLINE.settings([*given, "encoder=mlp"])


def test_images_that_are_not_what_was_seen_are_named() -> None:
    """A camera in JPEG is Minari's default; joints beside it are no picture."""
    space = spaces.Dict({"camera": CAMERA, "joints": spaces.Box(-1, 1, (2,))})
    pixels = np.random.default_rng(0).integers(0, 256, (7, *CAMERA.shape), np.uint8)
    seen = {"camera": pixels, "joints": np.zeros((7, 2), np.float32)}
    for number, jpeg in enumerate((True, False)):
        options = {"observation_space": space, "jpeg_encoding": jpeg}
        name = write(walk(6, observations=seen), dataset_id=f"test/jpeg-v{number}", **options)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            dataset = load_dataset(name)
        kept = dataset.transitions["observation"][:, :-2].reshape(6, *CAMERA.shape).numpy()
        assert (kept == pixels[:6]).all() == (not jpeg)
        assert any("images are stored as JPEG" in str(each.message) for each in told) == jpeg
        (line,) = (
            line for line in str(report(dataset)).splitlines() if line.startswith("observation")
        )
        assert line.endswith("4,322 columns: camera [40, 36, 3] uint8, joints [2] float32")


@pytest.mark.parametrize("entrance", ["arrays", "tensordict"])
def test_a_dictionary_keeps_its_space(entrance: str) -> None:
    """Its images are seen by a network, and stored as images."""
    rng = np.random.default_rng(0)
    seen = {
        "joints": rng.normal(size=(9, 2)).astype(np.float32),
        "camera": rng.integers(0, 256, (9, *CAMERA.shape), np.uint8),
    }
    here, after = (
        {key: its[rows] for key, its in seen.items()} for rows in (np.s_[:-1], np.s_[1:])
    )
    given: dict[str, Any] = {"actions": np.zeros((8, 1), np.float32), "rewards": np.zeros(8)}
    ends = {"terminals": np.zeros(8, bool), "timeouts": np.arange(8) == 7}
    if entrance == "arrays":
        dataset = OfflineDataset.from_arrays(
            "arm", observations=here, next_observations=after, **given, **ends
        )
    else:
        tensors: Any = {
            **here,
            "action": given["actions"],
            "next": {**after, "reward": given["rewards"], "terminated": ends["terminals"]},
        }
        tensors["next"]["truncated"] = ends["timeouts"]
        dataset = OfflineDataset.from_tensordict(
            "arm", TensorDict(tensors, [8]), observation_keys=["joints", "camera"]
        )
    joints = spaces.Box(-np.inf, np.inf, (2,))
    assert dataset.observation_space == spaces.Dict({"camera": CAMERA, "joints": joints})
    assert images_of(dataset.observation_space, 36) == [(0, list(CAMERA.shape))]
    dataset.save_minari("own/arm-v0")
    (stored,) = minari.load_dataset("own/arm-v0").iterate_episodes()
    for key, values in seen.items():
        np.testing.assert_array_equal(stored.observations[key], values)
    again = load_dataset("own/arm-v0")
    assert leaves(again.transitions) == leaves(dataset.transitions)
    assert again.observation_space == dataset.observation_space


def test_a_camera_that_is_scaled_is_refused() -> None:
    space = spaces.Dict({"camera": CAMERA, "joints": spaces.Box(-1, 1, (2,))})
    seen = {"camera": np.full(CAMERA.shape, 51, np.uint8), "joints": np.zeros(2)}
    rows, _ = observed_rows(space, {**seen, "camera": seen["camera"].astype(float)})
    assert (rows[0, :-2] == 51).all()
    with pytest.raises(ValueError, match=r"observation/camera\[0, 0\] is 0.2, expected 0, 1, "):
        observed_rows(space, {**seen, "camera": seen["camera"] / 255})


def test_discrete_actions_and_data_without_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (13, 40, 36, 3), np.uint8)
    actions = {"actions": np.arange(12) % 3}
    write(
        walk(12, observations=images, **actions),
        observation_space=CAMERA,
        action_space=spaces.Discrete(3),
        jpeg_encoding=False,
    )
    assert load_dataset("test/walks-v0").transitions["observation"].dtype is torch.uint8
    given = [*TINY, "dataset=test/walks-v0", "eval_episodes=0", "encoder=cnn"]
    offline.run(OFFLINE.settings(given), tmp_path / "discrete")
    policy = load_policy(tmp_path / "discrete/last.ckpt")
    assert policy(observation=torch.from_numpy(images.reshape(13, -1)))[-1].shape == (13,)
    write(walk(20), dataset_id="test/vectors-v0")
    with pytest.raises(
        SettingsError, match=r"^encoder=cnn: test/vectors-v0 has no images, of bytes and at"
    ):
        offline.run(OFFLINE.settings([*given, "dataset=test/vectors-v0"]), tmp_path / "none")
    with pytest.raises(
        SettingsError, match=r"^encoder=cnn: the Decision Transformer here sees no images"
    ):
        settings = OFFLINE.settings(
            [*given, "dataset=test/lamp-v0", "algorithm=dt", "hidden_sizes=[8]"]
        )
        recorded("Lamp-v0")
        offline.run(settings, tmp_path / "dt")


def test_what_is_seen_is_the_image_and_the_rest() -> None:
    """Against convolutions by hand, on images as the space has them."""
    space = spaces.Dict(
        {
            "a": spaces.Box(-9, 9, (2,)),
            "camera": CAMERA,
            "depth": spaces.Box(0, 255, (36, 37), np.uint8),
            "stack": spaces.Box(0, 255, (4, 36, 36), np.uint8),
            "z": spaces.Box(-9, 9, (3,)),
        }
    )
    space.seed(0)
    seen = [space.sample() for _ in range(5)]
    flat = torch.from_numpy(np.stack([spaces.flatten(space, each) for each in seen])).float()
    size = flat.shape[-1]
    images = images_of(space, models.SMALLEST)
    assert [shape for _, shape in images] == [[40, 36, 3], [36, 37], [4, 36, 36]]
    mean, std = torch.randn(size), torch.rand(size) + 0.5
    torch.manual_seed(0)
    vision = models.Vision(size, images, (mean, std))
    rest = np.stack([np.concatenate([each["a"], each["z"]]) for each in seen])
    is_rest = [0, 1, size - 3, size - 2, size - 1]
    expected = [(torch.from_numpy(rest) - mean[is_rest]) / std[is_rest]]
    for (key, order), network in zip(
        {"camera": (0, 3, 1, 2), "depth": None, "stack": (0, 1, 2, 3)}.items(),
        vision.convolutions,
        strict=True,
    ):
        pixels = torch.from_numpy(np.stack([each[key] for each in seen])).float() / 255
        x = pixels.unsqueeze(1) if order is None else pixels.permute(order)
        convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
        for layer, stride in zip(convolutions, (4, 2, 1), strict=True):
            x = F.relu(F.conv2d(x, layer.weight, layer.bias, stride))
        expected.append(x.flatten(1))
    torch.testing.assert_close(vision(flat), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vision(flat[None, :, None]), vision(flat)[None, :, None])


def test_vectors_have_the_networks_that_they_had() -> None:
    architecture = Architecture(observation_size=3, action_size=2, action_bounds=([-1, -1], [1, 1]))
    for network in architecture.build():
        assert not [part for part in network.modules() if isinstance(part, models.SeeingTorso)]


def test_images_that_are_too_small() -> None:
    assert images_of(spaces.Box(0, 255, (7, 7, 3), np.uint8), models.SMALLEST) == []
    assert images_of(spaces.Box(0, 1, (64, 64, 3), np.float32), models.SMALLEST) == []
    with pytest.raises(
        ValueError, match=r"an image has shape \[35, 64, 3\], expected at least 36 x 36"
    ):
        models.Vision(35 * 64 * 3, [(0, [35, 64, 3])])


def test_an_archive_of_images_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "log.npz"
    images = rng.integers(0, 256, (9, 40, 36, 3), np.uint8)
    given = {"frames": images, "u": rng.uniform(-1, 1, (9, 2)), "r": np.ones(9), "end": np.zeros(9)}
    np.savez(path, **given)  # pyright: ignore
    layout = {"observations": "frames", "actions": "u", "rewards": "r", "terminals": "end"}
    found: OfflineDataset = load_dataset(path, layout=layout)
    assert found.observation_space == CAMERA
    seen = found.transitions["observation"]
    assert seen.dtype is torch.uint8
    np.testing.assert_array_equal(seen.numpy().reshape(8, 40, 36, 3), images[:-1])
