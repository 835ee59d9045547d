"""What is recorded of a run while it lasts: metrics, evaluations and checkpoints of all its learners."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from tqdm import tqdm

from torchrl_iql import Evaluation, TrainStep, checkpoint
from torchrl_iql.models import Architecture
from torchrl_iql_recipes.experiment import plots, progress
from torchrl_iql_recipes.experiment.evaluations import Evaluations, Round
from torchrl_iql_recipes.experiment.folder import RunFolder, newest_common_step
from torchrl_iql_recipes.experiment.loggers import logger_for
from torchrl_iql_recipes.experiment.settings import OFFLINE_PHASE, Settings, check_continued
from torchrl_iql_recipes.files import whole

__all__ = ["Records", "Times"]


class Records:
    """The folders of all learners of a run; as a context, also what is told to their loggers.

    Enter it once the run was resumed, if it is to be: a logger goes on after the last line that is left.

    Args:
        path: of the run. A learner that is not alone has a folder of its own name there.
        settings: of the run.
        step: what trains the learners.
        architecture: of their networks.
        dataset: the name of what they learn from.

    Attributes:
        folders: one per learner.
        latest: the last evaluation of each learner, None before the first.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        step: TrainStep,
        architecture: Architecture,
        dataset: str,
    ) -> None:
        self.settings = settings
        self.step = step
        self.architecture = architecture
        self.folders = [RunFolder(path / learner.name) for learner in settings.learners]
        self.latest: Sequence[Evaluation] | None = None
        self._path = path
        self._dataset = dataset

    def __enter__(self) -> Records:
        with ExitStack() as loggers:
            for learner, folder in zip(self.settings.learners, self.folders, strict=True):
                logger = logger_for(self.settings, learner, self._path, folder.newest())
                if logger is not None:
                    loggers.push(logger)
                    folder.tell(logger)
            self._loggers = loggers.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loggers.__exit__(kind, error, traceback)

    # --- Metrics -----------------------------------------------------------------------------------------

    def log(self, metrics: TensorDictBase, **common: float) -> str:
        """Write a line of metrics for every learner, and at the first one how many weights are clipped.

        Args:
            metrics: of the last gradient step.
            **common: others, the same for all learners.

        Returns:
            what a progress bar shows.
        """
        values = {key: value.reshape(-1).tolist() for key, value in metrics.items()}
        shares = values.get("clip_fraction")
        if shares is not None and not self.folders[0].has("clip_fraction"):
            tqdm.write("\n".join(progress.clipped(self.settings, self.step.steps, shares)))
        values["policy_lr"] = self.step.learning_rates()["actor_network"]
        for r, folder in enumerate(self.folders):
            own = {key: value[r] for key, value in values.items()}
            folder.log(self.step.steps, common | own)
        losses = {key[5:]: value for key, value in values.items() if key.startswith("loss_")}
        scores = self.latest and [evaluation.score for evaluation in self.latest]
        return progress.figures(self.settings, losses, scores)

    # --- Evaluations -------------------------------------------------------------------------------------

    def policies(self) -> list[dict[str, Tensor]]:
        """Return the state of each learner's policy."""
        return [loss.get_stateful_net("actor_network").state_dict() for loss in self.step.losses]

    def evaluate(self, evaluations: Evaluations | None) -> None:
        """Start a round, once the one before is over."""
        if evaluations is not None:
            self.evaluated(evaluations, wait=True)
            evaluations.start(self.step.steps, self.policies())
            self.evaluated(evaluations)

    def evaluated(self, evaluations: Evaluations | None, *, wait: bool = False) -> None:
        """Take note of a round that is over."""
        for its in () if evaluations is None else evaluations.finished(wait=wait):
            self._note(its)

    def _note(self, its: Round) -> None:
        self.latest = its.evaluations
        for folder, evaluation in zip(self.folders, its.evaluations, strict=True):
            folder.log(its.step, {f"eval/{k}": v for k, v in evaluation.summary().items()})
            folder.name_checkpoints()

    # --- Checkpoints -------------------------------------------------------------------------------------

    def save(self, components: Mapping[str, Any] = MappingProxyType({}), **metadata: Any) -> None:
        """Write a checkpoint of every learner; if killed meanwhile, the ones before remain."""
        for r, (learner, folder) in enumerate(
            zip(self.settings.learners, self.folders, strict=True)
        ):
            checkpoint.save(
                folder.rotation,
                self.step,
                self.architecture,
                replica=r,
                components=components,
                best=folder.best_score(),
                dataset=self._dataset,
                config=self.settings.of_learner(learner),
                **metadata,
            )
        for folder in self.folders:
            folder.name_checkpoints()

    def resume(self, components: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any] | None:
        """Return to the newest step of which every learner has a checkpoint.

        Returns:
            the metadata of the first learner's; None if a run begins.

        Raises:
            SettingsError: a checkpoint was trained with other settings than the run has.
        """
        step, saved = newest_common_step(self.folders), None
        for r, folder in reversed(list(enumerate(self.folders))):
            if step is not None:
                path = folder.checkpoints()[step]
                self._check_settings(r, checkpoint.load_metadata(path).get("config"))
                saved = checkpoint.load_learner(path, self.step, replica=r, components=components)
            folder.return_to(-1 if step is None else step)
        return saved

    def _check_settings(self, replica: int, trained_with: dict[str, Any] | None) -> None:
        """Refuse what neither the command line nor the run has said: somebody has edited config.yaml."""
        if trained_with is not None:
            learner, folder = self.settings.learners[replica], self.folders[replica].path
            known = Settings.of({**trained_with, "task": self.settings.values["task"]}).values
            asked = Settings.of(self.settings.of_learner(learner)).values
            check_continued(folder, known, asked, self.settings.later(folder) | {*OFFLINE_PHASE})

    def has_evaluated(self) -> bool:
        """Return whether every learner has been evaluated as it is now."""
        return all(self.step.steps in folder.scores() for folder in self.folders)

    # --- Pictures ----------------------------------------------------------------------------------------

    def draw(self, evaluations: Evaluations | None, **earlier: Any) -> None:
        """Draw learning curves, and in a maze the learned V with a few evaluation trajectories.

        Args:
            evaluations: say whether a maze was played in.
            **earlier: of :func:`plots.learning_curves`.
        """
        maze = evaluations and evaluations.maze
        for r, folder in enumerate(self.folders):
            if folder.metrics.exists():
                plots.learning_curves(
                    folder.metrics, folder.path / "learning_curves.png", **earlier
                )
            value = self._value_function(r)
            if maze is not None and self.latest is not None and value is not None:
                trajectories = self.latest[r].trajectories or []
                plots.value_map(value, maze, trajectories[:5], folder.path / "value_map.png")

    def _value_function(self, replica: int) -> Callable[[np.ndarray], np.ndarray] | None:
        loss = self.step.losses[replica]
        if "value_network_params" not in loss._modules:
            return None
        value = loss.get_stateful_net("value_network").eval()

        @torch.no_grad()
        def v(observations: np.ndarray) -> np.ndarray:
            batch = torch.as_tensor(observations, device=self.step.device)
            return value(batch).squeeze(-1).cpu().numpy()

        return v


class Times:
    """How long a run took: ``times.json``, a file of its own, since the others are the same in every run.

    Args:
        path: of the run.
        step: what trains.
    """

    def __init__(self, path: Path, step: TrainStep) -> None:
        self._file = path / "times.json"
        self._step = step
        self._from = step.steps
        self._started = datetime.now(UTC)
        self._began = time.monotonic()

    def write(self, evaluations: Evaluations | None) -> None:
        """Add a line for the time since this was made."""
        lines = json.loads(self._file.read_text()) if self._file.exists() else []
        seconds = time.monotonic() - self._began
        line = {
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "waited_for_evaluations": round(evaluations.waited if evaluations else 0.0, 3),
            "from_step": self._from,
            "to_step": self._step.steps,
        }
        with whole(self._file) as new:
            new.write_text(json.dumps([*lines, line], indent=2) + "\n")
