"""Write a profile into params.yaml and studies/params.yaml. It is no stage of dvc.yaml."""

from typing import Annotated

import typer

from stages._app import run


def main(
    name: Annotated[str, typer.Argument(help="A file of profiles/, without .yaml.")],
    force: Annotated[bool, typer.Option("--force", help="Also where params.yaml was changed by hand.")] = False,
) -> None:
    """Write the complete params.yaml of a profile, and say what changed."""
    from pipeline.errors import PipelineError
    from pipeline.files import write_text
    from pipeline.params import check_params
    from pipeline.profiles import PROFILES, STUDIES, differences, is_hand_made, render
    from pipeline.section import PARAMS, parse_text

    profile = render(name)
    source = PROFILES / f"{name}.yaml"
    check_params(parse_text(profile.params, source), source)
    changed = differences(PARAMS, profile.params)
    changed += [f"studies: {line}" for line in differences(STUDIES, profile.studies)]
    if is_hand_made() and not force:
        raise PipelineError(
            f"{PARAMS} or {STUDIES} was changed by hand, or the profile that it names since; save what you need, then "
            f"write {name} over them with --force (python -m stages.profile {name} --force)."
        )
    write_text(PARAMS, profile.params)
    write_text(STUDIES, profile.studies)
    typer.echo(f"{PARAMS} is the profile {name}" + (":" if changed else ", as it was."))
    for line in changed:
        typer.echo(f"  {line}")


if __name__ == "__main__":
    run(main, checked=False)
