"""How fast devices work, and how that is known. It knows neither stages nor models."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Device:
    """Rates of a device and its host.

    Attributes
    ----------
    result
        How files of measurements name it: ``rates-<result>.json``.
    origins
        Name of each rate, ``flops.<dtype>`` for those of products -> how it is known: begins with "measured" or
        "estimated".
    accelerator
        Whether it has memory of its own, and computes while the host reads.
    flops
        dtype -> FLOP/s that products of matrices reach.
    memory
        Bytes/s that everything else reaches: elementwise work, sorts, reading weights and caches to decode.
    kernel
        Seconds that starting one operation takes.
    write, read
        Bytes/s of trace files: encoded and checksummed by one process; checked and decoded by one thread.
    commit
        Bytes/s at which DVC checksums an output and copies it into its cache.
    start
        Seconds before a stage works: DVC, imports, checksums of its inputs.
    cores
        Of the host, for each device.
    """

    result: str
    origins: dict[str, str]
    accelerator: bool
    flops: dict[str, float]
    memory: float
    kernel: float
    write: float
    read: float
    commit: float
    start: float
    cores: int


_TWO_CORES = "measured on two cores of an AMD EPYC with AVX-512"
_HOST = {
    "write": f"{_TWO_CORES}, with keys, values and record of all tokens",
    "read": f"{_TWO_CORES}, from the page cache, with keys, values and record of all tokens",
    "commit": f"{_TWO_CORES}, when the outputs of a run were written",
    "start": f"{_TWO_CORES}, when the outputs of a run were written",
}
_H100 = "measured on one H100 SXM with its 16 host cores"
DEVICES = {
    "cpu-2-cores": Device(
        result="cpu",
        origins=_HOST
        | {
            "flops.float32": f"{_TWO_CORES}: such that the traces of the default profile take as long as they did",
            "flops.bfloat16": f"{_TWO_CORES}: one large product",
            "flops.float16": "estimated: as in float32",
            "memory": f"{_TWO_CORES}: between what results in new memory reach, 7 GB/s, and softmax, 23 GB/s",
            "kernel": "estimated",
        },
        accelerator=False,
        flops={"float32": 137e9, "bfloat16": 280e9, "float16": 137e9},
        memory=15e9,
        kernel=10e-6,
        write=80e6,
        read=900e6,
        commit=280e6,
        start=12.0,
        cores=2,
    ),
    "h100": Device(
        result="h100",
        origins={name: f"estimated for its host: {text}" for name, text in _HOST.items()}
        | {
            "flops.float32": f"{_H100}: one large product (perf/training_step.py)",
            "flops.bfloat16": f"{_H100}: a prefill of 4,096 tokens at Qwen2.5-7B's shapes (perf/capture.py)",
            "flops.float16": "estimated: as in bfloat16",
            "memory": "estimated: 60% of what its memory can",
            "kernel": f"{_H100}: steps of a sweep's decoding at SmolLM2's shapes, whose time is that of starting their "
            "operations (perf/sweep.py)",
        },
        accelerator=True,
        flops={"float32": 51e12, "bfloat16": 500e12, "float16": 500e12},
        memory=2e12,
        kernel=20e-6,
        write=80e6,
        read=900e6,
        commit=280e6,
        start=12.0,
        cores=16,
    ),
}


def measured(device: Device, results: Path) -> Device:
    """The device with the rates that ``perf/rates.py`` wrote to ``results``, where it was run.

    Raises
    ------
    PipelineError
        There is such a file, and it cannot be read.
    """
    path = results / f"rates-{device.result}.json"
    if not path.is_file():
        return device
    try:
        content = json.loads(path.read_text())
        machine, rates = content["machine"], {name: float(rate) for name, rate in content["rates"].items()}
        processor = machine.get("gpu") or machine["processor"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{path} holds no rates ({error}); delete it or run python -m perf.rates.") from None
    flops = {dtype: rates.get(f"flops.{dtype}", rate) for dtype, rate in device.flops.items()}
    known = {name: rates.get(name, getattr(device, name)) for name in ("memory", "kernel", "write", "read", "commit")}
    origins = dict.fromkeys(rates, f"measured on {processor} by perf/rates.py ({path.name})")
    return replace(device, origins=device.origins | origins, flops=flops, **known)


@dataclass(frozen=True)
class Work:
    """What there is to do, in units that a device has a rate for.

    Attributes
    ----------
    flops, agent_flops
        FLOPs of matrix products: of the language model, in its dtype, and of the agents, in float32.
    moved
        Bytes that all other operations read and write.
    kernels
        Operations started.
    written, read
        Bytes of trace files.
    """

    flops: float = 0.0
    agent_flops: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    written: float = 0.0
    read: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, unit.name) + getattr(other, unit.name) for unit in fields(self)))

    def shared(self, share: float) -> "Work":
        """A share of everything but the operations: so many are started for a part as for the whole."""
        return replace(self * share, kernels=self.kernels)

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, unit.name) * times for unit in fields(self)))

    def queued(self, device: Device, dtype: str) -> "Work":
        """The same with the operations alone whose start is not hidden: an accelerator works on those before it.

        For work of one kind: where one part waits for the host and another for the device, each has to be asked.
        """
        if not device.accelerator:
            return self
        return replace(self, kernels=max(0.0, self.kernels - self._busy(device, dtype) / device.kernel))

    def _busy(self, device: Device, dtype: str) -> float:
        """Seconds in which a device computes."""
        products = self.flops / device.flops[dtype] + self.agent_flops / device.flops["float32"]
        return products + self.moved / device.memory

    def seconds(self, device: Device, dtype: str) -> float:
        """Time on a device for a model of ``dtype``; the longer of its host's files and its own work hides the other.

        A device that is the host does one after the other.
        """
        computing = self._busy(device, dtype) + self.kernels * device.kernel
        files = self.read / device.read + self.written / device.write
        return max(computing, files) if device.accelerator else computing + files
