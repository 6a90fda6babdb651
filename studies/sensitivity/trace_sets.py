"""Where the study finds its traces, its hidden states, and those of longer sequences. It reads and writes nothing.

traces/<model>/<trained_on>/                          those of the pipeline
studies/traces/<model>/<trained_on>/hidden/           hidden states of the same sequences
studies/traces/<model>/<trained_on>/longer/traces/    traces of the sequences of sensitivity.longer
studies/traces/<model>/<trained_on>/longer/hidden/    and their hidden states
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.params import Params
from pipeline.traces.shards import ExampleReader
from studies.sensitivity.hidden import HiddenReader
from studies.sensitivity.params import StudySensitivity, training_length

HIDDEN, LONGER_TRACES, LONGER_HIDDEN = "hidden", "longer/traces", "longer/hidden"


@dataclass(frozen=True)
class TraceSet:
    """Traces that a policy learns from or is evaluated on.

    Attributes
    ----------
    benchmark, length
        Name in params.yaml, and the tokens that its sequences are made to.
    traces, hidden
        Directories of the traces, and of the hidden states of the same sequences; the latter is absent where no
        input of the study is one.
    """

    benchmark: str
    length: int
    traces: Path
    hidden: Path

    def reader(
        self,
        split: str,
        hidden: bool,
        cache_bytes: int,
        layers: Sequence[int],
        sequences: Sequence[int] | None = None,
    ) -> ExampleReader:
        """A reader of what an agent sees: what the cache holds, or ``hidden`` states."""
        if hidden:
            return HiddenReader(self.traces, self.hidden, split, cache_bytes, layers, sequences)
        return ExampleReader(self.traces, split, cache_bytes, layers, sequences)


def trace_sets(params: Params, traces: Path, extra: Path) -> list[TraceSet]:
    """What is trained on: one for each benchmark of ``matrix.trained_on``.

    Parameters
    ----------
    traces, extra
        What the pipeline's stage traces and the study's wrote for a model.
    """
    return [
        TraceSet(name, training_length(params, name), traces / name, extra / name / HIDDEN)
        for name in params.matrix.trained_on
    ]


def longer_sets(study: StudySensitivity, extra: Path) -> dict[str, TraceSet]:
    """Benchmark -> its longer validation sequences."""
    return {
        name: TraceSet(name, longer.length, extra / name / LONGER_TRACES, extra / name / LONGER_HIDDEN)
        for name, longer in study.longer.items()
    }
