"""Stage `evaluate`: ask every policy at every budget what the test samples of a benchmark ask."""

from stages import _paths
from stages._app import BenchmarkOption, DeviceOption, ExecutorOption, ModelOption, WorkersOption, run, run_job


def main(
    model: ModelOption,
    benchmark: BenchmarkOption,
    device: DeviceOption = "cpu",
    executor: ExecutorOption = "local",
    workers: WorkersOption = None,
) -> None:
    """Sweep every policy of MODEL over BENCHMARK into answers/MODEL/BENCHMARK."""
    from pipeline.closure import Code
    from pipeline.evaluation.job import SweepJob
    from pipeline.eviction.baselines.base import Baseline
    from pipeline.eviction.budget import AtBenchmark, EvaluationParams
    from pipeline.executor.units import Executor
    from pipeline.models.params import read_dtype
    from pipeline.section import Names, read
    from pipeline.work import publish, work_directory

    who = Executor(executor, workers)
    who.check(device)
    evaluation, here = read("evaluation", EvaluationParams), read(f"benchmarks.{benchmark}.evaluate", AtBenchmark)
    baselines = read("baselines", dict[str, Baseline])
    dtype = read_dtype(model)
    policies = _paths.policies(model, read("matrix.trained_on", Names), read("matrix.estimator", Names))
    weights, test = _paths.model(model), _paths.samples(model, benchmark, "test")
    identity = {"evaluation": evaluation, "here": here, "dtype": dtype, "baselines": baselines}
    code = Code(__file__, {"pipeline/eviction/baselines": tuple(b.own for b in baselines.values() if b.own)})
    work = work_directory(f"evaluate-{model}-{benchmark}", identity, [weights, test, *policies.values()], code)
    job = SweepJob(
        f"evaluate {model} {benchmark}", work, code, device, model, dtype, weights, _paths.check(model), test, policies,
        baselines, evaluation, here,
    )  # fmt: skip
    run_job(job, who)
    publish(job.gather(), _paths.answers(model, benchmark))


if __name__ == "__main__":
    run(main)
