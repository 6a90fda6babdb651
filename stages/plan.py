"""What a run will cost, before anything is fetched or computed. It is no stage of dvc.yaml."""

from pathlib import Path
from typing import Annotated

import typer

from stages import _paths
from stages._app import run


def main(
    profile: Annotated[str, typer.Option(help="Plan this profile instead of params.yaml, which stays as it is.")] = "",
    device: Annotated[str, typer.Option(help="cpu, or a device that the plan has rates of.")] = "cpu",
    gpus: Annotated[int, typer.Option(help="How many of these devices the executor divides stages over.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in seconds and bytes.")] = False,
) -> None:
    """Print time, disk, memory and tokens of every stage, and what was assumed."""
    import json

    from pipeline.params import check_params
    from pipeline.planning.plan import make_plan
    from pipeline.planning.table import print_plan
    from pipeline.profiles import PROFILES, render
    from pipeline.section import PARAMS, parse, parse_text

    file = PROFILES / f"{profile}.yaml" if profile else PARAMS
    tree = parse_text(render(profile).params, file) if profile else parse()
    made = make_plan(check_params(tree, file), device, _paths.model(), Path("perf/results"), gpus)
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=1))
    else:
        print_plan(made)


if __name__ == "__main__":
    run(main, checked=False)
