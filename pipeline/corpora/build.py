"""From an entry of params.yaml to samples: one call for every kind of corpus. It knows none from inside."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.corpora import choice, dialogues, longbench, oasst, ruler
from pipeline.corpora.samples import SPLITS, Sample, Split
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
    """
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
    source, splitter = fetch(params.source, cache), fetch(params.sentence_splitter, cache)
    return ruler.build_longer(params, longer, name, source, splitter, model, train, work)


def count_pieces(params: AnyCorpusParams) -> int:
    """How often ``progress`` will be called for this corpus."""
    splits = len([split for split in SPLITS if getattr(params.samples, split, 0)])
    return splits * len(params.tasks) if params.kind in ("ruler", "longbench") else splits
