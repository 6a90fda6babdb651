"""The strict base of every section of params.yaml, and one section read into its class. It knows no section.

Read with ruamel.yaml (YAML 1.2, as DVC reads it): PyYAML would turn ``5e-5`` into a string and ``on`` into a
boolean. Run-time resources (device, threads, cache memory) are no parameters: they must not change the identity of
a result.
"""

import functools
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import PipelineError, one_line

PARAMS = Path("params.yaml")

Kind = TypeVar("Kind")
Entry = TypeVar("Entry")


class Section(BaseModel):
    """A part of params.yaml. Strict: a quoted number in the file is a mistake to report, not a value to guess."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _ascending(budgets: tuple[int, ...]) -> tuple[int, ...]:
    if list(budgets) != sorted(set(budgets)):
        raise ValueError("budgets must be distinct and ascending")
    return budgets


def _addressable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        close = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")
        hint = f"; write {close}" if close else ""
        raise ValueError(f"a name holds letters, digits, - and _ only: DVC reads a dot as one level further down{hint}")
    return name


PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
FileStem = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Name = Annotated[str, AfterValidator(_addressable)]
"""Of an entry of params.yaml: part of DVC's keys (``models.<name>``), of its stages' names and of their outputs."""
Names = Annotated[tuple[Name, ...], Field(min_length=1)]
Budgets = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_ascending)]


def read(key: str, kind: type[Kind], path: Path = PARAMS) -> Kind:
    """One value or section of a params file, ``key`` as DVC writes it (``models.smollm2-135m.dtype``).

    Raises
    ------
    PipelineError
        The file is missing, is not YAML, lacks the key, or holds there what ``kind`` does not allow. Names the file
        and the first key at fault.
    """
    return validate(find(parse(path), key, path), kind, key, path)


def parse(path: Path = PARAMS) -> dict[str, Any]:
    """A params file as nested mappings, lists as tuples; to be read, not changed.

    Raises
    ------
    PipelineError
        The file is missing, is no YAML or no mapping.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise PipelineError(
            f"{path} does not exist; run from the repository root, or make it (python -m stages.profile default)."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} cannot be read ({one_line(error)}); make it again.") from None
    return parse_text(text, path)


# A stage reads section by section; the file is the same each time.
@functools.lru_cache(maxsize=8)
def parse_text(text: str, path: Path = PARAMS) -> dict[str, Any]:
    """As :func:`parse`, of the text of a file; ``path`` is for the error."""
    try:
        tree = _lists_as_tuples(YAML(typ="safe", pure=True).load(text))
    except YAMLError as error:
        raise PipelineError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except (ValueError, KeyError) as error:  # a date or a tagged value that is none
        raise PipelineError(f"{path} is not valid YAML: {one_line(error)}.") from None
    except RecursionError:
        raise PipelineError(f"{path} holds an alias of itself, or is nested too deep; write it out.") from None
    if not isinstance(tree, dict):
        raise PipelineError(f"{path}: the file: it should be a mapping of sections (got {_short(tree)}).")
    return tree


def find(tree: dict[str, Any], key: str, path: Path = PARAMS) -> Any:
    """What stands at ``key`` of a parsed file; an error names the entries that there are in its place."""
    node: Any = tree
    place: list[str] = []
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            where = ".".join(place)
            if place and isinstance(node, dict) and node:
                raise PipelineError(f"{path}: {where} has no '{part}'; it has {', '.join(sorted(map(str, node)))}.")
            raise PipelineError(f"{path}: {missing('.'.join((*place, part)))}")
        node = node[part]
        place.append(part)
    return node


def validate(value: Any, kind: type[Kind], key: str, path: Path = PARAMS) -> Kind:
    """A value of a parsed file as what it should be; ``key`` is where it stands.

    Raises
    ------
    PipelineError
        It is something else; names the file and the first key at fault.
    """
    try:
        # A frozen section is its own adapter; everything else becomes as strict.
        strict = None if isinstance(kind, type) and issubclass(kind, BaseModel) else ConfigDict(strict=True)
        return TypeAdapter(kind, config=strict).validate_python(value)
    except ValidationError as error:
        raise PipelineError(f"{path}: {_first_problem(error, key)}") from None


def entry(entries: dict[str, Entry], name: str, section: str) -> Entry:
    """The entry called ``name`` of a params section, or an error that lists the names there are."""
    if name not in entries:
        raise PipelineError(f"params.yaml: {section} has no '{name}'; it has {', '.join(sorted(entries))}.")
    return entries[name]


def missing(key: str) -> str:
    """What is said of a key that a params file lacks."""
    return f"missing key {key}; add it (profiles/default.yaml shows every key)."


def _lists_as_tuples(node: Any) -> Any:
    # Strict pydantic refuses lists for tuples; YAML has only lists.
    if isinstance(node, dict):
        return {key: _lists_as_tuples(value) for key, value in node.items()}
    if isinstance(node, list):
        return tuple(_lists_as_tuples(value) for value in node)
    return node


def _first_problem(error: ValidationError, section: str) -> str:
    problem = error.errors()[0]
    # Pydantic marks a key that is itself at fault.
    key = ".".join(str(part) for part in (section, *problem["loc"]) if part not in ("", "[key]"))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}; remove it or correct its spelling."
    if problem["type"] == "missing":
        return missing(key)
    # Lists of the file are checked as tuples, a word that params.yaml does not know.
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{key}: {message} (got {_short(problem['input'])})."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
