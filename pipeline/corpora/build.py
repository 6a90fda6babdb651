"""From an entry of params.yaml to samples: one call for every kind of corpus. It knows none from inside."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.corpora import choice, dialogues, longbench, oasst, ruler
from pipeline.corpora.samples import SPLITS, Sample, Split
from pipeline.errors import PipelineError
from pipeline.params import AnyCorpusParams, LongerParams, RulerParams
from pipeline.sources import CACHE, fetch, record


def build_samples(
    params: AnyCorpusParams,
    name: str,
    model: Path,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
    cache: Path = CACHE,
) -> tuple[dict[Split, list[Sample]], dict[str, dict[str, str]]]:
    """The samples of a corpus by split, and the record of the sources they come from.

    Parameters
    ----------
    name
        Name of the corpus in params.yaml, which becomes the samples' ``corpus``.
    model
        Exported model directory; its tokenizer and chat template are used.
    work
        Directory for intermediate results that an interrupted run continues from.
    progress
        Called with a line for each finished piece, :func:`count_pieces` in all.

    Raises
    ------
    PipelineError
        The corpus is longer than the model's window, or its source cannot be had or does not suffice.
    """
    if params.kind != "choice":
        task_lengths = params.task_lengths if params.kind == "ruler" else {}
        _check_window(model, f"corpora.{name}", max([params.length, *task_lengths.values()]))
    source = fetch(params.source, cache)
    sources = {"source": record(params.source, source)}
    match params.kind:
        case "dialogues":
            return dialogues.build(params, name, source, model, progress), sources
        case "oasst":
            return oasst.build(params, name, source, model, progress), sources
        case "choice":
            return choice.build(params, name, source, model, progress), sources
        case "longbench":
            return longbench.build(params, name, source, model, progress), sources
        case "ruler":
            splitter = fetch(params.sentence_splitter, cache)
            sources["sentence_splitter"] = record(params.sentence_splitter, splitter)
            return ruler.build(params, name, source, splitter, model, work, progress), sources


def build_longer_samples(
    params: RulerParams,
    longer: LongerParams,
    name: str,
    model: Path,
    train: Sequence[Sample],
    work: Path,
    cache: Path = CACHE,
) -> list[Sample]:
    """Validation samples of a corpus at another length, which share nothing with its training samples ``train``."""
    _check_window(model, f"sensitivity.longer.{name}", longer.length)
    source, splitter = fetch(params.source, cache), fetch(params.sentence_splitter, cache)
    return ruler.build_longer(params, longer, name, source, splitter, model, train, work)


def _check_window(model: Path, key: str, length: int) -> None:
    """Raise where a model was not made for ``length`` tokens: it would answer, and its numbers mean nothing."""
    path = model / "config.json"
    if not path.is_file():  # loading the tokenizer will say so
        return
    config = json.loads(path.read_text())
    window = config.get("max_position_embeddings", length)
    # Some configs give the window before positions are stretched (Qwen2.5 with YaRN), others the one after.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    window = max(window, rope.get("factor", 1) * rope.get("original_max_position_embeddings", 0))
    if length > window:
        raise PipelineError(
            f"{key}: length {length} is above the {window:.0f} tokens that {model} reads "
            "(max_position_embeddings in its config.json); shorten it or take a model that reads more."
        )


def count_pieces(params: AnyCorpusParams) -> int:
    """How often ``progress`` will be called for this corpus."""
    splits = len([split for split in SPLITS if getattr(params.samples, split, 0)])
    return splits * len(params.tasks) if params.kind in ("ruler", "longbench") else splits
