"""How a run ends that is no longer finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl_iql.training import NonFiniteError
from torchrl_iql_recipes.experiment.schema import RunError
from torchrl_iql_recipes.experiment.settings import Settings
from torchrl_iql_recipes.files import shown

__all__ = ["saved", "told"]


def saved(error: NonFiniteError, path: Path) -> str:
    """Save the step that was not finite in a folder, and say what it was and what takes it again."""
    step = error.save(path)
    where = f"; {shown(step)} takes it again, by torchrl_iql.training.reproduce" if step else ""
    return f"{error}{where}"


@contextmanager
def told(settings: Settings, path: Path, save: Callable[[], None]) -> Iterator[None]:
    """End a run at a step that is not finite, with the step and the state before it in its folder.

    Args:
        settings: of the run.
        path: its folder.
        save: writes checkpoints.

    Raises:
        RunError: one line that says what is not finite, and where the files are.
    """
    try:
        yield
    except NonFiniteError as error:
        save()
        name = settings.learners[error.learner].name
        raise RunError(
            f"{name and f'{name}: '}{saved(error, path)}; what was learned before is in "
            f"{shown(path / name / 'last.ckpt')}, and resume= with on_nonfinite=skip goes on without the step"
        ) from error
