"""What a run will cost, before anything is fetched or computed. It is no stage of dvc.yaml."""

from pathlib import Path
from typing import Annotated

import typer

from stages._app import run


def plan(
    params_file: Annotated[Path, typer.Option("--params", help="The params file.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="cpu, or a device that the plan has rates of.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in seconds and bytes.")] = False,
) -> None:
    """Print time, disk, memory and tokens of every stage, and what was assumed."""
    import json

    from pipeline.params import load_params
    from pipeline.planning.plan import make_plan
    from pipeline.planning.table import print_plan

    made = make_plan(load_params(params_file), device, Path("models"))
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=1))
    else:
        print_plan(made)


if __name__ == "__main__":
    run(plan)
