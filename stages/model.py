"""Stage `model`: fetch a model's source and write it as a safetensors directory."""

from stages import _paths
from stages._app import ModelOption, progress, run


def main(model: ModelOption) -> None:
    """Fetch MODEL and write models/MODEL."""
    from pipeline.closure import Code
    from pipeline.files import write_json
    from pipeline.models.export import SOURCE_FILE, export_model, files_to_export
    from pipeline.sources.fetch import fetch
    from pipeline.sources.pins import read_state, record
    from pipeline.work import publish, work_directory

    pinned = read_state(_paths.source_state("models", model))["source"]
    source = fetch(pinned)
    files = files_to_export(source)
    recorded = record(pinned, source)
    # The record holds what the source's files are now: work on others is not continued.
    work = work_directory(f"model-{model}", {"source": recorded}, [], Code(__file__))
    with progress(f"model {model}", len(files)) as advance:
        export_model(source, work / "out", lambda name: advance(1, name))
    write_json(work / "out" / SOURCE_FILE, recorded)
    publish(work / "out", _paths.model(model))


if __name__ == "__main__":
    run(main)
