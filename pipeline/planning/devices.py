"""How fast devices work, and how that is known. It knows neither stages nor models."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Device:
    """Rates of a device and its host.

    Attributes
    ----------
    source
        How the numbers were got.
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
    """

    source: str
    accelerator: bool
    flops: dict[str, float]
    memory: float
    kernel: float
    write: float
    read: float
    commit: float
    start: float


DEVICES = {
    "cpu-2-cores": Device(
        source="measured on two cores of an AMD EPYC with AVX-512. Products of matrices: such that the traces of the "
        "default profile take as long as they did (one large product is a quarter faster, in bfloat16 2.1 times). "
        "Memory: between what results in new memory reach, 7 GB/s, and softmax, 23 GB/s. Trace files: written by one "
        "core; read from the page cache on first use, checksums included (perf/trace_reading.py). DVC and the start of "
        "a stage: when the outputs of a run were written",
        accelerator=False,
        flops={"float32": 137e9, "bfloat16": 280e9, "float16": 137e9},
        memory=15e9,
        kernel=10e-6,
        write=80e6,
        read=900e6,
        commit=280e6,
        start=12.0,
    ),
    "h100": Device(
        source="an estimate, not measured: about 40% of the peak of one H100 SXM in each dtype, 60% of its memory's; "
        "the host's rates are those of cpu-2-cores",
        accelerator=True,
        flops={"float32": 25e12, "bfloat16": 400e12, "float16": 400e12},
        memory=2e12,
        kernel=8e-6,
        write=80e6,
        read=900e6,
        commit=280e6,
        start=12.0,
    ),
}


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

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, unit.name) * times for unit in fields(self)))

    def seconds(self, device: Device, dtype: str) -> float:
        """Time on a device for a model of ``dtype``; reading ahead hides behind an accelerator's work, or it behind it.

        Kinds of work do not overlap otherwise.
        """
        computing = (
            self.flops / device.flops[dtype]
            + self.agent_flops / device.flops["float32"]
            + self.moved / device.memory
            + self.kernels * device.kernel
        )
        reading = self.read / device.read
        both = max(computing, reading) if device.accelerator else computing + reading
        return both + self.written / device.write
