"""Stage `sources`: write down what every model and corpus is made from, so that DVC sees when a local file changes."""

import itertools
from pathlib import Path

from stages._app import run

SOURCES = Path("sources")


def main() -> None:
    """Write sources/state/{models,corpora}/NAME.json, after a check that no source lies where stages write."""
    from pipeline.params import PinnedUri, load_params
    from pipeline.sources import every_part, local_path, refuse_owned, state
    from pipeline.workdir import publish, remove, work_directory, write_json

    params = load_params()
    entries: dict[str, list[PinnedUri]] = {}
    for model in params.matrix.model:
        entries[f"models/{model}"] = [params.models[model].source]
    for corpus in params.matrix.benchmark:
        found = params.corpora[corpus]
        splitter = getattr(found, "sentence_splitter", None)
        entries[f"corpora/{corpus}"] = [found.source, *([splitter] if splitter else [])]
    every = every_part(itertools.chain(*entries.values()))
    for source in every:
        refuse_owned(source)
    work = work_directory("sources", {}, [])
    remove(work / "state")
    for name, sources in entries.items():
        write_json(work / "state" / f"{name}.json", state(sources))
    publish(work / "state", SOURCES / "state")
    # DVC looks at the outputs of this stage whenever it is asked for anything. While one of them is DVC's own lock,
    # which every call of DVC writes anew, the stage is always due; without local files it never is.
    watch = SOURCES / "watch"
    remove(watch)
    watch.mkdir(parents=True)
    (watch / ".gitkeep").touch()
    if any(local_path(source) for source in every):
        (watch / "every-time").symlink_to("../../.dvc/tmp/lock")


if __name__ == "__main__":
    run(main)
