"""Stage `texts`: rank every token of a few test samples by every policy, for the figures of coloured texts."""

from stages import _paths
from stages._app import BenchmarkOption, DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(model: ModelOption, benchmark: BenchmarkOption, device: DeviceOption = "cpu") -> None:
    """Rank the tokens of texts of BENCHMARK with every policy of MODEL into texts/MODEL/BENCHMARK."""
    from pipeline.closure import Code
    from pipeline.evaluation.parts import merge_parts, write_part
    from pipeline.evaluation.prefill import prefill_sample
    from pipeline.evaluation.texts import TextsParams, choose_texts, token_table
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.eviction.baselines.base import Baseline
    from pipeline.eviction.rankers import make_rankers
    from pipeline.models.layout import cache_layout
    from pipeline.models.load import load_model
    from pipeline.models.params import read_dtype
    from pipeline.models.tokenizer import load_tokenizer
    from pipeline.policy.agents import load_policy
    from pipeline.samples.sample import read_samples
    from pipeline.section import Names, read
    from pipeline.work import publish, work_directory

    check_device(device)
    seed, baselines = read("evaluation.seed", int), read("baselines", dict[str, Baseline])
    dtype = read_dtype(model)
    directories = _paths.policies(model, read("matrix.trained_on", Names), read("matrix.estimator", Names))
    tasks = read("texts", TextsParams).tasks.get(benchmark, ())
    weights, test = _paths.model(model), _paths.samples(model, benchmark, "test")
    identity = {"tasks": tasks, "seed": seed, "dtype": dtype, "baselines": baselines}
    code = Code(__file__, {"pipeline/eviction/baselines": tuple(b.own for b in baselines.values() if b.own)})
    work = work_directory(f"texts-{model}-{benchmark}", identity, [weights, test, *directories.values()], code)
    rankers = make_rankers(baselines)
    policies = {key: load_policy(directory, model)[0].to(device) for key, directory in directories.items()}
    samples = read_samples(test)
    chosen = choose_texts(samples, tasks)
    require_readable(read_verdict(_paths.check(model), model, dtype), [samples[index] for index in chosen])
    limit_threads()
    tokenizer, language_model = load_tokenizer(weights), load_model(weights, dtype, device)
    layers = cache_layout(language_model).ranked
    parts = [work / "parts" / f"{index:05d}.parquet" for index in chosen]
    with progress(f"texts {model} {benchmark}", len(chosen)) as advance:
        for index, part in zip(chosen, parts, strict=True):
            if not part.exists():
                # The seed that the sample has in the sweep: random ranks it as it did there.
                prefill = prefill_sample(language_model, samples[index], policies, rankers, seed + index)
                write_part(part, token_table(samples[index], tokenizer, prefill, layers))
            advance()
    merge_parts(parts, work / "merged/tokens.parquet")
    publish(work / "merged", _paths.texts(model, benchmark))


if __name__ == "__main__":
    run(main)
