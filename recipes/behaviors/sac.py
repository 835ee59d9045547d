"""Soft Actor-Critic, by TorchRL's loss and collector, for the policies that data sets are made with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import SACLoss

from torchrl_iql import TrainStep
from torchrl_iql.checkpoint import load_tensors
from torchrl_iql.training import NonFiniteError
from torchrl_iql_recipes.behaviors.ant import ANT_TO_GOAL
from torchrl_iql_recipes.behaviors.policies import Stages, actor
from torchrl_iql_recipes.behaviors.recording import record
from torchrl_iql_recipes.behaviors.settings import SoftActorCritic
from torchrl_iql_recipes.experiment import build, nonfinite, progress
from torchrl_iql_recipes.experiment.folder import RunFolder
from torchrl_iql_recipes.experiment.lock import held
from torchrl_iql_recipes.experiment.schema import RunError
from torchrl_iql_recipes.experiment.settings import Compute, command_to_resume
from torchrl_iql_recipes.experiment.stopping import stoppable

ENVIRONMENTS: dict[str, EnvSpec] = {
    "hopper": gymnasium.spec("Hopper-v5"),
    "halfcheetah": gymnasium.spec("HalfCheetah-v5"),
    "walker2d": gymnasium.spec("Walker2d-v5"),
    "ant": ANT_TO_GOAL,
}

EVALUATION_SEED = 10_000
CHECKPOINT_EVERY = 4  # stages


class Critic(torch.nn.Module):
    def __init__(self, inputs: int, hidden_sizes: list[int]) -> None:
        super().__init__()
        self.mlp = MLP(
            in_features=inputs,
            out_features=1,
            num_cells=hidden_sizes,
            activation_class=torch.nn.ReLU,
        )

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.cat([observation, action], dim=-1))


class Training:
    """SAC on one environment: its networks, its replay buffer and the stages kept so far."""

    def __init__(self, cfg: SoftActorCritic, path: Path) -> None:
        self.cfg = cfg
        self.folder = RunFolder(path)
        env = gymnasium.make(ENVIRONMENTS[cfg.behavior])
        self.evaluation_env = gymnasium.make(ENVIRONMENTS[cfg.behavior])
        torch.manual_seed(cfg.seed)
        self.env = TransformedEnv(GymWrapper(env), DoubleToFloat(in_keys=["observation"]))
        (observation_size,) = env.observation_space.shape or ()
        (action_size,) = env.action_space.shape or ()
        self.sizes = (observation_size, action_size, list(cfg.actor_sizes))
        self.actor = actor(*self.sizes)
        critic = Critic(observation_size + action_size, list(cfg.critic_sizes))
        loss = SACLoss(
            self.actor,
            ValueOperator(critic, in_keys=["observation", "action"]),
            loss_function="l2",
            action_spec=self.env.action_spec,
        )
        loss.make_value_estimator(gamma=cfg.discount)
        self.step = TrainStep(
            loss,
            learning_rate=cfg.learning_rate,
            target_rate=cfg.target_rate,
            execution=cfg.execution,
        )
        self.buffer = ReplayBuffer(storage=LazyTensorStorage(cfg.frames), batch_size=cfg.batch_size)
        self.frames = 0
        self.stages: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        if checkpoints := _checkpoints(path):
            self._resume(checkpoints[-1])
        else:
            self.folder.return_to(-1)

    def train(self) -> None:
        """Collect and update in turns. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end it."""
        cfg = self.cfg
        # Not collector.set_seed: it resets the environment, but not the observation that it acts on.
        self.env.set_seed(cfg.seed + self.frames)
        collector = Collector(
            self.env,
            self.actor,
            frames_per_batch=cfg.frames_per_batch,
            total_frames=cfg.frames - self.frames,
            init_random_frames=max(0, cfg.random_frames - self.frames) or None,
            auto_register_policy_transforms=False,  # no policy here needs to know where it began
        )
        with (
            stoppable() as stop,
            stop.patient(),
            progress.bar(cfg.behavior, self.frames, cfg.frames) as bar,
        ):
            for batch in collector:
                self.buffer.extend(_transitions(batch))
                self.frames += len(batch)
                bar.update(len(batch))
                metrics = self._update() if self.frames > cfg.random_frames else {}
                if self.frames % cfg.stage_interval == 0:
                    self._keep_stage(metrics)
                    bar.set_postfix({"return": self.stages[-1][1]})
                if stop.requested:
                    break
        collector.shutdown()
        self._save()

    def _update(self) -> dict[str, float]:
        losses = {}
        due = int((self.frames - self.cfg.random_frames) * self.cfg.updates_per_frame)
        while self.step.steps < due:
            losses = self.step(self.buffer.sample())
        return {key: value.mean().item() for key, value in losses.items()}

    def _keep_stage(self, metrics: dict[str, float]) -> None:
        self.step.check_finite()
        weights = {key: value.clone() for key, value in self.actor.state_dict().items()}
        self.stages.append((self.frames, 0.0, weights))
        score = self._evaluate()
        self.stages[-1] = (self.frames, score, weights)
        self.folder.log(self.frames, {**metrics, "return": score})
        self.result().save(self.folder.path / "stages.pt")
        if len(self.stages) % CHECKPOINT_EVERY == 0:
            self._save()

    def _evaluate(self) -> float:
        """Play the last stage as it does for data, stochastically, and return its mean return."""
        sample, rng = self.result().sampler(-1), np.random.default_rng(self.frames)
        episodes = [
            record(self.evaluation_env, lambda state: sample(state, rng), seed=EVALUATION_SEED + i)
            for i in range(self.cfg.eval_episodes)
        ]
        return float(np.mean([sum(episode.rewards) for episode in episodes]))

    def result(self) -> Stages:
        frames, returns, weights = zip(*self.stages, strict=True)
        return Stages(
            sizes=self.sizes,
            frames=torch.tensor(frames),
            returns=torch.tensor(returns),
            weights={key: torch.stack([each[key] for each in weights]) for key in weights[0]},
        )

    # --- Checkpoints ---------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step.state_dict(),
            "frames": self.frames,
            "stages": self.stages,
        }

    def _save(self) -> None:
        """Replace the checkpoint in one piece."""
        earlier = _checkpoints(self.folder.path)
        folder = self.folder.path / f"checkpoint-{self.frames:09}"
        unfinished = folder.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        self.buffer.dumps(unfinished / "buffer")
        torch.save(self._state(), unfinished / "state.pt")
        if folder not in earlier:
            unfinished.rename(folder)
        for each in {*earlier, unfinished} - {folder}:
            shutil.rmtree(each, ignore_errors=True)

    def _resume(self, folder: Path) -> None:
        state = load_tensors(folder / "state.pt")
        # Not buffer.loads: a training that was extended has a larger one.
        rows = TensorDict.load_memmap(folder / "buffer/storage", allow_pickle=False)
        self.buffer.extend(rows[: state["frames"]])
        self.step.load_state_dict(state["step"])
        self.frames, self.stages = state["frames"], state["stages"]
        self.folder.return_to(self.frames)
        torch.manual_seed(self.cfg.seed + self.frames)


def _checkpoints(path: Path) -> list[Path]:
    """List the folders, the newest last."""
    return sorted(path.glob("checkpoint-*[0-9]"))


def _transitions(batch: TensorDictBase) -> TensorDictBase:
    """Select what the loss and the data sets need of what was collected."""
    next_keys = ("observation", "reward", "done", "terminated", "truncated")
    return batch.select("observation", "action", *(("next", key) for key in next_keys))


def run(settings: SoftActorCritic, path: Path) -> None:
    """Train, or go on with a training, in a folder."""
    build.set_up(Compute(threads=settings.threads))
    with held(path):
        for saved in _checkpoints(path):
            build.check_not_done("frames", settings.frames, int(saved.name.rpartition("-")[2]))
        build.claim(path, settings)
        training = Training(settings, path)
        try:
            training.train()
        except NonFiniteError as error:
            raise RunError(
                f"{nonfinite.saved(error, path)}; stages that were kept before stay"
            ) from error
    stages = path / "stages.pt" if training.stages else "none yet"
    print(f"{training.frames} steps, stages: {stages}")
    if training.frames < settings.frames:
        print(f"Interrupted. Continue with: {command_to_resume('sac', path)}")
