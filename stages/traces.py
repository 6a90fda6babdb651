"""Stage `traces`: run the model over the training and validation samples and store what the policies learn from."""

from stages import _paths
from stages._app import DeviceOption, ExecutorOption, ModelOption, TrainedOnOption, WorkersOption, run, run_job


def main(
    model: ModelOption,
    trained_on: TrainedOnOption,
    device: DeviceOption = "cpu",
    executor: ExecutorOption = "local",
    workers: WorkersOption = None,
) -> None:
    """Capture traces of the benchmark TRAINED_ON with MODEL into traces/MODEL/TRAINED_ON."""
    from pipeline.closure import Code
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.executor.units import Executor
    from pipeline.models.params import read_dtype
    from pipeline.samples.sample import read_samples
    from pipeline.section import read
    from pipeline.traces.job import TracesJob
    from pipeline.traces.params import TracesParams
    from pipeline.traces.shards import TraceShape
    from pipeline.work import publish, work_directory

    who = Executor(executor, workers)
    who.check(device)
    params, dtype = read("traces", TracesParams), read_dtype(model)
    weights = _paths.model(model)
    samples = {split: _paths.samples(model, trained_on, split) for split in ("train", "validation")}
    splits = {split: read_samples(path) for split, path in samples.items()}
    verdict = read_verdict(_paths.check(model), model, dtype)
    for rows in splits.values():
        require_readable(verdict, rows)
    code, identity = Code(__file__), {"traces": params, "dtype": dtype}
    work = work_directory(f"traces-{model}-{trained_on}", identity, [weights, *samples.values()], code)
    shape = TraceShape(model, trained_on, tuple(verdict.ranked_layers), verdict.kv_heads, verdict.head_dim)
    counts = {split: len(rows) for split, rows in splits.items()}
    job = TracesJob(f"traces {model} {trained_on}", work, code, device, shape, dtype, weights, samples, counts, params)
    run_job(job, who)
    publish(job.gather(), _paths.traces(model, trained_on))


if __name__ == "__main__":
    run(main)
