"""Stage `score`: judge the answers of a benchmark."""

from stages import _paths
from stages._app import BenchmarkOption, ModelOption, run


def main(model: ModelOption, benchmark: BenchmarkOption) -> None:
    """Judge answers/MODEL/BENCHMARK into scores/MODEL/BENCHMARK.parquet."""
    from pipeline.benchmarks.base import read_benchmark
    from pipeline.closure import Code
    from pipeline.evaluation.parts import write_part
    from pipeline.evaluation.score import read_answers, score_answers
    from pipeline.samples.sample import read_samples
    from pipeline.work import publish, work_directory

    params = read_benchmark(benchmark)
    samples = read_samples(_paths.samples(model, benchmark, "test"))
    answers = read_answers(_paths.answers(model, benchmark) / "answers.parquet")
    code = Code(__file__, {"pipeline/benchmarks": (params.kind,)})
    out = work_directory(f"score-{model}-{benchmark}", {}, [], code) / f"{benchmark}.parquet"
    write_part(out, score_answers(params, samples, answers))
    publish(out, _paths.scores(model, benchmark))


if __name__ == "__main__":
    run(main)
