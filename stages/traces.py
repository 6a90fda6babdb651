"""Stage `traces`: prefill the training and validation samples and store what the policies learn from."""

from stages import _paths
from stages._app import DeviceOption, ModelOption, TrainedOnOption, check_device, limit_threads, progress, run


def main(model: ModelOption, trained_on: TrainedOnOption, device: DeviceOption = "cpu") -> None:
    """Capture traces of the benchmark TRAINED_ON with MODEL into traces/MODEL/TRAINED_ON."""
    from pipeline.closure import Code
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.models.load import load_model
    from pipeline.models.params import read_dtype
    from pipeline.samples.sample import read_samples
    from pipeline.section import read
    from pipeline.traces.build import build_traces
    from pipeline.traces.params import TracesParams
    from pipeline.work import publish, work_directory

    check_device(device)
    params, dtype = read("traces", TracesParams), read_dtype(model)
    weights = _paths.model(model)
    files = {split: _paths.samples(model, trained_on, split) for split in ("train", "validation")}
    splits = {split: read_samples(path) for split, path in files.items()}
    verdict = read_verdict(_paths.check(model), model, dtype)
    for rows in splits.values():
        require_readable(verdict, rows)
    identity = {"traces": params.model_dump(mode="json"), "dtype": dtype}
    work = work_directory(f"traces-{model}-{trained_on}", identity, [weights, *files.values()], Code(__file__))
    limit_threads()
    language_model = load_model(weights, dtype, device)
    with progress(f"traces {model} {trained_on}", sum(map(len, splits.values()))) as advance:
        build_traces(work, language_model, model, trained_on, splits, params, advance)
    publish(work, _paths.traces(model, trained_on))


if __name__ == "__main__":
    run(main)
