"""Stage `study_traces` of studies/dvc.yaml: hidden states and traces of longer sequences, for the sensitivity study."""

from pathlib import Path

from stages._app import CorpusOption, DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(model: ModelOption, corpus: CorpusOption, device: DeviceOption = "cpu") -> None:
    """Capture with MODEL what the sensitivity study needs besides the traces of CORPUS, into study_traces/."""
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.models.load import load_model
    from pipeline.params import RulerParams, entry, load_params
    from pipeline.samples.sample import Sample, read_samples
    from pipeline.sensitivity.capture import capture, count_sequences, longer_samples
    from pipeline.workdir import publish, work_directory

    check_device(device)
    params = load_params()
    study, dtype, source = (
        params.sensitivity,
        entry(params.models, model, "models").dtype,
        entry(params.corpora, corpus, "corpora"),
    )
    weights, samples = Path("models") / model, Path("samples") / model / corpus
    files = [samples / f"{split}.parquet" for split in ("train", "validation")]
    splits = {path.stem: read_samples(path) for path in files}
    identity = {
        "dtype": dtype,
        "traces": params.traces.model_dump(mode="json"),
        "study": study.model_dump(mode="json", include={"layers", "inputs", "longer"}),
        "corpus": source.model_dump(mode="json"),
    }
    work = work_directory(f"study-traces-{model}-{corpus}", identity, [weights, *files])
    limit_threads()
    longer: list[Sample] = []
    if corpus in study.longer and isinstance(source, RulerParams):
        longer = longer_samples(source, study.longer[corpus], corpus, weights, splits["train"], work / "samples")
    verdict = read_verdict(Path("checks") / f"{model}.json", model, dtype)
    for rows in (*splits.values(), longer):
        require_readable(verdict, rows)
    language_model = load_model(weights, dtype, device)
    with progress(f"study traces {model} {corpus}", count_sequences(splits, longer, study)) as advance:
        capture(work / "out", language_model, model, corpus, splits, longer, study, params.traces, advance)
    publish(work / "out", Path("study_traces") / model / corpus)


if __name__ == "__main__":
    run(main)
