"""Stage `samples`: turn a benchmark into prompts with true continuations, tokenised for a model."""

from stages import _paths
from stages._app import BenchmarkOption, ExecutorOption, ModelOption, WorkersOption, progress, run


def main(
    model: ModelOption,
    benchmark: BenchmarkOption,
    executor: ExecutorOption = "local",
    workers: WorkersOption = None,
) -> None:
    """Write samples/MODEL/BENCHMARK/{train,validation,test}.parquet and source.json.

    Only the tasks of RULER are divided among Ray's workers; other benchmarks take this process seconds.
    """
    from pipeline.benchmarks.base import read_benchmark
    from pipeline.benchmarks.base_making import make_samples
    from pipeline.closure import Code
    from pipeline.executor.units import Executor
    from pipeline.files import write_json
    from pipeline.samples.sample import write_samples
    from pipeline.sources.pins import read_state
    from pipeline.work import publish, work_directory

    who = Executor(executor, workers)
    who.check("cpu")
    params = read_benchmark(benchmark)
    sources = read_state(_paths.source_state("benchmarks", benchmark))
    directory = _paths.model(model)
    # Only the tokenizer counts: other weights give the same samples.
    tokenizer = sorted(p for p in directory.glob("*") if p.suffix in (".json", ".jinja", ".model", ".txt"))
    upstream = [*(tokenizer or [directory]), _paths.source_state("benchmarks", benchmark)]
    code = Code(__file__, {"pipeline/benchmarks": (params.kind,)})
    work = work_directory(f"samples-{model}-{benchmark}", params.model_dump(mode="json"), upstream, code)
    with progress(f"samples {model} {benchmark}", params.pieces()) as advance:
        samples, recorded = make_samples(params, benchmark, directory, sources, work / "generated", advance, who)
    for split, rows in samples.items():
        write_samples(work / "out" / f"{split}.parquet", rows)
    write_json(work / "out/source.json", recorded)
    publish(work / "out", _paths.samples(model, benchmark))


if __name__ == "__main__":
    run(main)
