"""Profiles: ``profiles/default.yaml`` is complete, the others hold what they change of it. It knows no section.

Mappings merge, everything else replaces; an empty mapping empties. ``extends`` names the profile that another one
starts from. The comments of the default are kept.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from pipeline.errors import PipelineError, one_line
from pipeline.section import PARAMS, parse, parse_text

PROFILES, STUDIES = Path("profiles"), Path("studies/params.yaml")
_DEFAULT = "default"
# Characters of a mapping that is written on one line.
_LONG = 115


@dataclass(frozen=True)
class Profile:
    """The texts of the two files that a profile is written to."""

    params: str
    studies: str


def known_profiles(directory: Path = PROFILES) -> list[str]:
    """Names of the profiles there are."""
    return sorted(file.stem for file in directory.glob("*.yaml"))


def render(name: str, directory: Path = PROFILES) -> Profile:
    """The complete files of a profile.

    Raises
    ------
    PipelineError
        There is no such profile, or one that it starts from cannot be read or extends itself.
    """
    chain = [name]
    overlays = []
    while chain[-1] != _DEFAULT:
        overlays.append(_read(chain[-1], directory))
        parent = overlays[-1].pop("extends", _DEFAULT)
        if not isinstance(parent, str):
            raise PipelineError(f"{directory / chain[-1]}.yaml: extends should be the name of a profile; correct it.")
        if parent in chain:
            raise PipelineError(f"{directory / name}.yaml extends itself, by way of {' and '.join(chain)}; correct it.")
        chain.append(parent)
    tree = _read(_DEFAULT, directory)
    for overlay in reversed(overlays):
        _merge(tree, overlay)
    tree["profile"] = name
    studies = tree.pop("studies", None)
    if not isinstance(studies, CommentedMap):
        raise PipelineError(f"{directory / name}.yaml: studies should be a mapping of their sections; restore it.")
    return Profile(
        _dump(tree),
        "# Parameters of the studies, by profiles/; `python -m stages.profile NAME` writes this file.\n"
        + _dump(studies),
    )


def changes(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Every value that differs between two parsed files, as ``key: old -> new``."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys((*before, *after)):
            yield from changes(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield f"{key}: {_short(before)} -> {_short(after)}"


def is_hand_made(path: Path = PARAMS, directory: Path = PROFILES) -> bool:
    """Whether a params file, or that of the studies beside it, says something else than the profile that it names.

    Comments say nothing; the order of entries is that of figures, and does.
    """
    if not path.is_file():
        return False
    try:
        profile = render(str(parse(path).get("profile")), directory)
        files = ((path, profile.params), (path.parent / STUDIES, profile.studies))
        return any(file.is_file() and repr(parse(file)) != repr(parse_text(text)) for file, text in files)
    except PipelineError:
        return True


def differences(path: Path, text: str) -> list[str]:
    """What writing ``text`` to ``path`` would change; all of it where nothing readable is there."""
    try:
        before: Any = parse(path)
    except PipelineError:
        before = {}
    return list(changes(before, parse_text(text)))


def _read(name: str, directory: Path) -> CommentedMap:
    path = directory / f"{name}.yaml"
    if not path.is_file():
        raise PipelineError(f"There is no profile {name}; there are {', '.join(known_profiles(directory))}.")
    try:
        tree = _yaml().load(path.read_text())
    except (OSError, UnicodeDecodeError, YAMLError, RecursionError) as error:
        raise PipelineError(f"{path} cannot be read ({one_line(error)}); restore it.") from None
    if not isinstance(tree, CommentedMap):
        raise PipelineError(f"{path} is no mapping of sections; restore it.")
    return tree


def _merge(base: CommentedMap, overlay: Any) -> None:
    for key, value in overlay.items():
        if value and isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 120
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.ignore_aliases = lambda _: True
    # A missing value is written out, as a reader expects it.
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _dump(tree: CommentedMap) -> str:
    _unfold(tree)
    stream = io.StringIO()
    _yaml().dump(tree, stream)
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def _unfold(node: Any) -> None:
    """A key a line, where mappings on one line would be long."""
    if isinstance(node, CommentedMap) and len(str(dict(node))) > _LONG:
        node.fa.set_block_style()
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _unfold(child)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
