"""Put runs beside each other, or do those of a plan.

    python recipes/compare.py runs/mini/hopper-medium multirun/sweep
    python recipes/compare.py --plan my.yaml --jobs 8
    python recipes/compare.py --plan my.yaml --launcher joblib hydra.launcher.n_jobs=4
    python recipes/compare.py --record record.json --folder runs/again

Of folders of runs, or with runs in them, it prints a table: for each combination of the settings that
differ, seeds aside, the mean of the last scores, the best first.

Else it does the runs of a plan that are not finished in its folder, and leaves there table.md, table.csv,
curves.png and aggregates.png; the same command goes on after anything. What a plan is: recipes/comparison.
"""

from __future__ import annotations

from pathlib import Path

from torchrl_iql_recipes.commands import Parser, errors_in_one_line, label
from torchrl_iql_recipes.experiment.schema import SettingsError

PLAN = Path(__file__).parent / "comparison" / "table.yaml"


def main(default: Path | None = None) -> None:
    """Do what the command line says.

    Args:
        default: the plan that is done where nothing is given; None: then that is refused.
    """
    script = "compare" if default is None else "comparison/table"
    parser = Parser(__doc__, script)
    parser.add_argument(
        "given",
        nargs="*",
        metavar="FOLDER",
        help="of runs, or with such; beside --launcher its options, as hydra.launcher.n_jobs=4",
    )
    plan = parser.add_argument_group("runs of a plan")
    plan.add_argument("--plan", type=Path, help="(default: the one of the comparisons' page)")
    plan.add_argument("--folder", type=Path, help="of all runs (default: runs/<name of the plan>)")
    plan.add_argument(
        "--jobs", type=int, help="runs at a time (default: 2); 0 makes the table only"
    )
    plan.add_argument(
        "--launcher", help="of Hydra, instead of --jobs: joblib, submitit_slurm, ray, ..."
    )
    plan.add_argument("--record", type=Path, help="the record.json of runs that are not done again")
    args = parser.parse_args()
    of_plan = [
        name for name in ("plan", "folder", "jobs", "record") if vars(args)[name] is not None
    ]
    if args.given and not args.launcher and of_plan:
        parser.error(
            f"{args.given[0]} beside --{' and --'.join(of_plan)}: give folders of runs, or a plan's options"
        )
    if not (args.given or args.launcher or of_plan or default):
        parser.error(
            "nothing to compare: give folders of runs, or --plan or --jobs for the runs of a plan, which may "
            "take days"
        )
    args.plan, args.jobs = args.plan or PLAN, 2 if args.jobs is None else args.jobs
    with errors_in_one_line(label(script), debug=args.debug):
        if args.given and not args.launcher:
            from torchrl_iql_recipes.reporting import gather, text

            try:
                print("\n".join(text.table([Path(each) for each in args.given])))
            except gather.NoRunError as error:
                raise SettingsError(str(error)) from error
            return
        from torchrl_iql_recipes.comparison import table  # loads PyTorch

        try:
            table.run(args)
        except (ValueError, RuntimeError) as error:
            raise SettingsError(str(error)) from error


if __name__ == "__main__":
    main()
