"""The validated model of params.yaml. It knows the keys and their ranges, not what they are used for.

Loaded with ruamel.yaml (YAML 1.2, as DVC reads it): PyYAML would turn ``5e-5`` into a string and
``on`` into a boolean. Run-time resources (device, threads, cache memory) are not parameters: they
must not change the identity of a result.
"""

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import PipelineError, one_line

RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)

PositiveInt = Annotated[int, Field(gt=0)]
FileStem = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Inputs = Literal["keys", "values", "both", "hidden"]


def _ascending(budgets: tuple[int, ...]) -> tuple[int, ...]:
    if list(budgets) != sorted(set(budgets)):
        raise ValueError("budgets must be distinct and ascending")
    return budgets


def _addressable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        close = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")
        hint = f"; write {close}" if close else ""
        raise ValueError(f"a name holds letters, digits, - and _ only: DVC reads a dot as one level further down{hint}")
    return name


Name = Annotated[str, AfterValidator(_addressable)]
"""Of a model or a corpus: part of DVC's keys (``models.<name>``), of its stages' names and of their outputs."""

Budgets = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_ascending)]


class _Section(BaseModel):
    # strict: a quoted number in the file is a mistake to report, not a value to guess.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PinnedUri(_Section):
    """Where one file or directory comes from (``pipeline/sources.py`` resolves it).

    ``uri`` is ``hub:owner/name[/file]``, ``file:path`` or ``wheel:package==version[/file]``. A wheel
    needs ``sha256``, a hub repository needs ``revision`` (a commit), a local file may carry ``sha256``.
    """

    schemes: ClassVar[tuple[str, ...]] = ("hub", "file", "wheel")

    uri: str
    sha256: Sha256 | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _pinned(self) -> "PinnedUri":
        scheme = self.uri.partition(":")[0]
        if scheme not in self.schemes:
            *others, last = (f"{name}:" for name in self.schemes)
            raise ValueError(f"uri must start with {', '.join(others)} or {last}, not '{self.uri}'")
        if scheme in ("wheel", "join") and self.sha256 is None:
            raise ValueError(f"a {scheme}: source must be pinned by its sha256")
        if scheme == "hub" and self.revision is None:
            raise ValueError("a hub: source must be pinned by its revision")
        return self


class SourceParams(PinnedUri):
    """Where a model or data set comes from.

    Besides what :class:`PinnedUri` allows, ``uri`` may be ``join:name``: the file of that name which the
    files of ``parts`` give when they are joined in order, pinned by its own ``sha256``. Package indexes
    limit the size of a wheel, so that a larger file is published in several.
    """

    schemes: ClassVar[tuple[str, ...]] = (*PinnedUri.schemes, "join")

    licence: str
    parts: tuple[PinnedUri, ...] = ()

    @model_validator(mode="after")
    def _parts_of_a_joined_file(self) -> "SourceParams":
        if self.uri.startswith("join:") != bool(self.parts):
            raise ValueError("a join: source lists the files to join in parts, and no other source has parts")
        return self


class MatrixParams(_Section):
    """What the DVC stages are multiplied by."""

    model: Annotated[tuple[Name, ...], Field(min_length=1)]
    corpus: Annotated[tuple[Name, ...], Field(min_length=1)]
    """What policies are trained on."""
    benchmark: Annotated[tuple[Name, ...], Field(min_length=1)]
    """What they are evaluated on; the training corpora (their test split) among them."""
    estimator: Annotated[tuple[Literal["exact", "rloo"], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _every_stage_has_a_name_of_its_own(self) -> "MatrixParams":
        for key in ("model", "corpus", "benchmark", "estimator"):
            names = getattr(self, key)
            if len(set(names)) < len(names):
                raise ValueError(f"{key} names an entry twice")
        joined: dict[str, tuple[str, str]] = {}
        for pair in itertools.product(self.model, dict.fromkeys((*self.corpus, *self.benchmark))):
            name = "-".join(pair)  # as DVC joins them: samples@model-corpus
            if (other := joined.setdefault(name, pair)) != pair:
                raise ValueError(
                    f"model {other[0]} on {other[1]} and model {pair[0]} on {pair[1]} would both be the stage {name}; "
                    "rename one"
                )
        return self


class ModelParams(_Section):
    """One language model. ``stands_in_for`` is printed wherever its numbers appear."""

    source: SourceParams
    dtype: Literal["float32", "bfloat16", "float16"]
    stands_in_for: str | None = None


class SplitSizes(_Section):
    """Samples per split. Splits share no dialogue."""

    train: PositiveInt
    validation: PositiveInt
    test: PositiveInt


class RulerSizes(_Section):
    """Samples per split and task. 0 for training and validation where the corpus is only evaluated."""

    train: Annotated[int, Field(ge=0)]
    validation: Annotated[int, Field(ge=0)]
    test: PositiveInt


class EvaluationSize(_Section):
    """Samples of a corpus that is only evaluated; per task where it has several."""

    test: PositiveInt


class RulerParams(_Section):
    """RULER, made by NVIDIA's own generator (``pipeline/corpora/ruler.py``).

    ``length`` is the generator's max_seq_length in tokens: prompt plus the tokens it reserves for the
    answer. ``task_lengths`` replaces it for tasks that the generator cannot fit into ``length``.
    ``perplexity`` measures that of the true answers besides accuracy (paper, figure 10).
    """

    kind: Literal["ruler"]
    source: SourceParams
    sentence_splitter: SourceParams
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    length: PositiveInt
    task_lengths: dict[str, PositiveInt] = {}
    samples: RulerSizes
    max_new_tokens: PositiveInt
    perplexity: bool
    seed: int
    stands_in_for: str | None = None

    @model_validator(mode="after")
    def _known_tasks(self) -> "RulerParams":
        for task in (*self.tasks, *self.task_lengths):
            if task not in RULER_TASKS:
                raise ValueError(f"unknown RULER task '{task}'; known: {', '.join(RULER_TASKS)}")
        return self


class DialoguesParams(_Section):
    """Multi-turn dialogues over passages, composed to ``length`` tokens (``pipeline/corpora/dialogues.py``)."""

    kind: Literal["dialogues"]
    source: SourceParams
    length: PositiveInt
    max_reply_tokens: PositiveInt
    samples: SplitSizes
    seed: int
    stands_in_for: str | None = None


class OasstParams(_Section):
    """OpenAssistant's English threads, composed to dialogues of ``length`` tokens (``pipeline/corpora/oasst.py``)."""

    kind: Literal["oasst"]
    source: SourceParams
    length: PositiveInt
    max_reply_tokens: PositiveInt
    samples: SplitSizes
    seed: int
    stands_in_for: str | None = None


class ChoiceParams(_Section):
    """Multiple choice with the harness's prompts, for evaluation only (``pipeline/corpora/choice.py``).

    ``late_question`` puts the question behind the compressed context; ``budgets`` replaces those of the
    evaluation section, because these contexts are short. A context shorter than a budget stays whole.
    """

    kind: Literal["choice"]
    task: Literal["boolq", "arc_challenge", "mmlu", "hellaswag"]
    source: SourceParams
    late_question: bool
    budgets: Budgets
    samples: EvaluationSize
    seed: int
    stands_in_for: str | None = None


class LongBenchParams(_Section):
    """LongBench's English tasks, for evaluation only (``pipeline/corpora/longbench.py``).

    Prompts longer than ``length`` tokens lose their middle, as in LongBench's own code. No text is longer
    than ``max_new_tokens``, whatever LongBench allows its task.
    """

    kind: Literal["longbench"]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    source: SourceParams
    length: PositiveInt
    max_new_tokens: PositiveInt
    late_question: bool
    budgets: Budgets
    samples: EvaluationSize
    seed: int
    stands_in_for: str | None = None


AnyCorpusParams = RulerParams | DialoguesParams | OasstParams | ChoiceParams | LongBenchParams
CorpusParams = Annotated[AnyCorpusParams, Field(discriminator="kind")]
TRAINABLE = ("ruler", "dialogues", "oasst")
KINDS = (*TRAINABLE, "choice", "longbench")


class TracesParams(_Section):
    """How attention is captured. ``block_size`` queries make one entry of the future-attention record."""

    block_size: PositiveInt
    query_chunk: PositiveInt
    sequences_per_shard: PositiveInt

    @model_validator(mode="after")
    def _chunk_of_blocks(self) -> "TracesParams":
        if self.query_chunk % self.block_size:
            raise ValueError("query_chunk must be a multiple of block_size")
        return self


class AgentParams(_Section):
    """Shape of one agent: an MLP from (key, value, position features) to one score.

    ``inputs`` says which cached vectors it sees; the paper's agent sees both. ``hidden``, the hidden state that a
    layer computes keys and values from, is no part of a cache and for the sensitivity study only.
    """

    hidden_width: PositiveInt
    hidden_layers: PositiveInt
    position_features: tuple[Literal["position", "age"], ...]
    inputs: Inputs = "both"


class TrainParams(_Section):
    """Training of all agents of a model (paper, Algorithm 1)."""

    agent: AgentParams
    steps: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    warmup_factor: Annotated[float, Field(gt=0, le=1)]
    gradient_clip: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    rloo_samples: Annotated[int, Field(ge=2)]
    validate_every: PositiveInt
    checkpoint_every: PositiveInt
    seed: int


class EvaluationParams(_Section):
    """The sweep. ``budgets`` are absolute token counts per head, the protected tokens included."""

    budgets: Budgets
    n_sink: Annotated[int, Field(ge=0)]
    n_recent: PositiveInt
    seed: int

    @model_validator(mode="after")
    def _budgets_hold_the_protected(self) -> "EvaluationParams":
        if self.budgets[0] < self.n_sink + self.n_recent:
            raise ValueError(
                f"the smallest budget, {self.budgets[0]}, is below the {self.n_sink + self.n_recent} protected tokens"
            )
        return self


class ExamplesParams(_Section):
    """Texts that are shown token by token: per corpus, the first test sample of each of these tasks.

    Of a corpus that is not named, the first test sample.
    """

    tasks: dict[Name, Annotated[tuple[str, ...], Field(min_length=1)]]


class LatencyParams(_Section):
    """Context lengths at which rankings are timed, and how often each (``pipeline/evaluation/latency.py``)."""

    lengths: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)]
    repeats: PositiveInt


class ReportParams(_Section):
    """Bootstrap of the tables and the head shown in figures 1 and 5a."""

    bootstrap_samples: PositiveInt
    confidence: Annotated[float, Field(gt=0, lt=1)]
    example_layer: Annotated[int, Field(ge=0)]
    example_kv_head: Annotated[int, Field(ge=0)]
    seed: int


class LongerParams(_Section):
    """Sequences of ``length`` tokens, ``samples`` for each task, that policies trained on shorter ones are tried on."""

    length: PositiveInt
    samples: PositiveInt


class SensitivityParams(_Section):
    """Axes of the sensitivity study (``pipeline/sensitivity``).

    The base variant is the ``train`` section with ``base_steps`` on the heads of ``layers``; each axis changes one
    thing of it. ``training_fraction`` is of the training sequences; ``rate_factor`` multiplies the learning rate
    of each estimator, the sorting surrogate of figure 5b included. ``longer`` names training corpora whose policies
    are also evaluated on longer sequences.
    """

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    seeds: Annotated[int, Field(ge=2)]
    base_steps: PositiveInt
    training_fraction: tuple[Annotated[float, Field(gt=0, le=1)], ...]
    steps: tuple[PositiveInt, ...]
    hidden_width: tuple[PositiveInt, ...]
    inputs: tuple[Inputs, ...]
    rate_factor: tuple[Annotated[float, Field(gt=0)], ...]
    longer: dict[Name, LongerParams] = {}

    @model_validator(mode="after")
    def _distinct(self) -> "SensitivityParams":
        for name in ("layers", "training_fraction", "steps", "hidden_width", "inputs", "rate_factor"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a value twice")
        return self


class Params(_Section):
    """The whole of params.yaml. ``profile`` names the file under profiles/ that it is a copy of."""

    profile: FileStem
    matrix: MatrixParams
    models: dict[Name, ModelParams]
    corpora: dict[Name, CorpusParams]
    traces: TracesParams
    train: TrainParams
    evaluation: EvaluationParams
    examples: ExamplesParams
    report: ReportParams
    latency: LatencyParams
    sensitivity: SensitivityParams

    @model_validator(mode="after")
    def _matrix_names_exist(self) -> "Params":
        for name in self.matrix.model:
            if name not in self.models:
                raise ValueError(f"matrix.model names '{name}', which is not in models")
        for name in self.matrix.corpus:
            if name not in self.corpora:
                raise ValueError(f"matrix.corpus names '{name}', which is not in corpora")
            sizes = self.corpora[name].samples
            if isinstance(sizes, EvaluationSize) or not (sizes.train and sizes.validation):
                raise ValueError(f"matrix.corpus names '{name}', which is for evaluation only; name it in benchmark")
            if name not in self.matrix.benchmark:
                raise ValueError(f"matrix.benchmark lacks '{name}', which matrix.corpus trains on")
        protected = self.evaluation.n_sink + self.evaluation.n_recent
        for name in self.matrix.benchmark:
            if name not in self.corpora:
                raise ValueError(f"matrix.benchmark names '{name}', which is not in corpora")
            if self.budgets(name)[0] < protected:
                raise ValueError(
                    f"corpora.{name}: the smallest budget, {self.budgets(name)[0]}, is below the {protected} protected "
                    "tokens"
                )
            corpus = self.corpora[name]
            if isinstance(corpus, RulerParams | DialoguesParams | OasstParams):
                shortest = min([corpus.length, *getattr(corpus, "task_lengths", {}).values()])
                if self.budgets(name)[-1] >= shortest:
                    raise ValueError(
                        f"corpora.{name}: the largest budget, {self.budgets(name)[-1]}, is not below its length of "
                        f"{shortest} tokens, so that nothing would be evicted"
                    )
        for name in self.examples.tasks:
            if name not in self.corpora:
                raise ValueError(f"examples.tasks names '{name}', which is not in corpora")
        return self

    @model_validator(mode="after")
    def _study_fits_the_pipeline(self) -> "Params":
        if self.train.agent.inputs == "hidden":
            raise ValueError(
                "train.agent.inputs is 'hidden', but a policy ranks a cache, which holds no hidden states; "
                "only sensitivity.inputs may name it"
            )
        for name, longer in self.sensitivity.longer.items():
            corpus = self.corpora.get(name) if name in self.matrix.corpus else None
            if not isinstance(corpus, RulerParams):
                raise ValueError(f"sensitivity.longer names '{name}', which is no RULER corpus in matrix.corpus")
            if longer.length <= max([corpus.length, *corpus.task_lengths.values()]):
                raise ValueError(f"sensitivity.longer.{name}: length {longer.length} is not above that of the corpus")
        return self

    def training_length(self, corpus: str) -> int:
        """Tokens that the sequences of a corpus in ``matrix.corpus`` are made to."""
        found = self.corpora[corpus]
        assert not isinstance(found, ChoiceParams)  # a corpus to train on
        return found.length

    def budgets(self, corpus: str) -> tuple[int, ...]:
        """The budgets that a corpus is evaluated at, in tokens."""
        found = self.corpora[corpus]
        return found.budgets if isinstance(found, ChoiceParams | LongBenchParams) else self.evaluation.budgets


Entry = TypeVar("Entry")


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a params file.

    Raises
    ------
    PipelineError
        The file is missing, is not YAML, or has an unknown, mistyped or out-of-range key. Names the
        file and the first key at fault.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise PipelineError(
            f"{path} does not exist; run from the repository root or copy a file from profiles/."
        ) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise PipelineError(f"{path} cannot be read ({one_line(error)}); copy a file from profiles/.") from None
    except YAMLError as error:
        raise PipelineError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    try:
        return Params.model_validate(_lists_as_tuples(raw))
    except RecursionError:
        raise PipelineError(f"{path} holds an alias of itself; write out what it stands for.") from None
    except ValidationError as error:
        raise PipelineError(f"{path}: {_first_problem(error)}") from None


def entry(entries: dict[str, Entry], name: str, section: str) -> Entry:
    """The entry called ``name`` of a params section, or an error that lists the names there are."""
    if name not in entries:
        raise PipelineError(f"params.yaml: {section} has no '{name}'; it has {', '.join(sorted(entries))}.")
    return entries[name]


def _lists_as_tuples(node: Any) -> Any:
    # Strict pydantic refuses lists for tuples; YAML has only lists.
    if isinstance(node, dict):
        return {key: _lists_as_tuples(value) for key, value in node.items()}
    if isinstance(node, list):
        return tuple(_lists_as_tuples(value) for value in node)
    return node


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = problem["loc"]
    if location[:1] == ("corpora",) and location[2:3] in {(kind,) for kind in KINDS}:
        # Pydantic adds the kind that chose the model of this corpus; the file has no such level.
        location = (*location[:2], *location[3:])
    # Pydantic marks a key that is itself at fault.
    key = ".".join(str(part) for part in location if part != "[key]") or "the file"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}; remove it or correct its spelling."
    if problem["type"] == "missing":
        return f"missing key {key}; add it (profiles/default.yaml shows every key)."
    # Lists of the file are checked as tuples, a word that params.yaml does not know.
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{key}: {message} (got {_short(problem['input'])})."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
