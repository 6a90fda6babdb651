"""What benchmarks of composed dialogues share: all about as long, the last reply to be predicted."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypeVar

from pipeline.benchmarks.base import AllSizes, Answer, Benchmark, Making, SampleGroup
from pipeline.errors import PipelineError
from pipeline.samples.sample import Sample, Split
from pipeline.section import PositiveInt

Candidate = TypeVar("Candidate")


class ComposedDialogues(Benchmark):
    """Dialogues composed to ``length`` tokens, the last reply, of ``max_reply_tokens`` at most, to be predicted."""

    trainable: ClassVar[bool] = True
    assumed: ClassVar[str] = "all of them full"
    too_few: ClassVar[str]
    """What is said where a source does not suffice, with ``{found}``, ``{wanted}``, ``{split}`` and ``{length}``."""

    length: PositiveInt
    max_reply_tokens: PositiveInt
    sizes: AllSizes

    @property
    def tokens(self) -> int:
        """The length that dialogues are composed to."""
        return self.length

    def expected(self) -> list[SampleGroup]:
        """Full dialogues, with replies of half the most that they may have."""
        reply = self.max_reply_tokens // 2
        return [self._group(self.length - reply, reply)]

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """Nothing is written or chosen."""
        return {}

    def shuffled(self, split: Split, candidates: Iterable[Candidate]) -> list[Candidate]:
        """What a split may hold, in an order that the seed decides."""
        own = list(candidates)
        random.Random(f"{self.seed} {split}").shuffle(own)
        return own

    def fill(
        self,
        making: Making,
        split: Split,
        candidates: Sequence[Candidate],
        compose: Callable[[Candidate], Sample | None],
    ) -> list[Sample]:
        """The samples of a split: the first of its candidates that can be composed.

        Raises
        ------
        PipelineError
            There are too few.
        """
        samples: list[Sample] = []
        wanted = self.sizes.of(split)
        for candidate in candidates:
            if (sample := compose(candidate)) is not None:
                samples.append(sample)
            if len(samples) == wanted:
                making.progress(split)
                return samples
        told = self.too_few.format(found=len(samples), wanted=wanted, split=split, length=self.length)
        raise PipelineError(f"benchmarks.{making.name}: {told}")
