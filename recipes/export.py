"""Write a policy as a file that runs without this package: for PyTorch alone, as ONNX, or as arrays.

python recipes/export.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt output=policy.pt2
python recipes/export.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt output=policy.onnx
python recipes/export.py checkpoint=runs/mini/hopper-medium/<date>/last.ckpt output=policy.npz
"""

from pathlib import Path

from torchrl_iql_recipes.deployment.settings import Export
from torchrl_iql_recipes.experiment.door import Door
from torchrl_iql_recipes.experiment.schema import RunError, SettingsError

EXPORT = Door("export", (Export,), keeps_folder=False)


def run(settings: Export, path: Path) -> None:
    from torchrl_iql.export import export_policy

    assert settings.checkpoint and settings.output
    try:
        its = export_policy(settings.checkpoint, settings.output)
    except (ImportError, OSError, ValueError) as error:
        raise SettingsError(str(error)) from error
    except RuntimeError as error:
        raise RunError(str(error)) from error
    size, close = its.path.stat().st_size, ""
    if "n" not in its.metadata["action"]:
        close = f" to {its.difference:.1e} of half their range (at most {its.tolerance:.1e})"
    print(
        f"{its.path}: {size / 1e3:.0f} kB, actions for {its.observations} observations, {its.recorded} of "
        f"them recorded, as the policy's{close}"
    )


def main() -> None:
    EXPORT.open(run, __doc__)


if __name__ == "__main__":
    main()
