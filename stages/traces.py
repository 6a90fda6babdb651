"""Stage `traces`: prefill the training and validation samples and store what the policies learn from."""

from pathlib import Path

from stages._app import CorpusOption, DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(model: ModelOption, corpus: CorpusOption, device: DeviceOption = "cpu") -> None:
    """Capture traces of CORPUS with MODEL into traces/MODEL/CORPUS."""
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.models.load import load_model
    from pipeline.params import entry, load_params
    from pipeline.samples.sample import read_samples
    from pipeline.traces.build import build_traces
    from pipeline.workdir import publish, work_directory

    check_device(device)
    params = load_params()
    dtype = entry(params.models, model, "models").dtype
    weights, samples = Path("models") / model, Path("samples") / model / corpus
    splits = {split: read_samples(samples / f"{split}.parquet") for split in ("train", "validation")}
    verdict = read_verdict(Path("checks") / f"{model}.json", model, dtype)
    for rows in splits.values():
        require_readable(verdict, rows)
    identity = {"traces": params.traces.model_dump(mode="json"), "dtype": dtype}
    files = [samples / f"{split}.parquet" for split in splits]
    work = work_directory(f"traces-{model}-{corpus}", identity, [weights, *files])
    limit_threads()
    language_model = load_model(weights, dtype, device)
    with progress(f"traces {model} {corpus}", sum(map(len, splits.values()))) as advance:
        build_traces(work, language_model, model, corpus, splits, params.traces, advance)
    publish(work, Path("traces") / model / corpus)


if __name__ == "__main__":
    run(main)
