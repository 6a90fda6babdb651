"""Stage `samples`: turn a corpus into prompts with true continuations, tokenised for a model."""

from pathlib import Path

from stages._app import CorpusOption, ModelOption, progress, run


def main(model: ModelOption, corpus: CorpusOption) -> None:
    """Write samples/MODEL/CORPUS/{train,validation,test}.parquet and source.json."""
    from pipeline.corpora.build import build_samples, count_pieces
    from pipeline.params import entry, load_params
    from pipeline.samples.sample import write_samples
    from pipeline.workdir import publish, work_directory, write_json

    params = entry(load_params().corpora, corpus, "corpora")
    directory = Path("models") / model
    # Only the tokenizer counts: other weights give the same samples.
    tokenizer = sorted(p for p in directory.glob("*") if p.suffix in (".json", ".jinja", ".model", ".txt"))
    work = work_directory(f"samples-{model}-{corpus}", params.model_dump(mode="json"), tokenizer or [directory])
    with progress(f"samples {model} {corpus}", count_pieces(params)) as advance:
        samples, sources = build_samples(params, corpus, directory, work / "generated", lambda piece: advance(1, piece))
    for split, rows in samples.items():
        write_samples(work / "out" / f"{split}.parquet", rows)
    write_json(work / "out/source.json", sources)
    publish(work / "out", Path("samples") / model / corpus)


if __name__ == "__main__":
    run(main)
