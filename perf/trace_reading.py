"""Reading traces into training against reading the same files plainly, and the time that training waits for them.

Random traces of SmolLM2's shapes are written, as many sequences as fill some shards. ``first`` is a new reader that
reads every sequence: it also checks each file's checksum and finds the values in it. ``later`` is the same reader
again, with nothing kept in memory. ``raw`` reads all files whole, into memory that is new each time, as the reader's
is. ``checksum`` is what ``first`` does besides. The files stay in the system's page cache throughout, for all alike.

Then the time that the loop of training spends in ``queue.get()`` is set against the whole: on the same traces, whose
numbers make no difference to time, or on real ones (``--traces``, a directory that ``stages.traces`` made).
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from perf.measure import interleaved, median_ratio, write_result
from perf.trace_size import MODELS, random_layer
from pipeline.files import hash_file
from pipeline.policy import train
from pipeline.policy.estimators.base import ESTIMATORS
from pipeline.section import read
from pipeline.traces.shards import TraceReader, TraceShape, write_manifest, write_shard

HEADS = MODELS[0]
BLOCK_SIZE = 64  # of the default profile
COMPARED = ("exact", "rloo")


def write_traces(root: Path, layers: int, shards: int, sequences: int) -> None:
    shape = TraceShape(HEADS.model, "random", layers, HEADS.kv_heads, HEADS.head_dim, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    splits = {"train": shards, "validation": 1}
    for split, count in splits.items():
        for shard in range(count):
            members = range(shard * sequences, (shard + 1) * sequences)
            traces = ((index, "random", [random_layer(HEADS, generator) for _ in range(layers)]) for index in members)
            write_shard(root, split, shard, shape, traces)
    write_manifest(root, shape, splits)


def read_all(reader: TraceReader) -> None:
    for sequence in range(len(reader.sequences)):
        reader.read(sequence)


def measure_reading(root: Path, repeats: int) -> dict[str, Any]:
    files = sorted((root / "train").rglob("*.parquet"))
    size = sum(file.stat().st_size for file in files)
    reader = TraceReader(root, "train", cache_bytes=0)
    works: dict[str, Callable[[], object]] = {
        "raw": lambda: [file.read_bytes() for file in files],
        "first": lambda: read_all(TraceReader(root, "train", cache_bytes=0)),
        "later": lambda: read_all(reader),
        "checksum": lambda: [hash_file(file) for file in files],
    }
    seconds = interleaved(works, repeats)
    rates = {name: median_ratio(seconds["raw"], seconds[name]) for name in ("first", "later", "checksum")}
    for name in works:
        print(f"{name}: {size / min(seconds[name]) / 1e9:.2f} GB/s at best")
    for name, (middle, smallest, largest) in rates.items():
        print(f"rate of {name} / rate of raw: {middle:.3f} ({smallest:.3f} .. {largest:.3f})")
    return {"bytes": size, "files": len(files), "seconds": seconds, "rate_against_raw": rates}


class TimedQueue(Queue[Any]):
    """Adds up the time that ``get`` takes."""

    waited = 0.0

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        started = time.perf_counter()
        item = super().get(block, timeout)
        TimedQueue.waited += time.perf_counter() - started
        return item


def measure_waiting(root: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """estimator -> seconds of training after its first step, and how many of them its loop waited for data."""
    params = read("train", train.TrainParams)
    params = params.model_copy(update={"steps": arguments.steps, "validate_every": arguments.steps})
    train.Queue = TimedQueue  # type: ignore[misc,assignment]
    results = {}
    for name in COMPARED:
        reader, validation = (TraceReader(root, split, arguments.cache_bytes) for split in ("train", "validation"))
        marks: list[tuple[float, float]] = []
        with tempfile.TemporaryDirectory() as work:
            train.train_policy(
                Path(work),
                reader,
                validation,
                read(f"estimators.{name}", ESTIMATORS.load(name)),
                params,
                {},
                arguments.device,
                lambda count, status, marks=marks: marks.append((time.perf_counter(), TimedQueue.waited)),
            )
        # The last mark follows a validation; the second one the first step, which also fills the queue.
        (started, before), (ended, after) = marks[1], marks[-2]
        total, waited = ended - started, after - before
        results[name] = {"seconds": total, "waited": waited, "share": waited / total}
        print(f"{name}: {len(marks) - 3} steps in {total:.1f} s, of which {100 * waited / total:.2f}% waiting")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="where training runs; files are read by the CPU")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=12, help="per shard")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--scratch", type=Path, help="where to write random traces; the system's choice by default")
    parser.add_argument("--traces", type=Path, help="real traces of one benchmark, to train on")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cache-bytes", type=int, default=0, help="0: every sequence is read from its files again")
    parser.add_argument("--threads", type=int, default=1, help="more of them wait for each other on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        root = Path(directory)
        write_traces(root, arguments.layers, arguments.shards, arguments.sequences)
        reading = measure_reading(root, arguments.repeats)
        waiting = measure_waiting(arguments.traces or root, arguments)
    options = {name: getattr(arguments, name) for name in ("layers", "shards", "sequences", "cache_bytes", "steps")}
    result = {**options, "traces": str(arguments.traces or "random"), "reading": reading, "waiting": waiting}
    print(write_result("trace_reading", arguments.device, result))


if __name__ == "__main__":
    main()
