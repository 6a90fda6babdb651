"""Capture what the study needs besides a corpus' traces: hidden states, and longer sequences.

All of it for the layers of the study only, and hidden states only where an input of the study is one.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.corpora.build import build_longer_samples
from pipeline.params import LongerParams, RulerParams, SensitivityParams, TracesParams
from pipeline.samples.sample import Sample, read_samples, write_samples
from pipeline.sensitivity.trace_sets import HIDDEN, LONGER_HIDDEN, LONGER_TRACES
from pipeline.traces.build import build_traces
from pipeline.traces.hidden import build_hidden_states
from pipeline.workdir import write_json


def longer_samples(
    params: RulerParams, longer: LongerParams, corpus: str, weights: Path, train: Sequence[Sample], work: Path
) -> list[Sample]:
    """The corpus' samples of ``sensitivity.longer``.

    Parameters
    ----------
    weights
        The model's directory, for its tokenizer.
    train
        The corpus' training samples, with which the longer ones share nothing.
    work
        Directory in which finished samples of an interrupted run are found again.

    Raises
    ------
    PipelineError
        A task does not fit the length, or there is not enough text that training has not seen.
    """
    finished = work / "validation.parquet"
    if not finished.is_file():
        write_samples(finished, build_longer_samples(params, longer, corpus, weights, train, work / "generated"))
    return read_samples(finished)


def capture(
    out: Path,
    model: PreTrainedModel,
    model_name: str,
    corpus: str,
    splits: Mapping[str, Sequence[Sample]],
    longer: Sequence[Sample],
    study: SensitivityParams,
    params: TracesParams,
    advance: Callable[[int], None],
) -> None:
    """Write to ``out`` what ``trace_sets.py`` describes; finished shards found there are kept.

    Parameters
    ----------
    splits, longer
        split -> the samples of the traces, and what :func:`longer_samples` made, if anything.
    advance
        Called with the number of sequences that were run (or found done), :func:`count_sequences` in all.

    Raises
    ------
    PipelineError
        A layer of the study is none that the model ranks, a state does not fit float16, or the disk is full.
    """
    validation = {"validation": longer}
    if longer:
        build_traces(out / LONGER_TRACES, model, model_name, corpus, validation, params, advance, layers=study.layers)
    if "hidden" in study.inputs:
        found = {HIDDEN: splits} | ({LONGER_HIDDEN: validation} if longer else {})
        for directory, samples in found.items():
            build_hidden_states(out / directory, model, samples, study.layers, params.sequences_per_shard, advance)
    # There may be nothing else, and an output must exist.
    write_json(out / "contents.json", {"hidden": "hidden" in study.inputs, "longer": len(longer)})


def count_sequences(splits: Mapping[str, Sequence[Sample]], longer: Sequence[Sample], study: SensitivityParams) -> int:
    """How many sequences :func:`capture` reports."""
    if "hidden" not in study.inputs:
        return len(longer)
    return 2 * len(longer) + sum(map(len, splits.values()))
