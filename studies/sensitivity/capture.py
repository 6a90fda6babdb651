"""Capture what the study needs besides the pipeline's traces: hidden states, and longer sequences.

All of it for the layers of the study only, and hidden states only where an input of the study is one.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.files import write_json
from pipeline.samples.sample import Sample
from pipeline.traces.build import build_traces
from pipeline.traces.params import TracesParams
from studies.sensitivity.hidden import build_hidden_states
from studies.sensitivity.params import StudySensitivity
from studies.sensitivity.trace_sets import HIDDEN, LONGER_HIDDEN, LONGER_TRACES


def capture(
    out: Path,
    model: PreTrainedModel,
    model_name: str,
    trained_on: str,
    splits: Mapping[str, Sequence[Sample]],
    longer: Sequence[Sample],
    study: StudySensitivity,
    params: TracesParams,
    advance: Callable[[int], None],
) -> None:
    """Write to ``out`` what ``trace_sets.py`` describes; finished shards found there are kept.

    Parameters
    ----------
    splits, longer
        split -> the samples of the traces, and what :func:`studies.sensitivity.longer.longer_samples` made, if
        anything.
    advance
        Called with the number of sequences that were run (or found done), :func:`count_sequences` in all.

    Raises
    ------
    PipelineError
        A layer of the study is none that the model ranks, a state does not fit float16, or the disk is full.
    """
    validation = {"validation": longer}
    if longer:
        directory = out / LONGER_TRACES
        build_traces(directory, model, model_name, trained_on, validation, params, advance, layers=study.layers)
    if "hidden" in study.inputs:
        found = {HIDDEN: splits} | ({LONGER_HIDDEN: validation} if longer else {})
        for name, samples in found.items():
            build_hidden_states(out / name, model, samples, study.layers, params.sequences_per_shard, advance)
    # There may be nothing else, and an output must exist.
    write_json(out / "contents.json", {"hidden": "hidden" in study.inputs, "longer": len(longer)})


def count_sequences(splits: Mapping[str, Sequence[Sample]], longer: Sequence[Sample], study: StudySensitivity) -> int:
    """How many sequences :func:`capture` reports."""
    if "hidden" not in study.inputs:
        return len(longer)
    return 2 * len(longer) + sum(map(len, splits.values()))
