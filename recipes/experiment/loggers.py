"""Who is told the metrics beside ``metrics.csv``: TensorBoard or wandb, with a run for every learner.

``metrics.csv`` is what they are held to. When a learner goes on, its logger is offered all lines again and
takes those that it lacks: a kill neither repeats a step nor loses one.
"""

from __future__ import annotations

import json
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl.record.loggers import Logger, TensorboardLogger, WandbLogger

from torchrl_iql_recipes.experiment.settings import Learner, Settings
from torchrl_iql_recipes.files import whole

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

__all__ = ["TensorBoard", "Wandb", "logger_for"]


def logger_for(settings: Settings, learner: Learner, path: Path, last: int) -> Logger | None:
    """Open the logger of a learner; None if there is none beside ``metrics.csv``.

    Args:
        settings: of the run.
        learner: one of its learners.
        path: of the run.
        last: the newest step of ``metrics.csv``, 0 if it is empty.
    """
    folder = path / learner.name
    match settings.logger.backend:
        case "tensorboard":
            return TensorBoard(folder, last)
        case "wandb":
            name = (learner.algorithm.title, learner.name, settings.values.get("task"))
            return Wandb(
                folder,
                name=" ".join(filter(None, name)),
                group="/".join(path.resolve().parts[-3:]),  # task and date, wherever it is resumed
                settings=settings.of_learner(learner),
            )
    return None


class TensorBoard(TensorboardLogger):
    """Event files in a learner's folder, in which what followed the last step that is left is dropped.

    Args:
        folder: of the learner.
        last: the newest step that is left; it is logged once more.
    """

    def __init__(self, folder: Path, last: int) -> None:
        self._last = last
        super().__init__(exp_name="", log_dir=str(folder))

    def _create_experiment(self) -> SummaryWriter:  # TorchRL's does not know purge_step
        from torch.utils.tensorboard.writer import SummaryWriter

        _put_before(Path(self.log_dir), int(time.time()))
        return SummaryWriter(self.log_dir, purge_step=self._last)

    def log_metrics(self, metrics: Mapping[str, Any], step: int, **_: Any) -> dict[str, Any]:
        if step < self._last:
            return {}
        taken = super().log_metrics(dict(metrics), step=step)
        self.flush()  # what is older than a checkpoint has to outlive a kill
        return taken

    def __exit__(self, *_: object) -> None:
        self.close()


def _put_before(folder: Path, second: int) -> None:
    """Rename event files until all are older than a time.

    TensorBoard reads them in the order of their names, which begin with the second they were opened in: a run
    that goes on within it, or on a machine whose clock is behind, would be read before what it drops.
    """
    files = sorted(folder.glob("events.out.tfevents.*"))
    opened = [int(file.name.split(".")[3]) for file in files]
    if opened and opened[-1] >= second:
        for age, file in zip(range(len(files), 0, -1), files, strict=True):
            rest = file.name.split(".", 4)[4]
            file.rename(folder / f"events.out.tfevents.{second - age:010d}.{rest}")


class Wandb(WandbLogger):
    """A run of wandb with the settings of a learner; resumed, the same run.

    wandb takes nothing back, so what it has is not sent again: by the run's summary, which a resumed run
    gets from the server, or offline by the files that ``wandb sync`` will send.

    Args:
        folder: of the learner, which keeps the id of its run.
        name: of the run.
        group: of the learners that are trained together.
        settings: of the learner.
    """

    def __init__(self, folder: Path, name: str, group: str, settings: Mapping[str, Any]) -> None:
        file = folder / "wandb.id"
        if not file.exists():
            with whole(file) as new:
                new.write_text(uuid.uuid4().hex)
        super().__init__(
            exp_name=name,
            save_dir=folder,
            id=file.read_text(),
            group=group[-128:],  # wandb's limit
            config=dict(settings),
            reinit="create_new",  # beside those of the other learners
            log_env_packages=False,
        )
        own = self.experiment  # opened after one of the same id was written to the end
        lines = _written(folder / "wandb", own.id) if own.offline else [dict(own.summary)]
        self._sent: dict[str, int] = {}
        for line in lines:
            for key in filter(self._is_step_key, line):
                self._sent[key] = max(line[key], self._sent.get(key, -1))

    def log_metrics(self, metrics: Mapping[str, Any], step: int, **_: Any) -> dict[str, Any]:
        taken = {k: v for k, v in metrics.items() if step > self._sent.get(self._step_key(k), -1)}
        return super().log_metrics(taken, step=step) if taken else {}

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # close() would call a run that failed finished.
        self.experiment.finish(exit_code=int(error is not None))


def _written(folder: Path, run: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of history in the offline files of a run: wandb has nothing that reads them."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob(f"*run-*-{run}/run-{run}.wandb")):
        for content in _records(path.read_bytes()):
            items = Record.FromString(content).history.item
            yield {each.key or each.nested_key[0]: json.loads(each.value_json) for each in items}


def _records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format; a kill may have cut the last one short."""
    block, header, record, at = 32768, struct.Struct("<IHB"), b"", 7  # 7: of wandb
    while at + header.size <= len(log):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, size, kind = header.unpack_from(log, at)
        at += header.size + size
        record += log[at - size : at]
        if kind in (1, 4) and at <= len(log):  # it is complete
            yield record
            record = b""
