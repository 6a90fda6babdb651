"""Where the study finds its traces, its hidden states, and those of longer sequences. It reads and writes nothing.

traces/<model>/<corpus>/                          those of the pipeline
study_traces/<model>/<corpus>/hidden/             hidden states of the same sequences
study_traces/<model>/<corpus>/longer/traces/      traces of the sequences of sensitivity.longer
study_traces/<model>/<corpus>/longer/hidden/      and their hidden states
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.params import Inputs, Params
from pipeline.traces.hidden import HiddenReader
from pipeline.traces.shards import TraceReader

HIDDEN, LONGER_TRACES, LONGER_HIDDEN = "hidden", "longer/traces", "longer/hidden"


@dataclass(frozen=True)
class TraceSet:
    """Traces that a policy learns from or is evaluated on.

    Attributes
    ----------
    corpus, length
        Name in params.yaml, and the tokens that its sequences are made to.
    traces, hidden
        Directories of the traces, and of the hidden states of the same sequences; the latter is absent where no
        input of the study is one.
    """

    corpus: str
    length: int
    traces: Path
    hidden: Path

    def reader(
        self,
        split: str,
        inputs: Inputs,
        cache_bytes: int,
        layers: Sequence[int],
        sequences: Sequence[int] | None = None,
    ) -> TraceReader:
        """A reader of what an agent with these inputs sees."""
        if inputs == "hidden":
            return HiddenReader(self.traces, self.hidden, split, cache_bytes, layers, sequences)
        return TraceReader(self.traces, split, cache_bytes, layers, sequences)


def trace_sets(params: Params, traces: Path, extra: Path) -> list[TraceSet]:
    """What is trained on: one for each corpus of the matrix.

    Parameters
    ----------
    traces, extra
        What the stages traces and study_traces wrote for a model.
    """
    return [
        TraceSet(corpus, params.training_length(corpus), traces / corpus, extra / corpus / HIDDEN)
        for corpus in params.matrix.corpus
    ]


def longer_sets(params: Params, extra: Path) -> dict[str, TraceSet]:
    """Training corpus -> its longer validation sequences."""
    return {
        corpus: TraceSet(corpus, longer.length, extra / corpus / LONGER_TRACES, extra / corpus / LONGER_HIDDEN)
        for corpus, longer in params.sensitivity.longer.items()
    }
