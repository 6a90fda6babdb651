"""What a benchmark is: a file of this folder, its section of params.yaml, its samples and how an answer is judged.

It knows no model but its tokenizer, no policy and no budget.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.errors import PipelineError
from pipeline.executor.units import LOCAL, Advance, Executor, unseen
from pipeline.registry import Registry
from pipeline.samples.sample import SPLITS, Sample, Split
from pipeline.section import PARAMS, Name, PositiveInt, Section, Seed, find, parse, validate

# Tokens of samples whose params give no length, as the plan takes them to be.
SHORT_CONTEXT, SHORT_CONTINUATION = 128, 64


class Sizes(Section):
    """Samples per split, of each task where a benchmark has several. Only a test split: it is for evaluation alone."""

    train: int = Field(default=0, ge=0)
    validation: int = Field(default=0, ge=0)
    test: PositiveInt

    def of(self, split: Split) -> int:
        """Samples of a split."""
        size: int = getattr(self, split)
        return size

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that hold any."""
        return tuple(split for split in SPLITS if self.of(split))


class AllSizes(Sizes):
    """Samples of a benchmark that is always divided."""

    train: PositiveInt
    validation: PositiveInt


class EvaluationSize(Sizes):
    """Samples of a benchmark that is never divided."""

    train: Literal[0] = 0
    validation: Literal[0] = 0


@dataclass(frozen=True)
class SampleGroup:
    """Samples that are expected to be alike, for a plan that is made before any of them.

    Attributes
    ----------
    train, validation, test
        How many.
    context
        Tokens of the prompt that is ranked and evicted.
    continuation
        Tokens that follow it: a true continuation, or all choices together.
    new_tokens
        Most tokens that are generated; 0 where nothing is.
    scored
        Whether the likelihood of the continuation is measured.
    """

    train: int
    validation: int
    test: int
    context: int
    continuation: int
    new_tokens: int
    scored: bool

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return self.context + self.continuation


@dataclass(frozen=True)
class Answer:
    """What a model said to one sample.

    Attributes
    ----------
    text
        What it wrote; None where it wrote nothing.
    nll
        Negative log-likelihoods, nats: of each choice, summed over its tokens, or of each token of the true
        continuation; empty for a text.
    """

    text: str | None = None
    nll: Sequence[float] = ()


@dataclass(frozen=True)
class Making:
    """What samples are made with.

    Attributes
    ----------
    name
        Of the benchmark in params.yaml; it becomes the samples' ``benchmark``.
    sources
        What :attr:`Benchmark.sources` names, where it lies.
    model
        Exported model directory; its tokenizer and chat template are used.
    tokenizer
        That of ``model``.
    work
        Directory for intermediate results that an interrupted run continues from.
    progress
        Told each finished piece, :meth:`Benchmark.pieces` in all.
    executor
        Who makes them, where a benchmark is cut into units of work.
    """

    name: str
    sources: Mapping[str, Path]
    model: Path
    tokenizer: Any
    work: Path
    progress: Advance = unseen
    executor: Executor = LOCAL


class Benchmark(Section, ABC):
    """A benchmark; its fields are its section ``benchmarks.<name>.samples`` of params.yaml.

    ``kind`` is the name of its file, ``source`` an entry of ``sources``.
    """

    trainable: ClassVar[bool] = False
    """Whether policies can learn from it."""
    templated: ClassVar[bool] = True
    """Whether its prompts go through the model's chat template."""
    piece_seconds: ClassVar[float] = 0.0
    """Time that each of :meth:`pieces` takes on one core, whatever its tokens."""
    assumed: ClassVar[str] = "their length, which is that of the rows of the source, is a guess"
    """What :meth:`expected` takes for granted."""

    kind: str
    source: Name
    sizes: Sizes
    seed: Seed

    @property
    def sources(self) -> dict[str, str]:
        """What it is made from: a role -> an entry of ``sources`` in params.yaml."""
        return {"source": self.source}

    @property
    def tokens(self) -> int | None:
        """Tokens that its longest text is made to; None where texts are as long as the rows of the source."""
        return None

    @property
    def shortest(self) -> int | None:
        """Tokens that its shortest text is made to; None as for :attr:`tokens`."""
        return self.tokens

    @property
    def tasks_of(self) -> tuple[str, ...]:
        """Its tasks in their order, each of ``sizes`` samples; none where a sample has no task of its own."""
        return ()

    def pieces(self) -> int:
        """How far ``progress`` is brought while samples are made."""
        return len(self.sizes.splits)

    def share(self, cores: int) -> float:
        """Of the time in which one core makes its samples, what it takes with so many."""
        return 1.0

    def expected(self) -> list[SampleGroup]:
        """How many samples there will be, and how long."""
        return [self._group(self.tokens or SHORT_CONTEXT, SHORT_CONTINUATION)]

    def _group(self, context: int, continuation: int, new_tokens: int = 0, tasks: int | None = None) -> SampleGroup:
        """Samples of so many ``tasks``, by default of all; what is not written is scored."""
        times = tasks or len(self.tasks_of) or 1
        train, validation, test = (times * self.sizes.of(split) for split in SPLITS)
        return SampleGroup(train, validation, test, context, continuation, new_tokens, scored=not new_tokens)

    @abstractmethod
    def build(self, making: Making) -> dict[Split, list[Sample]]:
        """All samples, by split.

        Raises
        ------
        PipelineError
            The source is unusable or too small.
        """

    @abstractmethod
    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """A metric of ``pipeline/metrics.py`` -> its value, for what was said to one of its samples.

        Likelihoods of the true continuation are no matter of a benchmark: they are shown as they are.
        """


BENCHMARKS = Registry("pipeline.benchmarks", Benchmark, "benchmark")  # type: ignore[type-abstract]


def read_benchmark(name: str, path: Path = PARAMS, tree: dict[str, Any] | None = None) -> Benchmark:
    """The benchmark called ``name`` in a params file, whose ``kind`` is its file in this folder."""
    key = f"benchmarks.{name}.samples"
    section = find(parse(path) if tree is None else tree, key, path)
    if not isinstance(section, dict):
        raise PipelineError(f"{path}: {key}: it should be a mapping (got {section!r}).")
    kind = find(section, "kind", path) if "kind" in section else find({}, f"{key}.kind", path)
    if kind not in BENCHMARKS.names():
        raise PipelineError(f"{path}: {key}.kind: '{kind}' is no benchmark; known: {', '.join(BENCHMARKS.names())}.")
    return validate(section, BENCHMARKS.load(kind), key, path)
