"""Stage `evaluate`: sweep all policies and budgets over the test samples of one corpus."""

from pathlib import Path

from stages._app import CorpusOption, DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(model: ModelOption, corpus: CorpusOption, device: DeviceOption = "cpu") -> None:
    """Evaluate every policy of MODEL on CORPUS into evaluations/MODEL/CORPUS."""
    from pipeline.evaluation.results import cost_table, evaluation_table, merge_parts, write_part
    from pipeline.evaluation.sweep import Sweep, policy_directories
    from pipeline.evaluation.verdict import read_verdict, require_readable
    from pipeline.models.load import load_model, load_tokenizer
    from pipeline.params import TRAINABLE, entry, load_params
    from pipeline.policy.agents import load_policy
    from pipeline.samples.sample import read_samples
    from pipeline.workdir import publish, work_directory

    check_device(device)
    params = load_params()
    dtype = entry(params.models, model, "models").dtype
    what, budgets = entry(params.corpora, corpus, "corpora"), params.budgets(corpus)
    perplexity = getattr(what, "perplexity", False)
    weights, test = Path("models") / model, Path("samples") / model / corpus / "test.parquet"
    directories = policy_directories(Path("policies") / model, params.matrix)
    identity = {
        "evaluation": params.evaluation.model_dump(mode="json"),
        "budgets": budgets,
        "perplexity": perplexity,
        "traces": params.traces.model_dump(mode="json"),
        "dtype": dtype,
    }
    work = work_directory(f"evaluate-{model}-{corpus}", identity, [weights, test, *directories.values()])
    policies = {key: load_policy(directory, model)[0].to(device) for key, directory in directories.items()}
    samples = read_samples(test)
    require_readable(read_verdict(Path("checks") / f"{model}.json", model, dtype), samples)
    limit_threads()
    sweep = Sweep(
        load_model(weights, dtype, device),
        load_tokenizer(weights),
        policies,
        params.evaluation,
        params.traces,
        budgets,
        whole_if_shorter=what.kind not in TRAINABLE,
        answer_perplexity=perplexity,
    )
    sweep.check(samples)
    outputs = {
        name: [work / name / f"{index:05d}.parquet" for index in range(len(samples))] for name in ("cost", "evaluation")
    }
    with progress(f"evaluate {model} {corpus}", len(samples)) as advance:
        for index, sample in enumerate(samples):
            # The evaluation part is written last: where it exists, the sample is done.
            if not outputs["evaluation"][index].exists():
                outcomes, costs = sweep.run(sample, params.evaluation.seed + index)
                write_part(outputs["cost"][index], cost_table(model, sample, costs, sweep.layers))
                write_part(outputs["evaluation"][index], evaluation_table(model, sample, outcomes))
            advance()
    for name, parts in outputs.items():
        out = work / "merged" / f"{name}.parquet"
        merge_parts(parts, out)
    publish(work / "merged", Path("evaluations") / model / corpus)


if __name__ == "__main__":
    run(main)
