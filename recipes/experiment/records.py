"""What is recorded of a run while it lasts: metrics, evaluations and checkpoints of all its learners."""

from __future__ import annotations

import csv
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import torchrl_iql
from torchrl_iql import Evaluation, OfflineDataset, TrainStep, checkpoint
from torchrl_iql.models import Architecture
from torchrl_iql_recipes.experiment import progress
from torchrl_iql_recipes.experiment.evaluations import Evaluations, Round
from torchrl_iql_recipes.experiment.folder import RunFolder, newest_common_step
from torchrl_iql_recipes.experiment.loggers import logger_for
from torchrl_iql_recipes.experiment.schema import RunError, written
from torchrl_iql_recipes.experiment.settings import OFFLINE_PHASE, Settings, check_continued
from torchrl_iql_recipes.experiment.stopping import Stop
from torchrl_iql_recipes.experiment.validation import HeldOut
from torchrl_iql_recipes.files import rows, whole

__all__ = ["Records"]


class EvaluationError(RuntimeError):
    """An evaluation failed, and the run is to stop then."""


class Records:
    """The folders of all learners of a run; as a context, also what is told to their loggers.

    Enter it once the run was resumed, if it is to be: a logger goes on after the last line that is left, and
    its time begins to count.

    Args:
        path: of the run. A learner that is not alone has a folder of its own name there.
        settings: of the run.
        step: what trains the learners.
        architecture: of their networks.
        dataset: what they learn from.
        evaluations: of the learners, if there are any.
        held_out: what they are looked at with beside them, if there is anything.

    Attributes:
        folders: one per learner.
        latest: the last evaluation of each learner, None before the first, and where the last one failed.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        step: TrainStep,
        architecture: Architecture,
        dataset: OfflineDataset,
        evaluations: Evaluations | None,
        held_out: HeldOut | None = None,
    ) -> None:
        if held_out is not None:
            held_out.check(step.losses)
        best_by = settings.evaluation.best_by
        self.settings = settings
        self.step = step
        self.architecture = architecture
        self.folders = [RunFolder(path / learner.name, best_by) for learner in settings.learners]
        self.latest: list[Evaluation | None] = [None] * len(self.folders)
        self._path = path
        self._described = checkpoint.described(dataset)
        self._dataset = dataset.name
        self._evaluations = evaluations
        self._held_out = held_out
        self._unevaluated: list[int] = []  # after how many steps rounds are due
        self._losses: dict[str, list[float]] = {}
        self._whole = True
        self._saved_at = time.monotonic()

    def __enter__(self) -> Records:
        with ExitStack() as loggers:
            for learner, folder in zip(self.settings.learners, self.folders, strict=True):
                logger = logger_for(self.settings, learner, self._path, folder.newest())
                if logger is not None:
                    loggers.push(logger)
                    folder.tell(logger)
            self._loggers = loggers.pop_all()
        self._times = Times(self._path, self.step)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loggers.__exit__(kind, error, traceback)
        self._times.write(self._evaluations)

    # --- Metrics -----------------------------------------------------------------------------------------

    def log(self, **common: float) -> str:
        """Write a line of metrics for every learner, and at the first one how many weights are clipped.

        Those of the losses are means over the steps since the last line.

        Args:
            **common: others, the same for all learners.

        Returns:
            what :meth:`figures` does.
        """
        values = {key: value.reshape(-1).tolist() for key, value in self.step.means().items()}
        shares = values.get("clip_fraction")
        if shares is not None and not self.folders[0].has("clip_fraction"):
            tqdm.write("\n".join(progress.clipped(self.settings, self.step.steps, shares)))
        values["policy_lr"] = self.step.learning_rates()["actor_network"]
        for r, folder in enumerate(self.folders):
            own = {key: value[r] for key, value in values.items()}
            folder.log(self.step.steps, common | own)
        self._times.log(self._evaluations)
        descended = [key for key in values if key in self.step.entries]
        self._losses = {key.removeprefix("loss_"): values[key] for key in descended}
        return self.figures()

    def figures(self) -> str:
        """Return what a progress bar shows: the last scores, and the losses of the last line."""
        scores = [evaluation.score for evaluation in self.latest if evaluation is not None]
        known = len(scores) == len(self.latest)
        return progress.figures(self.settings, self._losses, scores if known else None)

    # --- Evaluations -------------------------------------------------------------------------------------

    def policies(self) -> list[dict[str, Tensor]]:
        """Return the state of each learner's policy."""
        return [loss.get_stateful_net("actor_network").state_dict() for loss in self.step.losses]

    def evaluate(self, save: Callable[[], None], stop: Stop) -> None:
        """Look at what is held out, save, and then start a round, once the one before is over.

        Args:
            save: writes a checkpoint, with which the run can go on if the round fails or does not end.
            stop: says whether to wait for it.
        """
        if self._held_out is not None:
            found = self._held_out(self.step.losses)
            for folder, metrics in zip(self.folders, found, strict=True):
                folder.log(self.step.steps, metrics)
        if self._evaluations is None:
            save()
            return
        self._unevaluated.append(self.step.steps)
        stop.at_once(self.wait)
        save()
        self._start(self.step.steps, stop)

    def make_up(self, stop: Stop, *, now: bool) -> None:
        """Start the rounds that had not come to an end when the run was saved.

        Args:
            stop: says whether to wait for them.
            now: whether one is due in any case, of a run that is over, for its results.
        """
        if now and self.step.steps not in self._unevaluated:
            self._unevaluated.append(self.step.steps)
        for at in [*self._unevaluated]:
            self._start(at, stop)

    def _start(self, at: int, stop: Stop) -> None:
        if self._evaluations is None or not all(at in each.checkpoints() for each in self.folders):
            self._unevaluated.remove(at)  # somebody has made room
            return
        policies = self.policies()
        if at != self.step.steps:
            saved = [checkpoint.load_policy(folder.checkpoints()[at]) for folder in self.folders]
            policies = [policy.state_dict() for policy in saved]
        stop.at_once(self.wait)
        stop.at_once(partial(self._evaluations.start, at, policies))
        self.evaluated()

    def evaluated(self, *, wait: bool = False) -> None:
        """Take note of a round that is over.

        Raises:
            EvaluationError: one has failed, and the run is to stop then.
        """
        for its in () if self._evaluations is None else self._evaluations.finished(wait=wait):
            self._note(its)

    @property
    def are_due(self) -> bool:
        """Whether evaluations are not over that were to be made: the run goes on with them."""
        return self._evaluations is not None and bool(self._unevaluated)

    def wait(self) -> None:
        """Take note of the round that is under way, when it is over."""
        self.evaluated(wait=True)

    def _note(self, its: Round) -> None:
        failed = []
        for r, (folder, outcome) in enumerate(zip(self.folders, its.outcomes, strict=True)):
            if isinstance(outcome, Exception):
                self.latest[r] = None
                folder.log(its.step, {"eval/failed": 1.0})
                failed.append((self.settings.learners[r].name, outcome))
                continue
            self.latest[r] = outcome
            folder.log(its.step, {f"eval/{k}": v for k, v in outcome.summary().items()})
            folder.name_checkpoints()
        if failed:
            name, error = failed[0]
            whom = f" of {name}" * bool(name) + f" and {len(failed) - 1} more" * (len(failed) > 1)
            message = f"the evaluation{whom} after {its.step} steps failed: {type(error).__name__}: {error}"
            if self.settings.evaluation.on_eval_failure == "stop":
                raise EvaluationError(message) from error
            note = f"{message}; training goes on, and the next one has fresh environments"
            tqdm.write(note, file=sys.stderr)
        self._unevaluated.remove(its.step)

    # --- Checkpoints -------------------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Return whether the last checkpoint is as old as one may be.

        While a round is under way none is: that of its policies has to be there if they turn out the best.
        """
        minutes = (time.monotonic() - self._saved_at) / 60
        return not self._unevaluated and minutes >= self.settings.training.checkpoint_interval

    def save(self, components: Mapping[str, Any] = MappingProxyType({}), **metadata: Any) -> None:
        """Write a checkpoint of every learner; if killed meanwhile, the ones before remain."""
        for r, (learner, folder) in enumerate(
            zip(self.settings.learners, self.folders, strict=True)
        ):
            folder.keep()  # before the checkpoint, with whose step it goes on
            checkpoint.save(
                folder.rotation,
                self.step,
                self.architecture,
                replica=r,
                components=components,
                best=folder.best_row(),
                unevaluated=self._unevaluated,
                **self._described,
                config=self.settings.of_learner(learner),
                **metadata,
            )
        for folder in self.folders:
            folder.name_checkpoints()
        self._saved_at = time.monotonic()
        self._times.write(self._evaluations)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, learners are between two steps: what fails there leaves nothing to save."""
        self._whole = False
        yield
        self._whole = True

    @contextmanager
    def saved_on_failure(self, save: Callable[[], None], remedy: str) -> Iterator[None]:
        """Whatever fails inside, save what was learned.

        Args:
            save: writes a checkpoint.
            remedy: the command that goes on with the run.

        Raises:
            RuntimeError: instead of what was raised; it says up to where the run is saved. One of a full
                disk, or of an evaluation, is a :class:`RunError`.
        """
        try:
            yield
        except RunError:  # which says so itself
            raise
        except Exception as error:
            lost = ""
            try:
                if self._whole:
                    save()
            except Exception as another:
                lost = f" ({another})"
            step = newest_common_step(self.folders)
            saved = (
                f"nothing is saved{lost}"
                if step is None
                else f"saved are {step} of the {self.step.steps} steps taken{lost}; go on with: {remedy}"
            )
            told, kind = f"{type(error).__name__}: {error}\n{saved}", RuntimeError
            if isinstance(error, OSError | EvaluationError):  # of the world: no fault of the code
                kind = RunError
            raise kind(told) from error

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
        known = [folder.scores() for folder in self.folders]
        due = (saved or {}).get("unevaluated", [])
        self._unevaluated = [at for at in due if not all(at in scores for scores in known)]
        return saved

    def _check_settings(self, replica: int, trained_with: dict[str, Any] | None) -> None:
        """Refuse what neither the command line nor the run has said: somebody has edited config.yaml."""
        if trained_with is not None:
            learner, folder = self.settings.learners[replica], self.folders[replica].path
            known = Settings.of({**trained_with, "task": self.settings.values["task"]}).values
            asked = Settings.of(self.settings.of_learner(learner)).values
            check_continued(folder, known, asked, self.settings.later(folder) | {*OFFLINE_PHASE})

    # --- Pictures ----------------------------------------------------------------------------------------

    def draw(self, **earlier: Any) -> None:
        """Draw learning curves, and in a maze the learned V with a few evaluation trajectories.

        Args:
            **earlier: of :func:`plots.learning_curves`.
        """
        # Not at the start: it loads matplotlib.
        from torchrl_iql_recipes.experiment import plots

        maze = self._evaluations and self._evaluations.maze
        title = self.settings.algorithm.title
        if len(self.folders) > 1 and any(folder.metrics.exists() for folder in self.folders):
            plots.learners(
                self._combinations(),
                self._path / "learning_curves.png",
                title=f"{title} on {self._dataset}, {len(self.folders)} learners; of three seeds on, their "
                "mean and its 95% interval",
            )
        for r, (learner, folder) in enumerate(
            zip(self.settings.learners, self.folders, strict=True)
        ):
            its = ", ".join([f"{title} on {self._dataset}", *filter(None, [learner.name])])
            if folder.metrics.exists():
                plots.learning_curves(
                    folder.metrics, folder.path / "learning_curves.png", title=its, **earlier
                )
            if self._held_out is not None:
                png = folder.path / "calibration.png"
                self._held_out.draw(r, self.step.losses[r], png, title=its)
            value, evaluation = self._value_function(r), self.latest[r]
            if maze is not None and evaluation is not None and value is not None:
                trajectories = evaluation.trajectories or []
                png = folder.path / "value_map.png"
                plots.value_map(value, maze, trajectories[:5], png, title=its)

    def _combinations(self) -> dict[str, list[Path]]:
        """Return the metrics of the seeds of each combination of settings, by what differs."""
        varied = [axis for axis in self.settings.varied() if axis != "seed"]
        found: dict[str, list[Path]] = {}
        for learner, folder in zip(self.settings.learners, self.folders, strict=True):
            its = learner.settings()
            label = ", ".join(f"{axis}={written(its[axis])}" for axis in varied)
            if folder.metrics.exists():
                found.setdefault(label, []).append(folder.metrics)
        return found

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
    """How long a run took: files of their own, since the others are the same in every run.

    ``times.json`` has a line for each session, ``times.csv`` one for each line of metrics.

    Args:
        path: of the run.
        step: what trains.
    """

    COLUMNS = "step", "seconds", "updates_per_second"

    def __init__(self, path: Path, step: TrainStep) -> None:
        self._file = path / "times.json"
        self._lines = path / "times.csv"
        self._step = step
        self._before = self._return_to(step.steps)
        self._last = step.steps, 0.0, 0.0
        self._from = step.steps
        self._started = datetime.now(UTC)
        self._began = time.monotonic()
        self._earlier = json.loads(self._file.read_text()) if self._file.exists() else []
        self._machine = _machine(step)

    def _return_to(self, step: int) -> float:
        """Drop the lines after a step, and return the seconds until then."""
        known = rows(self._lines) if self._lines.exists() else []
        known = [row for row in known if int(row["step"]) <= step]
        with whole(self._lines) as new, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(known)
        return float(known[-1]["seconds"]) if known else 0.0

    def log(self, evaluations: Evaluations | None) -> None:
        """Add a line: the time until now, and how fast it was since the last, waiting left out."""
        step, seconds, waited = self._last
        now = time.monotonic() - self._began
        waited_now = evaluations.waited if evaluations else 0.0
        spent = now - seconds - (waited_now - waited)
        rate = (self._step.steps - step) / max(spent, 1e-9)
        self._last = self._step.steps, now, waited_now
        with self._lines.open("a", newline="") as file:
            csv.writer(file).writerow(
                [self._step.steps, f"{self._before + now:.3f}", f"{rate:.1f}"]
            )

    def write(self, evaluations: Evaluations | None) -> None:
        """Write the line for the time since this was made, after those of earlier sessions."""
        seconds = time.monotonic() - self._began
        line = {
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "waited_for_evaluations": round(evaluations.waited if evaluations else 0.0, 3),
            "from_step": self._from,
            "to_step": self._step.steps,
            "execution": f"{self._step.path}, {self._step.execution}",
            **self._machine,
        }
        with whole(self._file) as new:
            new.write_text(json.dumps([*self._earlier, line], indent=2) + "\n")


def _machine(step: TrainStep) -> dict[str, Any]:
    """Return what speed and numbers depend on beside the settings."""
    is_cuda = step.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(step.device) if is_cuda else str(step.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "torchrl_iql": torchrl_iql.__version__,
            **{name: version(name) for name in ("torch", "torchrl", "tensordict", "numpy")},
            "python": platform.python_version(),
        },
    }
