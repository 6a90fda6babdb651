"""Made-up results in the files of a real run, of any size. Nothing here resembles a measurement."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.params import Params, load_params
from pipeline.reporting.run import Run
from pipeline.reporting.styles import Styles

REPOSITORY = Path(__file__).parents[2]
MODEL = "smollm2-135m"
BENCHMARKS = ("ruler", "dialogues")
# Larger is better: how well each policy does in this made-up world.
SKILL = {
    ("oracle", None): 3.0,
    ("kvp-exact", "ruler"): 2.0,
    ("kvp-exact", "dialogues"): 1.6,
    ("kvp-rloo", "ruler"): 1.8,
    ("kvp-rloo", "dialogues"): 1.4,
    ("lagkv", None): 0.6,
    ("keydiff", None): 0.8,
    ("knorm", None): 0.9,
    ("streaming-llm", None): 0.5,
    ("random", None): 0.1,
    ("snapkv", None): 1.7,
    ("tova", None): 1.2,
}
# A text with a needle, a number of several tokens, line breaks and a special token.
TOKENS = [
    "<|im_start|>", "\n", *[" the", " grass", " is", " gre", "en", "."] * 7, " The", " num", "ber", " is",
    " 7", "3", "9", "1", ".", "\n", "\n", " What", " is", " it", "?",
]  # fmt: skip
ANSWER = "7391"
TEXT_LAYERS = 9
POLICY_SCHEMA = {"policy": pl.String, "trained_on": pl.String}


@dataclass(frozen=True)
class Size:
    """How much to make up."""

    layers: int = 3
    kv_heads: int = 2
    per_task: int = 2
    dialogues: int = 6
    steps: int = 60


FULL_SIZE = Size(layers=30, kv_heads=3, per_task=3, dialogues=30, steps=300)


def write_results(root: Path, size: Size = Size(), seed: int = 0) -> Params:
    """Fill ``root`` with params.yaml, scores, answers, policies, texts and samples; returns the params."""
    shutil.copy(REPOSITORY / "params.yaml", root / "params.yaml")
    params = load_params(root / "params.yaml")
    generator = np.random.default_rng(seed)
    for benchmark in BENCHMARKS:
        made = params.benchmarks[benchmark].samples
        samples = make_samples(benchmark, made.tasks_of, size, generator)
        _write(samples, root / "samples" / MODEL / benchmark / "test.parquet")
        sources = params.benchmark_sources(benchmark)
        recorded = {role: {"uri": source.uri, "licence": source.licence} for role, source in sources.items()}
        (root / "samples" / MODEL / benchmark / "source.json").write_text(json.dumps(recorded))
        evaluation = make_evaluation(benchmark, samples, params.evaluation.budgets, generator)
        _write(evaluation, root / "scores" / MODEL / f"{benchmark}.parquet")
        _write(make_cost(benchmark, samples, size, generator), root / "answers" / MODEL / benchmark / "cost.parquet")
        texts = make_texts(samples, params.texts.tasks.get(benchmark), size, generator)
        _write(texts, root / "texts" / MODEL / benchmark / "tokens.parquet")
        for estimator in ("exact", "rloo"):
            write_policy(root / "policies" / MODEL / benchmark / estimator, size, params, generator)
    (root / "models" / MODEL).mkdir(parents=True)
    source = {"uri": params.model_sources(MODEL)["source"].uri, "licence": "Apache-2.0"}
    (root / "models" / MODEL / "source.json").write_text(json.dumps(source))
    return params


def make_run(params: Params) -> Run:
    """What the report stage reads of a params file."""
    return Run(
        matrix=params.matrix,
        report=params.report,
        styles=Styles.of(params),
        models=params.models,
        benchmarks={name: params.benchmarks[name].samples for name in params.matrix.benchmark},
        budgets=params.evaluation.budgets,
        protected=(params.evaluation.n_sink, params.evaluation.n_recent),
        steps=params.train.steps,
        learning_rate=params.train.learning_rate,
    )


def make_samples(benchmark: str, tasks_of: tuple[str, ...], size: Size, generator: np.random.Generator) -> pl.DataFrame:
    """sample_id, task, prompt_len, answers."""
    count = size.per_task if tasks_of else size.dialogues
    tasks = [task for task in tasks_of or (benchmark,) for _ in range(count)]
    return pl.DataFrame(
        {
            "sample_id": [f"{benchmark}-{i:04d}" for i in range(len(tasks))],
            "task": tasks,
            "prompt_len": generator.integers(700, 1000, len(tasks)),
            "answers": [[ANSWER] if benchmark == "ruler" else [] for _ in tasks],
        },
        schema_overrides={"answers": pl.List(pl.String)},
    )


def make_texts(
    samples: pl.DataFrame, tasks: tuple[str, ...] | None, size: Size, generator: np.random.Generator
) -> pl.DataFrame:
    """Ranked tokens of the first sample of each task, as the texts stage writes them."""
    first = samples.unique("task", keep="first", maintain_order=True)
    chosen = [first.row(by_predicate=pl.col("task") == task) for task in tasks] if tasks else [samples.row(0)]
    shape = (TEXT_LAYERS, size.kv_heads, len(TOKENS))
    layer, kv_head, position = (axis.ravel() for axis in np.indices(shape))
    frames = []
    for sample_id, task, *_ in chosen:
        importance = generator.lognormal(0, 2, shape).astype(np.float32)
        for (policy, trained_on), skill in SKILL.items():
            scores = np.log(importance) + (3 - skill) * generator.normal(0, 2, shape)
            columns = {
                "layer": pl.Series(layer, dtype=pl.Int16),
                "kv_head": pl.Series(kv_head, dtype=pl.Int16),
                "position": pl.Series(position, dtype=pl.Int32),
                "token": pl.Series(TOKENS).gather(position),
                "importance": importance.ravel(),
                "rank": pl.Series((-scores).argsort(axis=-1).argsort(axis=-1).ravel(), dtype=pl.Int32),
            }
            frames.append(
                pl.DataFrame(columns).select(
                    pl.lit(sample_id).alias("sample_id"),
                    pl.lit(task).alias("task"),
                    pl.lit(policy).alias("policy"),
                    pl.lit(trained_on, dtype=pl.String).alias("trained_on"),
                    pl.all(),
                )
            )
    return pl.concat(frames)


def make_evaluation(
    benchmark: str, samples: pl.DataFrame, budgets: tuple[int, ...], generator: np.random.Generator
) -> pl.DataFrame:
    """A long table as the score stage writes it."""
    columns = [(policy, trained_on, budget) for policy, trained_on in SKILL for budget in budgets]
    hardness = generator.normal(0, 0.7, samples.height)
    rows = []
    for policy, trained_on, budget in [("full", None, None), *columns]:
        skill = 3.5 if budget is None else SKILL[policy, trained_on] * (budget / 512) ** 0.5
        noise = generator.normal(0, 0.3, samples.height)
        if benchmark == "ruler":
            value = (1 / (1 + np.exp(-3 * (skill - 1 - hardness + noise)))).round(1)
        else:
            value = 2.5 + 1.5 * np.exp(-skill) + 0.3 * hardness + 0.1 * noise
        rows.append(
            samples.select(
                pl.lit(MODEL).alias("model"),
                pl.lit(policy).alias("policy"),
                pl.lit(trained_on, dtype=pl.String).alias("trained_on"),
                pl.lit(benchmark).alias("benchmark"),
                "task",
                "sample_id",
                pl.lit(budget, dtype=pl.Int32).alias("budget"),
                pl.lit("string_match" if benchmark == "ruler" else "nll").alias("metric"),
                pl.Series("value", value),
                (pl.col("prompt_len") % 60 + 5).cast(pl.Int32).alias("n_tokens"),
            )
        )
    return pl.concat(rows)


def make_cost(benchmark: str, samples: pl.DataFrame, size: Size, generator: np.random.Generator) -> pl.DataFrame:
    """Costs that fall with the budget and with skill, over two cache sizes per sample."""
    policies = pl.DataFrame(
        [(*pair, skill) for pair, skill in SKILL.items()], schema=POLICY_SCHEMA | {"skill": pl.Float64}, orient="row"
    )
    caches = samples.select(
        "sample_id", pl.concat_list(pl.col("prompt_len") // 2, "prompt_len").cast(pl.List(pl.Int32)).alias("cache_size")
    ).explode("cache_size")
    heads = pl.DataFrame({"layer": range(size.layers)}, schema={"layer": pl.Int32}).join(
        pl.DataFrame({"kv_head": range(size.kv_heads)}, schema={"kv_head": pl.Int32}), how="cross"
    )
    steps = pl.DataFrame({"step": [None, *range(1, 16)]}, schema={"step": pl.Int32})
    frame = policies.join(caches, how="cross").join(heads, how="cross").join(steps, how="cross")
    left = 1 - pl.col("step") / 16
    total = pl.col("cache_size") * 3.0
    noise = pl.Series("noise", generator.lognormal(0, 0.05, frame.height))
    excess = 1 + (3.0 - pl.col("skill")) * noise * (1 + pl.col("layer") / 30)
    return frame.select(
        pl.lit(MODEL).alias("model"),
        "policy",
        "trained_on",
        pl.lit(benchmark).alias("benchmark"),
        "sample_id",
        "layer",
        "kv_head",
        "cache_size",
        (pl.col("step") * pl.col("cache_size") / 16).round().cast(pl.Int32).alias("budget"),
        (pl.when(pl.col("step").is_null()).then(total).otherwise(left / (1 + 9 * (1 - left)) * 20.0) * excess).alias(
            "cost"
        ),
        pl.when(pl.col("step").is_null())
        .then(total)
        .otherwise(left / (1 + 9 * (1 - left)) * 20.0)
        .alias("optimal_cost"),
    )


def write_policy(directory: Path, size: Size, params: Params, generator: np.random.Generator) -> None:
    """A policy directory as the train stage leaves it, without real weights."""
    directory.mkdir(parents=True)
    trained_on, estimator = directory.parts[-2:]
    config = {
        "model": MODEL,
        "trained_on": trained_on,
        "estimator": estimator,
        "layers": size.layers,
        "kv_heads": size.kv_heads,
        "head_dim": 64,
        "parameters_per_agent": 99_585,
        "params": params.train.model_dump(mode="json"),
        "fingerprint": f"{trained_on}{estimator}".encode().hex(),
        "trace_fingerprint": trained_on.encode().hex(),
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "policy.safetensors").write_bytes(b"\0" * 64)
    (directory / "README.md").write_text(f"# KVP, trained on {trained_on} with {estimator}\n")
    rate = 0.03 if estimator == "exact" else 0.012
    step, layer, kv_head = (
        axis.ravel()
        for axis in np.meshgrid(np.arange(size.steps), np.arange(size.layers), np.arange(size.kv_heads), indexing="ij")
    )
    noise = generator.lognormal(0, 0.05, len(step))
    frames = []
    for metric, value, keep in (
        ("loss", (2 + 3 * np.exp(-rate * step)) * noise, step >= 0),
        ("gradient_norm", 4 * np.exp(-rate * step) * noise, step >= 0),
        ("validation_cost", 1.9 + 0.02 * layer + 3 * np.exp(-rate * step), (step + 1) % 20 == 0),
    ):
        columns = {"step": step[keep], "layer": layer[keep], "kv_head": kv_head[keep]}
        frames.append(
            pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.Int32)).with_columns(
                pl.lit(metric).alias("metric"), pl.Series("value", value[keep], dtype=pl.Float32)
            )
        )
    _write(pl.concat(frames), directory / "curves.parquet")


def _write(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
