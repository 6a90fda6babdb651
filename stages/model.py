"""Stage `model`: fetch a model's source and write it as a safetensors directory."""

from pathlib import Path

from stages._app import ModelOption, progress, run


def main(model: ModelOption) -> None:
    """Fetch MODEL and write models/MODEL."""
    from pipeline.models.export import SOURCE_FILE, export_model, files_to_export
    from pipeline.params import entry, load_params
    from pipeline.sources import fetch, record
    from pipeline.workdir import publish, work_directory, write_json

    params = entry(load_params().models, model, "models")
    source = fetch(params.source)
    files = files_to_export(source)
    recorded = record(params.source, source)
    # The record holds what the source's files are now: work on others is not continued.
    work = work_directory(f"model-{model}", params.model_dump(mode="json") | {"source": recorded}, [])
    with progress(f"model {model}", len(files)) as advance:
        export_model(source, work / "out", lambda name: advance(1, name))
    write_json(work / "out" / SOURCE_FILE, recorded)
    publish(work / "out", Path("models") / model)


if __name__ == "__main__":
    run(main)
