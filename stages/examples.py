"""Stage `examples`: rank every token of a few test samples by every policy, for the figures of coloured texts."""

from pathlib import Path

from stages._app import CorpusOption, DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(model: ModelOption, corpus: CorpusOption, device: DeviceOption = "cpu") -> None:
    """Rank the tokens of examples of CORPUS with every policy of MODEL into examples/MODEL/CORPUS."""
    from pipeline.evaluation.examples import choose_examples, token_table
    from pipeline.evaluation.results import merge_parts, write_part
    from pipeline.evaluation.sweep import Sweep, policy_directories
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.models.load import load_model, load_tokenizer
    from pipeline.params import entry, load_params
    from pipeline.policy.agents import load_policy
    from pipeline.samples.sample import read_samples
    from pipeline.workdir import publish, work_directory

    check_device(device)
    params = load_params()
    dtype = entry(params.models, model, "models").dtype
    weights, test = Path("models") / model, Path("samples") / model / corpus / "test.parquet"
    directories = policy_directories(Path("policies") / model, params.matrix)
    tasks = params.examples.tasks.get(corpus, ())
    identity = {
        "tasks": tasks,
        "seed": params.evaluation.seed,
        "traces": params.traces.model_dump(mode="json"),
        "dtype": dtype,
    }
    work = work_directory(f"examples-{model}-{corpus}", identity, [weights, test, *directories.values()])
    policies = {key: load_policy(directory, model)[0].to(device) for key, directory in directories.items()}
    samples = read_samples(test)
    chosen = choose_examples(samples, tasks)
    require_readable(read_verdict(Path("checks") / f"{model}.json", model, dtype), [samples[index] for index in chosen])
    limit_threads()
    tokenizer = load_tokenizer(weights)
    language_model = load_model(weights, dtype, device)
    sweep = Sweep(language_model, tokenizer, policies, params.evaluation, params.traces, params.budgets(corpus))
    parts = [work / "parts" / f"{index:05d}.parquet" for index in chosen]
    with progress(f"examples {model} {corpus}", len(chosen)) as advance:
        for index, part in zip(chosen, parts, strict=True):
            if not part.exists():
                # The seed that the sample has in the sweep: random ranks it as it did there.
                prefill = sweep.prefill(samples[index], params.evaluation.seed + index)
                write_part(part, token_table(samples[index], tokenizer, prefill, sweep.layers))
            advance()
    merge_parts(parts, work / "merged/tokens.parquet")
    publish(work / "merged", Path("examples") / model / corpus)


if __name__ == "__main__":
    run(main)
