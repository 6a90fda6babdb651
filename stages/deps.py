"""Write into dvc.yaml and studies/dvc.yaml which files the stages import. It is no stage of dvc.yaml.

DVC sees neither imports nor lists in its interpolation, so that every file is a line of its own: below a comment, at
the end of each stage's deps. A folder that a stage looks files up in is named whole in dvc.yaml, so that a new file is
noticed; not in studies/dvc.yaml: the ignore file of a DVC project does not reach out of it, so __pycache__ would count.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from stages._app import run

FILES = {Path("dvc.yaml"): "", Path("studies/dvc.yaml"): "../"}
"""A pipeline file -> the way from its folder to the repository's root."""
_MARK = "      # code: python -m stages.deps"
# What a matrix item names exactly; of the other folders that a stage looks files up in, all files count.
_NAMED = {"pipeline/policy/estimators": "${item.estimator}"}


def code_deps(command: str, folders: bool = True) -> list[str]:
    """The code that a stage's command depends on, relative to the root; ``folders``: whole where files are looked up.

    Of ``python -m studies.NAME COMMAND`` it is what studies/NAME/COMMAND.py imports, where there is such a file.
    """
    from pipeline.closure import closure
    from pipeline.errors import PipelineError

    match = re.search(r"python -m ((?:stages|studies)(?:\.\w+)+)(?: (\w+))?", command)
    if match is None:
        raise PipelineError(f"'{command}' runs no module of stages/ or studies/; write python -m stages.NAME.")
    path = Path(*match[1].split("."))
    starts = (path / f"{match[2]}.py", path / "__main__.py", path.with_suffix(".py"))
    found = closure(str(next((start for start in starts if start.is_file()), starts[-1])))
    if not folders:
        return sorted(found.files)
    deps = {file for file in found.files if str(Path(file).parent) not in found.registries}
    for folder in found.registries:
        name = _NAMED.get(folder)
        if name is None or name not in command:
            deps.add(folder)
        else:
            deps |= {f"{folder}/base.py", f"{folder}/{name}.py"}
    return sorted(deps)


def rewritten(text: str, to_root: str) -> str:
    """A pipeline file with the code deps of every stage as they should be."""
    from ruamel.yaml import YAML

    commands = {name: stage["cmd"] for name, stage in YAML(typ="safe").load(text)["stages"].items()}
    lines: list[str] = []
    stage, inside = "", False
    for line in [*text.splitlines(), "end"]:
        if inside and not line.startswith("      "):
            lines += [_MARK, *(f"      - {to_root}{dep}" for dep in code_deps(commands[stage], not to_root))]
            inside = False
        if match := re.fullmatch(r"  (\w+):", line):
            stage = match[1]
        is_code = line == _MARK or re.match(rf"      - {re.escape(to_root)}(pipeline|stages|studies)/", line)
        if not (inside and is_code):
            lines.append(line)
        inside = inside or line == "    deps:"
    return "\n".join(lines[:-1]) + "\n"


def deps(
    check: Annotated[bool, typer.Option("--check", help="Change nothing, fail where they differ.")] = False,
) -> None:
    """Bring the code deps of all stages up to date."""
    from pipeline.errors import PipelineError
    from pipeline.files import write_text

    for file, to_root in FILES.items():
        text = file.read_text()
        wanted = rewritten(text, to_root)
        if wanted != text:
            if check:
                raise PipelineError(
                    f"{file} does not name the files that its stages import; run python -m stages.deps."
                )
            write_text(file, wanted)
            typer.echo(f"{file} is brought up to date.")


if __name__ == "__main__":
    run(deps, checked=False)
