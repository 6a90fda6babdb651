"""A folder of modules that are its entries: a file there is the registration. It knows no folder.

``pipeline/closure.py`` finds the folders that a file reads by the calls of :class:`Registry` in it.
"""

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pipeline.errors import PipelineError

ROOT = Path(__file__).parents[1]
Base = TypeVar("Base")


def entry_names(folder: Path) -> tuple[str, ...]:
    """The modules of a folder that are its entries."""
    return tuple(sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith(("_", "base"))))


@dataclass(frozen=True)
class Registry(Generic[Base]):
    """The modules of a package that each define one subclass of ``base``, and are called by their file names.

    Attributes
    ----------
    package
        ``pipeline.benchmarks`` and the like.
    base
        The class of the package's ``base.py`` whose subclasses are meant.
    what
        What an entry is called in an error.
    """

    package: str
    base: type[Base]
    what: str

    def names(self) -> tuple[str, ...]:
        """All entries: every module of the folder whose name begins with neither ``base`` nor ``_``."""
        return entry_names(ROOT.joinpath(*self.package.split(".")))

    def load(self, name: str) -> type[Base]:
        """The class that an entry defines.

        Raises
        ------
        PipelineError
            There is no such entry; lists those that there are.
        """
        if name not in self.names():
            raise PipelineError(f"'{name}' is no {self.what}; known: {', '.join(self.names())}.")
        module = importlib.import_module(f"{self.package}.{name}")
        found = [
            member
            for _, member in inspect.getmembers(module, inspect.isclass)
            if issubclass(member, self.base) and member.__module__ == module.__name__ and not inspect.isabstract(member)
        ]
        if len(found) != 1:
            raise PipelineError(
                f"{module.__file__} must define one {self.base.__name__} and has "
                f"{', '.join(member.__name__ for member in found) or 'none'}; give each a file of its own."
            )
        return found[0]
