"""Names, order, colours and dashes of everything that is plotted or tabulated. It knows no numbers and no params file.

Colours are Okabe and Ito's, as far as they reach, told apart with any colour vision; markers tell the lines apart in
print. Baselines that see attention, and so the question, are dashed (paper, figure 2).
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.errors import PipelineError
from pipeline.reporting.params import ShownAs
from pipeline.tables import FULL, ORACLE, PolicyKey

if TYPE_CHECKING:
    from pipeline.params import Params

Kind = Literal["ceiling", "oracle", "kvp", "attention-free", "attention-based"]
Dashes = Literal["-", "--", ":"]
Pair = tuple[str, str | None]
"""(policy, trained_on) as in the columns of the results."""

BASELINE_KINDS: tuple[Kind, ...] = ("attention-free", "attention-based")
# The estimator that comparisons are about, where it was trained.
_FIRST = "exact"
# Of the estimators in their order: the policies of one benchmark share a colour and a marker.
_WIDTHS = (3.0, 1.2, 2.0, 0.7)
# By the paper's letters, and for all others by their place.
_TRAINED = {"R": ("#0072B2", "o"), "S": ("#D55E00", "h")}
_TRAINED_ON_OTHERS = (("#882255", "h"), ("#117733", "H"), ("#4477AA", "8"), ("#AA4466", "p"))
# Of the baselines in the order of params.yaml.
_COLOURS = (
    *("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#6A3D9A", "#7A4B1E"),
    *("#EE3377", "#44AA99", "#999933", "#332288", "#661100"),
)
_MARKERS = ("s", "D", "^", "v", "x", "P", "X", "<", ">", "*", "d", "+")


@dataclass(frozen=True)
class Style:
    """How one policy is drawn and in which place it is listed."""

    label: str
    kind: Kind
    colour: str
    dashes: Dashes
    width: float
    marker: str
    order: int


class Styles:
    """How the policies and benchmarks of a run are shown.

    Parameters
    ----------
    trained_on, estimators
        Of the matrix: what policies there are.
    benchmarks
        What is said of each benchmark.
    baselines
        Name -> whether it sees attention. Their order is that of legends and tables, and decides colour and marker.
    titles
        What baselines are called, where not by their names.
    """

    def __init__(
        self,
        trained_on: Sequence[str],
        estimators: Collection[str],
        benchmarks: Mapping[str, ShownAs],
        baselines: Mapping[str, bool],
        titles: Mapping[str, str],
    ) -> None:
        self.estimators = tuple(sorted(estimators, key=lambda name: name != _FIRST))
        self._benchmarks = benchmarks
        self._looks: dict[PolicyKey, Style] = {
            FULL: Style("No eviction", "ceiling", "#444444", "-", 1.4, "", 0),
            ORACLE: Style("Oracle", "oracle", "#000000", ":", 1.8, "", 1),
        }
        trained = list(_trained(trained_on, benchmarks))
        for place, estimator in enumerate(self.estimators):
            for name, subscript, colour, marker in trained:
                self._looks[PolicyKey(f"kvp-{estimator}", name)] = Style(
                    label=f"KVP_{subscript} {estimator}",
                    kind="kvp",
                    colour=colour,
                    dashes="-",
                    width=_WIDTHS[place % len(_WIDTHS)],
                    marker=marker,
                    order=len(self._looks),
                )
        for place, (name, sees_attention) in enumerate(baselines.items()):
            turn, column = divmod(place, len(_COLOURS))
            self._looks[PolicyKey(name)] = Style(
                label=titles.get(name, name),
                kind="attention-based" if sees_attention else "attention-free",
                colour=_COLOURS[column],
                dashes="--" if sees_attention else "-",
                width=1.4,
                marker=_MARKERS[(column + turn) % len(_MARKERS)],
                order=len(self._looks),
            )

    @classmethod
    def of(cls, params: "Params") -> "Styles":
        """The styles of a whole params file."""
        matrix = params.matrix
        shown = {name: entry.shown for name, entry in params.benchmarks.items()}
        baselines = {name: baseline.sees_attention for name, baseline in params.baselines.items()}
        return cls(matrix.trained_on, matrix.estimator, shown, baselines, params.report.titles)

    def style(self, policy: str, trained_on: str | None = None) -> Style:
        """Style of a policy as named in the results.

        Raises
        ------
        PipelineError
            There is no such policy; lists those that there are.
        """
        key = PolicyKey(policy, trained_on)
        if key not in self._looks:
            known = ", ".join(policy_name(known.policy, known.trained_on) for known in self._looks)
            raise PipelineError(
                f"The results name the policy {policy_name(policy, trained_on)}, which is not in params.yaml; known: "
                f"{known}. Run the evaluate stage again."
            )
        return self._looks[key]

    def label(self, policy: str, trained_on: str | None = None) -> str:
        """What a reader sees for a policy; raises as :meth:`style`."""
        return self.style(policy, trained_on).label

    def title(self, benchmark: str) -> str:
        """What a reader sees for a benchmark."""
        return self._benchmarks[benchmark].title if benchmark in self._benchmarks else benchmark

    def stands_in_for(self, benchmark: str) -> str | None:
        """Which of the paper's benchmarks it replaces."""
        return self._benchmarks[benchmark].stands_in_for

    def in_order(self, pairs: Collection[Pair]) -> list[Pair]:
        """Policies in the order of legends and tables; raises as :meth:`style`."""
        return sorted(pairs, key=lambda pair: self.style(*pair).order)

    def of_kind(self, kind: Kind) -> list[str]:
        """Names of the policies of a kind, in order."""
        return list(dict.fromkeys(key.policy for key, look in self._looks.items() if look.kind == kind))

    @property
    def reference(self) -> str:
        """The KVP that comparisons are about: the exact one where it was trained."""
        return f"kvp-{self.estimators[0]}"


def policy_name(policy: str, trained_on: str | None) -> str:
    """``kvp-exact@ruler``, or the bare policy where it was not trained."""
    return f"{policy}@{trained_on}" if trained_on else policy


def _trained(trained_on: Sequence[str], benchmarks: Mapping[str, ShownAs]) -> Iterator[tuple[str, str, str, str]]:
    """Name, subscript, colour and marker of what is trained on. A letter belongs to the first that has it."""
    taken: set[str] = set()
    others = itertools.cycle(_TRAINED_ON_OTHERS)
    for name in trained_on:
        letter = benchmarks[name].letter or name
        subscript = name if letter in taken else letter
        taken.add(subscript)
        colour, marker = _TRAINED[subscript] if subscript in _TRAINED else next(others)
        yield name, subscript, colour, marker
