"""Stage `sources`: write down what every model and benchmark is made from, so that DVC sees a local file change."""

from stages._app import run
from stages._paths import WATCH, source_state


def main() -> None:
    """Write sources/state/{models,benchmarks}/NAME.json, after a check that no source lies where stages write."""
    from pipeline.benchmarks.base import read_benchmark
    from pipeline.closure import Code
    from pipeline.files import remove, write_json
    from pipeline.models.params import ModelParams
    from pipeline.section import Names, entry, read
    from pipeline.sources.pins import SourceParams, every_part, local_path, refuse_owned, state
    from pipeline.work import publish, work_directory

    pinned = read("sources", dict[str, SourceParams])
    models = read("models", dict[str, ModelParams])
    used = {("models", name): {"source": models[name].source} for name in read("matrix.model", Names)}
    used |= {("benchmarks", name): read_benchmark(name).sources for name in read("matrix.benchmark", Names)}
    entries = {
        key: {role: entry(pinned, name, "sources") for role, name in roles.items()} for key, roles in used.items()
    }
    every = every_part(source for sources in entries.values() for source in sources.values())
    for source in every:
        refuse_owned(source)
    work = work_directory("sources", {}, [], Code(__file__))
    remove(work / "state")
    for key, sources in entries.items():
        write_json(work / "state" / source_state(*key).relative_to(source_state()), state(sources))
    publish(work / "state", source_state())
    # DVC compares the dependencies of this stage whenever it is asked for anything. While DVC's own lock is among them,
    # into which every call of DVC writes its number, the stage is always due; without local files it never is.
    watched = WATCH / "every-time"
    remove(watched)
    if any(local_path(source) for source in every):
        watched.parent.mkdir(exist_ok=True)
        watched.symlink_to("../../.dvc/tmp/lock")


if __name__ == "__main__":
    run(main)
