"""What is held out of the data, and what every learner makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchrl.objectives.common import LossModule

from torchrl_iql import OfflineDataset
from torchrl_iql.validation import Validation, Validator
from torchrl_iql_recipes.experiment.schema import SettingsError
from torchrl_iql_recipes.experiment.settings import Settings

__all__ = ["HeldOut", "hold_out"]

SEED = 0
"""Of the draw of episodes: the same ones in every run on the same data."""


def hold_out(
    settings: Settings, dataset: OfflineDataset
) -> tuple[OfflineDataset, OfflineDataset | None]:
    """Return what may be learned from, and the episodes that are held out, as losses read them, if any.

    Raises:
        SettingsError: there are too few episodes.
    """
    share = settings.evaluation.validation
    if not share:
        return dataset, None
    try:
        rest, held_out = dataset.split(share, seed=SEED)
    except ValueError as error:
        raise SettingsError(f"validation={share:g}: {error}") from None
    if settings.algorithm.is_offline:  # its loss is of windows
        held_out = settings.algorithm.data(held_out)
    return rest, held_out


class HeldOut:
    """Looks at what is held out with the loss of every learner.

    Args:
        settings: of the run.
        dataset: what is held out.
    """

    def __init__(self, settings: Settings, dataset: OfflineDataset) -> None:
        discounts = [getattr(each.algorithm, "discount", None) for each in settings.learners]
        looks = {
            discount: Validator(dataset, discount, n_steps=settings.data.n_steps)
            for discount in dict.fromkeys(discounts)
        }
        self._settings = settings
        self._looks = [looks[discount] for discount in discounts]
        self.latest: list[Validation | None] = [None] * len(discounts)

    def check(self, losses: Sequence[LossModule]) -> None:
        """Refuse a metric that the best is to be by, but that is none.

        Raises:
            SettingsError: it names those that there are.
        """
        kind, _, name = self._settings.evaluation.best_by.removeprefix("-").partition("/")
        if kind == "validation" and name not in (its := self._looks[0](losses[0]).metrics):
            raise SettingsError(
                f"best_by={self._settings.evaluation.best_by}: expected validation/ and one of {sorted(its)}"
            )

    def __call__(self, losses: Sequence[LossModule]) -> list[dict[str, float]]:
        """Return the metrics of every learner."""
        self.latest = [look(loss) for look, loss in zip(self._looks, losses, strict=True)]
        return [
            {f"validation/{name}": value for name, value in each.metrics.items()}
            for each in self.latest
            if each is not None
        ]

    def draw(self, replica: int, loss: LossModule, png: Path, title: str) -> None:
        """Draw values against the returns that followed, if there are any."""
        from torchrl_iql_recipes.experiment import plots

        latest = self.latest[replica] or self._looks[replica](loss)
        if len(latest.q):
            plots.calibration(latest.q.numpy(), latest.returns.numpy(), png, title)
