"""Which files and libraries a file's results depend on: what it imports, inside functions too. It runs nothing.

Modules that cannot change a byte of any output are left out, and what only they import with them (``NO_BYTES``).
A folder that a :class:`pipeline.registry.Registry` reads belongs to whoever imports the file with that call.
"""

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files import hash_file
from pipeline.registry import entry_names

ROOT = Path(__file__).parents[1]
_PACKAGES = ("pipeline", "stages", "studies")
# A library -> the distributions that bring it.
_distributions = functools.cache(metadata.packages_distributions)

NO_BYTES = {
    "pipeline/errors.py": "says what is wrong",
    "pipeline/section.py": "refuses what params.yaml may not say; the values are DVC's own dependencies",
    "pipeline/params.py": "the same of the whole file",
    "pipeline/registry.py": "finds a file by its name",
    "pipeline/closure.py": "names what a result depends on",
    "pipeline/work.py": "keeps unfinished work and renames what is finished",
    "pipeline/executor": "schedules; the units are cut before it sees them",
    "pipeline/policy/pretrained.py": "takes policies from the hub and there; those of a run are its own",
    "pipeline/tracking": "copies to MLflow what lies in files",
    "stages/_app.py": "the command line: options, progress, errors",
    "stages/_paths.py": "where outputs lie; DVC's own dependencies and outputs",
}
"""Files and folders that may refuse, schedule, show or name, but make no value that reaches an output; and why."""

NO_BYTES_LIBRARIES = {"typer": "parses command lines", "rich": "draws progress", "filelock": "waits for its turn"}


@dataclass(frozen=True)
class Code:
    """The code of one piece of work.

    Attributes
    ----------
    file
        Where it begins: the ``__file__`` of a stage.
    entries
        Folder of a registry -> the entries that are used, as ``pipeline/benchmarks`` -> ``("ruler",)``. Of a folder
        that is not named, all count.
    """

    file: str
    entries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Closure:
    """What a file's results depend on: files of this project, registries among their folders, names of libraries."""

    files: frozenset[str]
    registries: frozenset[str]
    libraries: frozenset[str]


def closure(start: str, entries: Mapping[str, tuple[str, ...]] | None = None, root: Path = ROOT) -> Closure:
    """All that running ``start``, a path relative to ``root``, may import of this project and of libraries.

    ``entries`` are as in :class:`Code`; an empty tuple leaves the files of a folder out.
    """
    files: set[str] = set()
    registries: set[str] = set()
    libraries: set[str] = set()
    queue = [start]
    while queue:
        file = queue.pop()
        if file in files or file in NO_BYTES or str(Path(file).parent) in NO_BYTES:
            continue
        files.add(file)
        if not file.endswith(".py"):
            continue
        found = _imports(root, file)
        libraries |= found.libraries
        queue += found.files
        for folder in found.registries:
            registries.add(folder)
            chosen = None if entries is None else entries.get(folder)
            names = entry_names(root / folder) if chosen is None else chosen
            queue += [f"{folder}/{name}.py" for name in names]
    kept = {file for file in files if not (file.endswith("/__init__.py") and _is_trivial(root / file))}
    return Closure(frozenset(kept), frozenset(registries), frozenset(libraries))


def code_state(code: Code) -> dict[str, dict[str, str]]:
    """sha256 of every file of a piece of work, and the version of every library that they import."""
    start = str(Path(code.file).resolve().relative_to(ROOT))
    found = closure(start, code.entries)
    distributions = {name for library in found.libraries for name in _distributions().get(library, ())}
    return {
        "files": {file: hash_file(ROOT / file) for file in sorted(found.files)},
        "libraries": {name: metadata.version(name) for name in sorted(distributions)},
    }


@functools.cache
def _imports(root: Path, file: str) -> Closure:
    """What one file imports itself."""
    names: set[str] = set()
    registries: set[str] = set()
    templates: set[str] = set()
    tree = ast.parse((root / file).read_text())
    for node in executed(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise PipelineError(f"{file}: relative imports are not followed; write the whole name.")
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and str(node.value).endswith(".jinja"):
            # A template may include the others of its folder.
            templates = {str(path.relative_to(root)) for path in (root / file).parent.glob("*.jinja")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Registry":
            package = node.args[0]
            if not isinstance(package, ast.Constant) or not isinstance(package.value, str):
                raise PipelineError(f"{file}: the package of a Registry must be written out.")
            registries.add(package.value.replace(".", "/"))
    packages = {".".join(name.split(".")[:length]) for name in names for length in range(1, name.count(".") + 1)}
    files = {path for name in names | packages if (path := _module_file(root, name)) is not None}
    libraries = {name.split(".")[0] for name in names} - {*_PACKAGES, *sys.stdlib_module_names}
    return Closure(frozenset(files | templates), frozenset(registries), frozenset(libraries - set(NO_BYTES_LIBRARIES)))


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from executed(child)


def _module_file(root: Path, name: str) -> str | None:
    """File of a module of this project; None for all others."""
    path = Path(*name.split("."))
    if path.parts[0] in _PACKAGES:
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if (root / candidate).is_file():
                return str(candidate)
    return None


def _is_trivial(file: Path) -> bool:
    """Whether a file holds nothing but a docstring."""
    body = ast.parse(file.read_text()).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
