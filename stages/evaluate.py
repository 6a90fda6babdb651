"""Stage `evaluate`: ask every policy at every budget what the test samples of a benchmark ask."""

from stages import _paths
from stages._app import BenchmarkOption, DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(model: ModelOption, benchmark: BenchmarkOption, device: DeviceOption = "cpu") -> None:
    """Sweep every policy of MODEL over BENCHMARK into answers/MODEL/BENCHMARK."""
    from pipeline.closure import Code
    from pipeline.evaluation.answers import answer_table, cost_table
    from pipeline.evaluation.parts import merge_parts, write_part
    from pipeline.evaluation.sweep import Sweep
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.eviction.baselines.base import Baseline
    from pipeline.eviction.budget import AtBenchmark, EvaluationParams
    from pipeline.eviction.rankers import make_rankers
    from pipeline.models.load import load_model, load_tokenizer
    from pipeline.models.params import read_dtype
    from pipeline.policy.agents import load_policy
    from pipeline.samples.sample import read_samples
    from pipeline.section import Names, read
    from pipeline.work import publish, work_directory

    check_device(device)
    evaluation, here = read("evaluation", EvaluationParams), read(f"benchmarks.{benchmark}.evaluate", AtBenchmark)
    baselines = read("baselines", dict[str, Baseline])
    dtype = read_dtype(model)
    directories = _paths.policies(model, read("matrix.trained_on", Names), read("matrix.estimator", Names))
    weights, test = _paths.model(model), _paths.samples(model, benchmark, "test")
    identity = {"evaluation": evaluation, "here": here, "dtype": dtype, "baselines": baselines}
    code = Code(__file__, {"pipeline/eviction/baselines": tuple(b.own for b in baselines.values() if b.own)})
    work = work_directory(f"evaluate-{model}-{benchmark}", identity, [weights, test, *directories.values()], code)
    rankers = make_rankers(baselines)
    policies = {key: load_policy(directory, model)[0].to(device) for key, directory in directories.items()}
    samples = read_samples(test)
    require_readable(read_verdict(_paths.check(model), model, dtype), samples)
    limit_threads()
    language_model, tokenizer = load_model(weights, dtype, device), load_tokenizer(weights)
    budgets = here.budgets or evaluation.budgets
    whole = here.shorter == "whole"
    sweep = Sweep(language_model, tokenizer, policies, rankers, evaluation, budgets, whole)
    sweep.check(samples)
    parts = {
        name: [work / name / f"{index:05d}.parquet" for index in range(len(samples))] for name in ("cost", "answers")
    }
    with progress(f"evaluate {model} {benchmark}", len(samples)) as advance:
        for index, sample in enumerate(samples):
            # The answers are written last: where they are, the sample is done.
            if not parts["answers"][index].exists():
                said, costs = sweep.run(sample, evaluation.seed + index)
                write_part(parts["cost"][index], cost_table(model, sample, costs, sweep.layout.ranked))
                write_part(parts["answers"][index], answer_table(model, sample, said))
            advance()
    for name, files in parts.items():
        merge_parts(files, work / "merged" / f"{name}.parquet")
    publish(work / "merged", _paths.answers(model, benchmark))


if __name__ == "__main__":
    run(main)
