"""Kill ``dvc repro`` at random moments and compare what comes out in the end with an undisturbed run, byte for byte.

    python studies/kill_repro.py --kills 100 --seed 0 --each 3

Not part of CI: an undisturbed run of the ci profile takes minutes, and so does each pass. A pass begins with nothing
but the tracked files and is killed in each stage, once or ``--each`` times in a row, at moments drawn evenly from the
time that the stage took undisturbed (DVC's own work before the next stage included): SIGKILL to the whole process
group. Then ``dvc repro`` is started again, as ``make repro`` does it: a dvc.lock that a kill left half-written is moved
away first (counted and printed), and nothing else may be needed. Passes follow until there are as many kills as asked
for.

Compared are all files of the checkout and the parsed dvc.lock, but for what makes no promise: git's and DVC's own
folders, the caches, MLflow's database and artifacts, and .work, where unfinished work is kept on purpose. Of DVC's
cache it is required that ``dvc status`` finds it whole. What .work and the cache hold besides is counted and printed.
"""

import argparse
import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[1]
NO_PROMISE = {".git", ".work", ".cache", "mlartifacts", "__pycache__"}
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "KVP_"))
} | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_OFFLINE": "1",
    # The order of sums, and so the last bits, depends on the number of threads.
    "OMP_NUM_THREADS": "1",
    **{f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


@dataclass
class Undisturbed:
    """What the run without kills gave, and when each stage ran: name -> seconds."""

    durations: dict[str, float]
    files: dict[str, str]
    lock: object
    objects: set[str]


@dataclass
class Pass:
    """Where one pass was killed, and what differs in the end."""

    kills: list[tuple[str, float]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    damaged_locks: int = 0
    strays: Counter[str] = field(default_factory=Counter)


def new_origin(directory: Path) -> None:
    """The tracked files with the ci profile, as a repository of their own: what is edited meanwhile does not count."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in names.rstrip("\0").split("\0"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, directory / name)
    subprocess.run([sys.executable, "-m", "stages.profile", "ci"], cwd=directory, env=ENVIRONMENT, check=True)
    for command in ("init --quiet", "add --all", "commit --quiet --message Start"):
        subprocess.run(["git", *command.split()], cwd=directory, env=ENVIRONMENT, check=True)


def new_checkout(directory: Path) -> None:
    """A clone of the origin beside it, before any stage ran, that shares the fetched sources."""
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", directory.parent / "origin", directory], env=ENVIRONMENT, check=True)
    fetched = REPOSITORY / ".cache/sources"
    fetched.mkdir(parents=True, exist_ok=True)
    (directory / ".cache").mkdir()
    (directory / ".cache/sources").symlink_to(fetched)


def last_of(stage: str, stages: Iterator[str]) -> str:
    """The last of the stages that are yet to come, ``stage`` if there are none."""
    return [stage, *stages][-1]


def move_damaged_lock(directory: Path) -> bool:
    """The Makefile's own line for a dvc.lock that DVC refuses; returns whether there was one."""
    lines = (directory / "Makefile").read_text().splitlines()
    (line,) = (line.strip() for line in lines if "dvc.lock.damaged" in line)
    subprocess.run(["sh", "-c", line], cwd=directory, env=ENVIRONMENT, check=True)
    damaged = directory / "dvc.lock.damaged"
    found = damaged.exists()
    damaged.unlink(missing_ok=True)
    return found


def start(directory: Path) -> "subprocess.Popen[str]":
    environment = ENVIRONMENT | {"PYTHONPATH": str(directory)}
    return subprocess.Popen(
        ["dvc", "repro"], cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def stages_started(process: "subprocess.Popen[str]", printed: list[str]) -> Iterator[str]:
    """Names of stages as DVC starts them; all lines go to ``printed``."""
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(line)
        if match := re.match(r"Running stage '([^']+)'", line):
            yield match[1]


def undisturbed(directory: Path) -> Undisturbed:
    new_checkout(directory)
    process, printed, times = start(directory), list[str](), dict[str, float]()
    for stage in stages_started(process, printed):
        times[stage] = time.monotonic()
    if process.wait():
        sys.exit(f"The undisturbed run failed:\n{''.join(printed)[-4000:]}")
    ends = [*list(times.values())[1:], time.monotonic()]
    durations = {stage: end - begun for (stage, begun), end in zip(times.items(), ends, strict=True)}
    return Undisturbed(durations, files(directory), lock(directory), objects(directory))


def one_pass(directory: Path, reference: Undisturbed, draw: random.Random, kills: int, each: int) -> Pass:
    """Run the pipeline from nothing to the end, killed at most ``kills`` times, at most ``each`` times in a stage."""
    new_checkout(directory)
    done, order = Pass(), list(reference.durations)
    places = list(range(len(order))) * each
    targets = sorted(draw.sample(places, min(kills, len(places))))
    printed: list[str] = []
    while targets:
        done.damaged_locks += move_damaged_lock(directory)
        process = start(directory)
        # A kill that came late may have let the next target finish too.
        stages = stages_started(process, printed)
        stage = next((name for name in stages if order.index(name) >= targets[0]), None)
        if stage is None:
            process.wait()
            break
        moment = draw.random() * reference.durations[stage]
        targets = [target for target in targets[1:] if target >= order.index(stage)]
        # Read on meanwhile: a full pipe would stop the stage.
        reader = ThreadPoolExecutor(1)
        last = reader.submit(last_of, stage, stages)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done.kills.append((last.result(), moment))
        reader.shutdown()
    done.damaged_locks += move_damaged_lock(directory)
    process = start(directory)
    for _ in stages_started(process, printed):
        pass
    if process.wait():
        done.differences.append(f"dvc repro failed: {''.join(printed)[-2000:]}")
    done.differences += compare(directory, reference)
    done.strays["files in .work"] += sum(
        path.is_file() and path.name != "lock" for path in (directory / ".work").rglob("*")
    )
    done.strays["objects of DVC's cache that nothing refers to"] += len(objects(directory) - reference.objects)
    return done


def compare(directory: Path, reference: Undisturbed) -> list[str]:
    found = files(directory)
    differences = [f"more: {name}" for name in sorted(found.keys() - reference.files.keys())]
    differences += [f"missing: {name}" for name in sorted(reference.files.keys() - found.keys())]
    both = sorted(found.keys() & reference.files.keys())
    differences += [f"other bytes: {name}" for name in both if found[name] != reference.files[name]]
    if lock(directory) != reference.lock:
        differences.append("dvc.lock says something else")
    status = subprocess.run(
        ["dvc", "status", "dvc.yaml"], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if "up to date" not in status.stdout:
        differences.append(f"dvc status: {status.stdout}{status.stderr}")
    return differences


def files(directory: Path) -> dict[str, str]:
    """sha256 of every file that is promised to be the same, by its name in the checkout."""
    found = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        promised = not NO_PROMISE & set(name.parts) and name.parts[:2] not in ((".dvc", "tmp"), (".dvc", "cache"))
        if promised and path.is_file() and not re.match(r"mlflow\.db|dvc\.lock", path.name):
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def lock(directory: Path) -> object:
    return YAML(typ="safe").load((directory / "dvc.lock").read_text())


def objects(directory: Path) -> set[str]:
    return {path.name for path in (directory / ".dvc/cache/files").rglob("*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=1, help="Kills in a row of one stage, in a pass.")
    parser.add_argument("--workers", type=int, default=1, help="Passes at a time; each needs a core.")
    parser.add_argument("--scratch", type=Path, help="Where the checkouts lie; a temporary folder by default.")
    options = parser.parse_args()
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="kill-repro-"))
    new_origin(scratch / "origin")
    reference = undisturbed(scratch / "undisturbed")
    print("stage: seconds undisturbed")
    for stage, seconds in reference.durations.items():
        print(f"  {stage}: {seconds:.1f}", flush=True)
    passes: list[Pass] = []
    numbers = itertools.count()
    with ThreadPoolExecutor(options.workers) as pool:
        while (left := options.kills - sum(len(done.kills) for done in passes)) > 0:
            shares = [min(len(reference.durations) * options.each, left // options.workers + 1)] * options.workers
            started = [
                pool.submit(
                    one_pass, scratch / f"pass{worker}", reference, random.Random(f"{options.seed} {next(numbers)}"),
                    min(share, left), options.each,
                )
                for worker, share in enumerate(shares)
            ]  # fmt: skip
            for future in started:
                done = future.result()
                passes.append(done)
                print(f"pass {len(passes)}: {len(done.kills)} kills, {done.differences or 'all equal'}", flush=True)
    where = Counter(stage for done in passes for stage, _ in done.kills)
    print("\n| stage | seconds | kills |\n|---|---|---|")
    for stage, seconds in reference.durations.items():
        print(f"| {stage} | {seconds:.1f} | {where[stage]} |")
    strays: Counter[str] = sum((done.strays for done in passes), Counter())
    for what, count in strays.items():
        print(f"{what}: {count} in {len(passes)} passes")
    print(f"dvc.lock left half-written: {sum(done.damaged_locks for done in passes)} times")
    differences = [difference for done in passes for difference in done.differences]
    print(f"{sum(where.values())} kills in {len(passes)} passes: {len(differences)} differences")
    if options.scratch is None:
        shutil.rmtree(scratch)
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
