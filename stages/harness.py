"""Compare the uncompressed model's multiple choice with lm-eval's own numbers. It is no stage of dvc.yaml."""

from pathlib import Path
from typing import Annotated

import typer

from stages._app import DeviceOption, ModelOption, check_device, limit_threads, progress, run


def main(
    model: ModelOption,
    params_file: Annotated[Path, typer.Option("--params", help="The params file.")] = Path("params.yaml"),
    rows: Annotated[int | None, typer.Option(min=1, help="Rows per benchmark in place of samples.test.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Run lm-eval and the sweep's uncompressed model on the same rows of every multiple choice of the matrix."""
    import tempfile

    import torch

    from pipeline.corpora import choice
    from pipeline.errors import PipelineError
    from pipeline.evaluation.harness import TOLERANCE, compare, harness_answers, own_answers
    from pipeline.models.load import load_model, load_tokenizer
    from pipeline.params import ChoiceParams, EvaluationSize, entry, load_params
    from pipeline.sources import fetch

    check_device(device)
    limit_threads()
    params = load_params(params_file)
    dtype, weights = entry(params.models, model, "models").dtype, Path("models") / model
    language_model, tokenizer = load_model(weights, dtype, device), load_tokenizer(weights)
    columns = "{:<16}{:>6}{:>10}{:>10}{:>14}{:>14}{:>18}{:>14}"
    titles = ("rows", "lm-eval", "ours", "same tokens", "same outcome", "same likelihoods", "largest diff")
    typer.echo(columns.format("benchmark", *titles))
    complete = []
    for name in params.matrix.benchmark:
        what = params.corpora[name]
        if not isinstance(what, ChoiceParams):
            continue
        source = fetch(what.source)
        chosen = what if rows is None else what.model_copy(update={"samples": EvaluationSize(test=rows)})
        samples = choice.build(chosen, name, source, weights)["test"]
        with progress(f"harness {name}", len(samples)) as advance:
            ours = own_answers(samples, language_model, tokenizer, params.evaluation, params.traces, advance)
        with tempfile.TemporaryDirectory() as scratch:
            harness = harness_answers(what.task, source, samples, weights, dtype, device, Path(scratch))
        found = compare(harness, ours, TOLERANCE[getattr(torch, dtype)])
        counts = (found.same_tokens, found.same_outcome, found.same_likelihoods)
        accuracies = (f"{found.harness:.4f}", f"{found.ours:.4f}")
        typer.echo(columns.format(name, found.rows, *accuracies, *counts, f"{found.largest_difference:.1e}"))
        complete.append(found.complete)
    if not complete:
        raise PipelineError(f"{params_file}: matrix.benchmark has no multiple choice; use profiles/local-data.yaml.")
    if not all(complete):
        raise PipelineError("Some rows differ from lm-eval's; see the table above.")


if __name__ == "__main__":
    run(main)
