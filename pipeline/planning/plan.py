"""From params to the cost of every stage. It looks at no data: what they will be like is an assumption it states.

Time, disk, memory and tokens of each stage of dvc.yaml are sums over groups of samples of what one sample costs
(``counts.py``), at the rates of a device (``devices.py``).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.corpora.build import count_pieces
from pipeline.errors import PipelineError
from pipeline.eviction.baselines import BASELINES
from pipeline.params import AgentParams, AnyCorpusParams, Params
from pipeline.planning.counts import (
    LAYER_KERNELS,
    RANKING_BYTES,
    capture_memory,
    capture_work,
    decoded_bytes,
    evicted_bytes,
    policy_bytes,
    score_work,
    step_memory,
    step_work,
    trace_bytes,
    training_flops,
)
from pipeline.planning.devices import DEVICES, Device, Work
from pipeline.planning.shapes import SHAPES, ModelShape, model_shape
from pipeline.policy.agents import PolicyShape

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What the train stage keeps of decoded traces for each of its two splits (KVP_CACHE_GB at its default), and how many
# sequences it reads ahead.
_TRACE_CACHE_BYTES, _READ_AHEAD = 3e9, 5
# A process with torch, transformers and kvpress loaded.
_PROCESS_BYTES = 0.8e9

# Measured on the default profile. Tokens of a RULER sample that the generator keeps for the answer or cannot fill;
# tokens of RULER's true continuations; the share of max_new_tokens that a row of the sweep generates on average.
RULER_SLACK, RULER_CONTINUATION, GENERATED_SHARE = 190, 21, 0.54
# Seconds until samples can be tokenised, to start RULER's generator on a task of a split, and per thousand tokens.
_TOKENIZER_START, _GENERATOR_START, _KILOTOKEN = 6, 1.5, 0.03
# Bytes of compressed Parquet per token of a sample, point of a training curve, cost curve, outcome of the sweep, and
# rank of an example's token.
_SAMPLE_BYTES, _POINT_BYTES, _COST_CURVE_BYTES, _OUTCOME_BYTES, _RANK_BYTES = 1.3, 3.7, 68, 6, 2

# Tokens of the text that a model is checked on, and bytes of the verdict.
_CHECK_TOKENS, _VERDICT_BYTES = 200, 500

# Tokens of samples whose params give no length.
SHORT_CONTEXT, SHORT_CONTINUATION = 128, 64


@dataclass(frozen=True)
class SampleGroup:
    """Samples of a corpus that are alike.

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


def _ruler(params: Any) -> list[SampleGroup]:
    sizes = params.samples
    lengths = Counter(params.task_lengths.get(task, params.length) for task in params.tasks)
    return [
        SampleGroup(
            tasks * sizes.train,
            tasks * sizes.validation,
            tasks * sizes.test,
            context=max(1, length - RULER_SLACK - RULER_CONTINUATION),
            continuation=RULER_CONTINUATION,
            new_tokens=params.max_new_tokens,
            scored=params.perplexity,
        )
        for length, tasks in lengths.items()
    ]


def _dialogues(params: Any) -> list[SampleGroup]:
    sizes, reply = params.samples, params.max_reply_tokens // 2
    return [SampleGroup(sizes.train, sizes.validation, sizes.test, params.length - reply, reply, 0, True)]


def _other(params: Any) -> list[SampleGroup]:
    # Any kind: what its params have in common with others', defaults for the rest.
    train, validation, test = (getattr(params.samples, split, 0) for split in ("train", "validation", "test"))
    tasks, new_tokens = len(getattr(params, "tasks", ("",))), getattr(params, "max_new_tokens", 0)
    context = getattr(params, "length", SHORT_CONTEXT)
    continuation = new_tokens or SHORT_CONTINUATION
    return [
        SampleGroup(tasks * train, tasks * validation, tasks * test, context, continuation, new_tokens, not new_tokens)
    ]


_KINDS: dict[str, Callable[[Any], list[SampleGroup]]] = {
    "ruler": _ruler,
    "dialogues": _dialogues,
    "oasst": _dialogues,
}


def sample_groups(params: AnyCorpusParams) -> list[SampleGroup]:
    """How many samples a corpus will have, and how long they will be."""
    return _KINDS.get(params.kind, _other)(params)


@dataclass(frozen=True)
class StageCost:
    """What one entry of a stage's matrix costs.

    Attributes
    ----------
    seconds
        Wall-clock time, with DVC's copy of the outputs.
    disk
        Bytes of the outputs; DVC's cache holds them once more, unless the file system shares blocks.
    device_memory, host_memory
        Peak bytes; a device that is the host has none of its own.
    forward_tokens
        Tokens that go through the language model.
    flops
        FLOPs of matrix products.
    parts
        The large parts of the peak on the device, bytes.
    """

    stage: str
    entry: str
    seconds: float
    disk: float
    device_memory: float
    host_memory: float
    forward_tokens: float
    flops: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """Everything that ``python -m stages.plan`` shows."""

    profile: str
    device: str
    stages: list[StageCost]
    assumptions: list[str]

    @property
    def total(self) -> dict[str, float]:
        """Sums over the stages, and the peaks of memory."""
        sums = ("seconds", "disk", "forward_tokens", "flops")
        peaks = ("device_memory", "host_memory")
        return {name: sum(getattr(stage, name) for stage in self.stages) for name in sums} | {
            name: max(getattr(stage, name) for stage in self.stages) for name in peaks
        }

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON-serialisable values, in seconds and bytes."""
        return asdict(self) | {"total": self.total, "paper_training": paper_training()}


def paper_training() -> dict[str, float]:
    """The paper's own training in our code: 112 agents, 4,000 steps, sequences of 4,500 tokens (section "Training").

    Returns
    -------
    FLOPs of the agents if every step took the whole sequence, FLOPs with cache sizes drawn uniformly, FLOPs of the
    exact estimator besides, and bytes of traces that the steps read.
    """
    shape, steps, tokens, block = SHAPES["Qwen2.5-7B-Instruct"], 4000, 4500, 64
    policy = PolicyShape(
        shape.ranked_layers,
        shape.kv_heads,
        shape.head_dim,
        AgentParams(hidden_width=256, hidden_layers=2, position_features=("position",)),
    )
    whole = float(steps * policy.heads * tokens * training_flops(policy))
    rloo, exact = (step_work(policy, name, 8, tokens, block).agent_flops * steps for name in ("rloo", "exact"))
    return {
        "agents": policy.heads,
        "parameters_per_agent": policy.parameters_per_agent,
        "steps": steps,
        "tokens": tokens,
        "whole_sequence_flops": whole,
        "drawn_cache_flops": rloo,
        "exact_sums_flops": exact - rloo,
        "read_bytes": float(steps * trace_bytes(shape, tokens, block)),
    }


@dataclass(frozen=True)
class _Model:
    """One model of the matrix on one device: what all of its stages share."""

    name: str
    shape: ModelShape
    params: Params
    device: Device

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.params.models[self.name].dtype]

    @property
    def weight_bytes(self) -> int:
        return self.shape.parameters * self.item_bytes

    @property
    def policy(self) -> PolicyShape:
        return PolicyShape(self.shape.ranked_layers, self.shape.kv_heads, self.shape.head_dim, self.params.train.agent)

    @property
    def trained(self) -> int:
        """Policies of our own."""
        return len(self.params.matrix.corpus) * len(self.params.matrix.estimator)

    @property
    def policies(self) -> int:
        """All that rank: ours, the baselines and the oracle."""
        return self.trained + len(BASELINES) + 1

    def groups(self, corpus: str) -> list[SampleGroup]:
        return sample_groups(self.params.corpora[corpus])

    def cost(
        self,
        stage: str,
        entry: str,
        work: Work,
        disk: float,
        host_memory: float,
        parts: dict[str, float],
        device_memory: float = 0.0,
        forward_tokens: float = 0.0,
        host_seconds: float = 0.0,
    ) -> StageCost:
        device, dtype = self.device, self.params.models[self.name].dtype
        host_memory += _PROCESS_BYTES
        return StageCost(
            stage,
            f"{self.name} {entry}".strip(),
            device.start + host_seconds + work.seconds(device, dtype) + disk / device.commit,
            disk,
            device_memory if device.accelerator else 0.0,
            host_memory if device.accelerator else host_memory + device_memory,
            forward_tokens,
            work.flops + work.agent_flops,
            parts,
        )

    def model(self) -> StageCost:
        # GGUF is dequantised to float32; other weights stay as they are.
        gguf = self.params.models[self.name].source.uri.endswith(".gguf")
        disk = self.shape.parameters * (4 if gguf else self.item_bytes)
        return self.cost("model", "", Work(moved=2 * disk), disk, 2 * disk if gguf else 0, {})

    def check(self) -> StageCost:
        # In float32: about ten forwards of a text that exceeds the window where there is one, and the greedy tokens of
        # two decodings.
        tokens = max(_CHECK_TOKENS, self.shape.window)
        work = capture_work(self.shape, tokens, 4, self.params.traces) * 10
        work += Work(moved=2 * 16 * 4 * self.shape.parameters)
        parts = capture_memory(self.shape, tokens, 4, self.params.traces)
        host = 4 * self.shape.parameters if self.device.accelerator else 0
        return self.cost("check", "", work, _VERDICT_BYTES, host, {**parts}, sum(parts.values()), 10 * tokens)

    def samples(self, corpus: str) -> StageCost:
        params = self.params.corpora[corpus]
        tokens = sum(group.tokens * (group.train + group.validation + group.test) for group in self.groups(corpus))
        scripts = count_pieces(params) if params.kind == "ruler" else 0
        seconds = _TOKENIZER_START + _GENERATOR_START * scripts + _KILOTOKEN * tokens / 1000
        return self.cost("samples", corpus, Work(), _SAMPLE_BYTES * tokens, 0, {}, host_seconds=seconds)

    def traces(self, corpus: str) -> StageCost:
        params, work, tokens = self.params.traces, Work(), 0
        for group in self.groups(corpus):
            written = Work(written=trace_bytes(self.shape, group.tokens, params.block_size))
            count = group.train + group.validation
            work += (capture_work(self.shape, group.tokens, self.item_bytes, params) + written) * count
            tokens += group.tokens * count
        longest = max(group.tokens for group in self.groups(corpus))
        parts = capture_memory(self.shape, longest, self.item_bytes, params)
        # Weights pass through the host on their way to an accelerator.
        host = self.weight_bytes if self.device.accelerator else 0
        return self.cost("traces", corpus, work, work.written, host, {**parts}, sum(parts.values()), tokens)

    def train(self, corpus: str, estimator: str) -> StageCost:
        params, block, policy = self.params.train, self.params.traces.block_size, self.policy
        groups = self.groups(corpus)
        validations = 1 + -(-params.steps // params.validate_every)
        work, kept = Work(), 0.0
        for split in ("train", "validation"):
            counts = [(group.tokens, getattr(group, split)) for group in groups]
            sequences = sum(count for _, count in counts)
            decoded = sum(count * decoded_bytes(self.shape, tokens, block) for tokens, count in counts)
            fits = min(1.0, _TRACE_CACHE_BYTES / decoded)
            kept += fits * decoded
            if split == "train":
                # Drawn at random: what is in memory is hit in proportion.
                reads = fits + (1 - fits) * params.steps / sequences
            else:
                # Read in turn: a memory that drops the least recently used and lacks one sequence never hits.
                reads = 1.0 if fits == 1.0 else float(validations)
            for tokens, count in counts:
                work += Work(read=trace_bytes(self.shape, tokens, block)) * (count * reads)
                if split == "train":
                    step = step_work(policy, estimator, params.rloo_samples, tokens, block)
                    work += step * (params.steps * count / sequences)
                else:
                    work += score_work(policy, tokens // 2 // block * block) * (count * validations)
        longest = max(group.tokens for group in groups)
        parts = step_memory(policy, estimator, params.rloo_samples, longest, self.device.accelerator)
        disk = policy_bytes(policy) + _POINT_BYTES * policy.heads * (2 * params.steps + validations)
        host = kept + _READ_AHEAD * decoded_bytes(self.shape, longest, block)
        return self.cost("train", f"{corpus} {estimator}", work, disk, host, {**parts}, sum(parts.values()))

    def evaluate(self, corpus: str) -> StageCost:
        params, shape, budgets = self.params, self.shape, self.params.budgets(corpus)
        trained, policies = self.trained, self.policies
        rows = policies * len(budgets) + 1  # no eviction
        row_flops = 2 * (shape.layers * shape.layer_weights + shape.vocabulary * shape.hidden)
        work, tokens, disk = Work(), 0.0, 0.0
        peak, parts = 0.0, dict[str, float]()
        for group in self.groups(corpus):
            evicted = evicted_bytes(
                shape, policies, budgets, group.context, max(group.continuation, group.new_tokens), self.item_bytes
            )
            generated = GENERATED_SHARE * group.new_tokens
            scored = group.continuation * group.scored
            # Policies rank the whole context and its first half.
            ranked = 1.5 * group.context
            decoding = Work(
                flops=row_flops * rows * (scored + generated),
                # A step reads the weights, and the caches of the rows that have not finished.
                moved=group.new_tokens * self.weight_bytes
                + generated * evicted
                + 4 * 4 * rows * scored * shape.vocabulary,
                kernels=(1 + group.new_tokens) * shape.layers * (LAYER_KERNELS + 2 * (len(budgets) + 1)),
            )
            # Caches are gathered, then copied to where there is room for new tokens.
            evicting = Work(moved=RANKING_BYTES * policies * shape.heads * ranked + 4 * evicted)
            captured = capture_work(shape, group.tokens, self.item_bytes, params.traces)
            work += (captured + score_work(self.policy, ranked) * trained + evicting + decoding) * group.test
            tokens += (group.tokens + rows * (scored + generated)) * group.test
            disk += (2 * policies * shape.heads * _COST_CURVE_BYTES + 2 * rows * _OUTCOME_BYTES) * group.test
            # Blocks of half the context, and the rest.
            prefill = capture_memory(shape, group.tokens, self.item_bytes, params.traces, blocks=3)
            stays = prefill["weights"] + prefill["cache"] + prefill["records"]
            # While a budget's caches get room for new tokens they exist twice.
            twice = policies * min(budgets[-1], group.context) * shape.ranked_numbers * self.item_bytes
            if max(sum(prefill.values()), stays + evicted + twice) > peak:
                peak = max(sum(prefill.values()), stays + evicted + twice)
                parts = {**prefill, f"evicted caches of {rows} rows": evicted}
        host = self.weight_bytes if self.device.accelerator else 0
        return self.cost("evaluate", corpus, work, disk, host, parts, peak, tokens)

    def examples(self, corpus: str) -> StageCost:
        count = len(self.params.examples.tasks.get(corpus, ("the first",)))
        group = self.groups(corpus)[0]
        parts = capture_memory(self.shape, group.tokens, self.item_bytes, self.params.traces)
        work = capture_work(self.shape, group.tokens, self.item_bytes, self.params.traces)
        work += score_work(self.policy, 1.5 * group.context) * self.trained
        disk = count * self.policies * self.shape.heads * group.context * _RANK_BYTES
        host = self.weight_bytes if self.device.accelerator else 0
        tokens = count * group.tokens
        return self.cost("examples", corpus, work * count, disk, host, {**parts}, sum(parts.values()), tokens)

    def stages(self) -> Iterator[StageCost]:
        matrix = self.params.matrix
        yield self.model()
        yield self.check()
        yield from (self.samples(corpus) for corpus in matrix.benchmark)
        yield from (self.traces(corpus) for corpus in matrix.corpus)
        yield from (self.train(corpus, estimator) for corpus in matrix.corpus for estimator in matrix.estimator)
        yield from (self.evaluate(corpus) for corpus in matrix.benchmark)
        yield from (self.examples(corpus) for corpus in matrix.corpus)


def make_plan(params: Params, device: str, models: Path) -> Plan:
    """The cost of every stage but sources, results and report, which take about a minute.

    Parameters
    ----------
    device
        Name in :data:`~pipeline.planning.devices.DEVICES`, or ``cpu``.
    models
        Where the model stage writes; the sizes of a model that is there are read from its config.json.

    Raises
    ------
    PipelineError
        The device has no rates, or the sizes of a model are not known.
    """
    name = "cpu-2-cores" if device == "cpu" else device
    if name not in DEVICES:
        raise PipelineError(f"--device {device} has no rates in the plan; choose cpu or one of {', '.join(DEVICES)}.")
    found = DEVICES[name]
    assumptions = [
        f"Rates of {name}: {found.source}.",
        "Stages run one after the other on one device. Time to download, and what downloads leave under .cache, is not "
        "counted; nor are results and report, about a minute.",
    ]
    stages: list[StageCost] = []
    for model_name in params.matrix.model:
        shape, source = model_shape(model_name, params.models[model_name], models)
        model = _Model(model_name, shape, params, found)
        stages += model.stages()
        assumptions.append(
            f"{model_name} has {source}: {shape.parameters:,} parameters, {model.policy.heads} agents of "
            f"{model.policy.parameters_per_agent:,}."
        )
    for corpus in params.matrix.benchmark:
        groups = sample_groups(params.corpora[corpus])
        tokens = ", ".join(f"{group.context:,} + {group.continuation}" for group in groups)
        sizes = (sum(getattr(group, split) for group in groups) for split in ("train", "validation", "test"))
        assumptions.append(
            "{}: {:,} training, {:,} validation, {:,} test samples of {} tokens (context + continuation).".format(
                corpus, *sizes, tokens
            )
        )
    assumptions += [
        f"RULER samples are {RULER_SLACK} tokens shorter than their length, as measured at 1,024 (at 4,096: 170 to "
        f"290, but 1,100 of qa_2, which runs out of documents); dialogues are full; "
        f"a kind without a length has contexts of {SHORT_CONTEXT} tokens.",
        f"A row of the sweep generates {GENERATED_SHARE:.0%} of max_new_tokens, as measured on the default profile.",
        f"Training keeps {_TRACE_CACHE_BYTES / 1e9:.0f} GB of decoded traces in memory per split (KVP_CACHE_GB) and "
        "reads the rest again.",
    ]
    return Plan(params.profile, name, stages, assumptions)
