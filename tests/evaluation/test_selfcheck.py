"""The check that decides which models are right: over all families, and on models that were made wrong on purpose.

docs/MODELS.md holds what :func:`row` says of each family; ``python -m tests.evaluation.test_selfcheck`` writes it anew.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from pipeline.errors import PipelineError
from pipeline.evaluation.selfcheck import check_model
from pipeline.evaluation.sweep import Sweep
from pipeline.evaluation.verdict import Verdict, read_verdict, require_readable
from pipeline.eviction.budget import EvaluationParams
from pipeline.files import write_json
from pipeline.models.layout import cache_layout
from pipeline.samples.sample import Sample
from pipeline.tables import FULL, ORACLE, PolicyKey
from pipeline.traces.capture import run_captured
from tests.conftest import REPOSITORY, MakeModel
from tests.eviction.prefills import RANKERS
from tests.models.families import FAMILIES, SIZES, config
from tests.models.test_families import sample

DOCUMENT = REPOSITORY / "docs/MODELS.md"
HEADER = "| family | class in transformers | what the check says |"
# In float64. Norms and the softmax of most families are float32 whatever the rest is.
TOLERANCE = 5e-5


def tiny(family: str) -> PreTrainedModel:
    """The tiny random model of a family, in float32."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(family)).eval()
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":  # its kernels know no float64
        model.set_experts_implementation("eager")
    return model


def row(family: str) -> str:
    """The line of docs/MODELS.md for a family: what the check says of it in float64."""
    model = tiny(family).double()
    name = type(model).__name__
    try:
        found = check_model(model, name, "float32", TOLERANCE)
    except PipelineError as error:
        reason = str(error).replace(name, "").strip(" :").removesuffix("; choose another model.")
        return f"| {family} | `{name}` | refused: {reason} |"
    notes = []
    if found.windows:
        notes.append(f"{len(found.ranked_layers)} of 4 layers are ranked, the others slide over a window")
    if found.longest is not None:
        notes.append(f"texts of up to {found.longest} tokens, where its positions change; longer ones are refused")
    return f"| {family} | `{name}` | **right**{': ' if notes else ''}{'; '.join(notes)} |"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_document_says_what_the_check_says(family: str) -> None:
    assert row(family) in DOCUMENT.read_text().splitlines()


def test_the_document_has_a_row_for_each_family_and_no_other() -> None:
    rows = [line.split("|")[1].strip() for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert rows[2:] == list(FAMILIES)  # behind the header
    assert len(FAMILIES) >= 30


def sweep_of(model: PreTrainedModel) -> Sweep:
    """The sweep of all baselines at 32 tokens."""
    rules = EvaluationParams(budgets=(32,), n_sink=4, n_recent=16, seed=0)
    return Sweep(model, None, {}, RANKERS, rules, (32,))  # type: ignore[arg-type]  # no text is decoded


# Not in the document: what the sweep says of a family is what a literal computation says of it.
LITERAL = ["Granite", "OLMo 2", "Gemma 2", "GPT-OSS", "GPT-2", "Gemma 3 (multimodal)", "Phi-4-mini, partial rotation"]


@pytest.mark.parametrize("family", LITERAL)
def test_likelihoods_importance_and_tova_are_those_of_the_model(family: str) -> None:
    model = tiny(family).double()
    text = sample("test", 4)
    sweep = sweep_of(model)
    full = next(fmean(found.nll) for found in sweep.run(text, 0)[0] if found.key == FULL)
    prefill = sweep.prefill(text, 0)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids, n = torch.tensor(text.input_ids), text.prompt_len
    with torch.no_grad():
        own = eager(input_ids=ids[None], output_attentions=True, use_cache=False)
    expected = F.cross_entropy(own.logits[0, n - 1 : -1], ids[n:])
    assert full == pytest.approx(expected.item(), abs=1e-5)
    layout = cache_layout(model)
    for index, number in enumerate(layout.ranked):
        weights = own.attentions[number][0].double()  # (heads, queries, tokens)
        groups = weights.unflatten(0, (layout.kv_heads, -1))
        torch.testing.assert_close(
            prefill.importance[n][index].double(), groups.amax(1)[:, n:, :n].sum(1), rtol=1e-4, atol=1e-5
        )
        # TOVA: the last query's attention, mean over all heads; the last token is kept.
        tova = prefill.scores[n][PolicyKey("tova")][index].double()
        torch.testing.assert_close(tova[:, :-1], weights[:, n - 1, : n - 1].mean(0).expand(layout.kv_heads, -1))
        # SnapKV: mean attention of the last 64 queries, smoothed over 5 tokens, mean over a group.
        window = groups[:, :, n - 64 : n, : n - 64].mean(2)
        smooth = F.avg_pool1d(window, 5, stride=1, padding=2).mean(1)
        snapkv = prefill.scores[n][PolicyKey("snapkv")][index].double()
        torch.testing.assert_close(snapkv[:, : n - 64], smooth, rtol=1e-4, atol=1e-6)
    assert set(prefill.scores[n]) == {ORACLE, *map(PolicyKey, RANKERS)}


def add_hook(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> None:
    """Change what enters the second layer."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    model.model.layers[1].register_forward_pre_hook(hook)  # type: ignore[index, union-attr, operator]


class Remember:
    """A state that is no part of the cache: each call continues from the last token of the one before."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        before = hidden[:, :1] if self.last is None or len(self.last) != len(hidden) else self.last
        shifted = torch.cat([before, hidden[:, :-1]], dim=1)
        self.last = hidden[:, -1:]
        return hidden + shifted


WRONG: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "it looks at the tokens of a call, not of the text": (
        lambda model: add_hook(model, lambda hidden: hidden + hidden.mean(1, keepdim=True)),
        "differ from transformers' own",
    ),
    "it keeps a state beside the cache": (
        lambda model: add_hook(model, Remember()),
        "differ from transformers' own",
    ),
    "it answers with something that is no number": (
        lambda model: model.lm_head.weight.data.fill_(float("nan")),  # type: ignore[union-attr, operator]
        "a logit is not finite in float32",
    ),
    "its keys are no numbers": (
        lambda model: model.model.layers[2].self_attn.k_proj.weight.data.fill_(float("inf")),  # type: ignore[index, union-attr, operator]
        "is not finite in float32",
    ),
    "its code fails": (
        lambda model: add_hook(model, lambda hidden: hidden[:, 200:].amax(1)),
        "cannot be run",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_model_that_we_would_compute_wrongly_is_refused(what: str, make_model: MakeModel) -> None:
    change, message = WRONG[what]
    model = copy.deepcopy(make_model("llama"))
    change(model)
    with pytest.raises(PipelineError, match=message) as caught:
        check_model(model, "mine", "float32")
    assert "\n" not in str(caught.value)


def test_a_model_that_overflows_in_its_dtype_is_refused(make_model: MakeModel) -> None:
    model = copy.deepcopy(make_model("llama"))
    model.get_input_embeddings().weight.data.mul_(3e5)  # type: ignore[operator, union-attr]
    assert check_model(copy.deepcopy(model), "mine", "bfloat16").verdict == "right"
    with pytest.raises(PipelineError, match=r"not finite in float16; set models\.\*\.dtype to float32 or bfloat16"):
        check_model(copy.deepcopy(model), "mine", "float16")
    half = model.half()
    with pytest.raises(PipelineError, match="not finite in float16"):
        run_captured(half, torch.arange(4, 104), DynamicCache(), (50,))
    with pytest.raises(PipelineError, match="not finite in float16"):
        sweep_of(half).run(sample("test", 4), 0)


def test_a_last_layer_that_overflows_gives_no_choice(make_model: MakeModel) -> None:
    # NaN logits once chose the first answer.
    model = copy.deepcopy(make_model("llama"))
    sweep = sweep_of(model)
    model.lm_head.weight.data[7] = float("inf")  # type: ignore[union-attr, index, operator]
    asked = dataclasses.replace(sample("test", 4), choices=((5,), (9, 7)), answers=("a", "b"), gold=0, ask=("choice",))
    with pytest.raises(PipelineError, match="a logit is not finite in float32"):
        sweep.run(asked, 0)


@pytest.fixture
def verdict_file(make_model: MakeModel, tmp_path: Path) -> Path:
    found = check_model(copy.deepcopy(make_model("gemma3")), "mine", "float32")
    write_json(tmp_path / "mine.json", found.model_dump(mode="json"))
    return tmp_path / "mine.json"


def test_a_second_check_gives_equal_bytes(verdict_file: Path, make_model: MakeModel) -> None:
    first = verdict_file.read_bytes()
    again = check_model(copy.deepcopy(make_model("gemma3")), "mine", "float32")
    write_json(verdict_file, again.model_dump(mode="json"))
    assert verdict_file.read_bytes() == first
    found = read_verdict(verdict_file, "mine", "float32")
    assert (found.verdict, found.ranked_layers, found.windows) == ("right", [1, 3], {"0": 24, "2": 24})
    assert (found.heads, found.kv_heads, found.head_dim, found.longest) == (6, 2, 16, None)
    assert (found.reads, found.vocabulary) == (2048, 128)


@pytest.mark.parametrize("change", [{"vocabulary": None}, {"longest": "abc"}, {"windows": [1]}, {"more": 1}], ids=str)
def test_a_damaged_verdict_is_one_sentence(change: dict[str, Any], verdict_file: Path) -> None:
    verdict_file.write_text(json.dumps(json.loads(verdict_file.read_text()) | change))
    for path in (verdict_file, verdict_file.with_name("absent.json")):
        with pytest.raises(PipelineError, match=r"holds no check of a model .*; run the check stage") as caught:
            read_verdict(path, "mine", "float32")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"verdict": "wrong"}, {"model": "other"}, {"dtype": "float16"}], ids=str)
def test_a_verdict_of_something_else_is_refused(change: dict[str, str], verdict_file: Path) -> None:
    verdict_file.write_text(json.dumps(json.loads(verdict_file.read_text()) | change))
    with pytest.raises(PipelineError, match="not 'right' of mine in float32; run the check stage again"):
        read_verdict(verdict_file, "mine", "float32")


def test_texts_that_were_not_checked_are_refused(verdict_file: Path) -> None:
    whole = read_verdict(verdict_file, "mine", "float32")
    text: Sample = sample("test", 4)  # 200 tokens and a reply of 8
    longer = (
        dataclasses.replace(text, max_new_tokens=9),
        dataclasses.replace(text, input_ids=(*text.input_ids, 5)),
        dataclasses.replace(text, choices=((5,) * 9, (5,))),
    )
    for limit, message in (
        ("longest", r"more than 208 tokens, .*; sample test-4 has 209: shorten the benchmark"),
        ("reads", r"Sample test-4 has 209 tokens, and mine reads 208 "),
    ):
        found = whole.model_copy(update={limit: 208})
        require_readable(found, [text])
        for other in longer:
            with pytest.raises(PipelineError, match=message):
                require_readable(found, [text, other])
    for ids in ((-1, *text.input_ids[1:]), (*text.input_ids[:-1], 128)):
        with pytest.raises(PipelineError, match="token id outside the 128 of mine"):
            require_readable(whole, [dataclasses.replace(text, input_ids=ids)])


def check_of(made: PretrainedConfig) -> Verdict:
    torch.manual_seed(0)
    return check_model(AutoModelForCausalLM.from_config(made).eval(), "mine", "float32")


def test_a_window_of_the_whole_text_counts_up_to_its_length_only() -> None:
    # Stretched positions: the model reads 1,024 tokens, and its second layer sees 256 of them.
    stretched = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    sizes = SIZES | {"num_hidden_layers": 2, "max_position_embeddings": 256}
    window = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 256}
    found = check_of(Qwen2Config(**sizes | window, rope_parameters=stretched))
    assert (found.ranked_layers, found.windows, found.reads) == ([0], {"1": 256}, 1024)
    # Without them the window leaves nothing out of any text that the model reads.
    found = check_of(MistralConfig(**sizes, sliding_window=256))
    assert (found.ranked_layers, found.windows, found.reads) == ([0, 1], {}, 256)


@pytest.mark.parametrize("first", [50256, -1, None], ids=str)
def test_a_model_is_checked_whatever_begins_its_texts(first: int | None) -> None:
    assert check_of(LlamaConfig(**SIZES | {"bos_token_id": first})).verdict == "right"


@pytest.mark.parametrize("positions", [64, 128])
def test_a_model_that_reads_few_tokens_is_checked_on_as_many(positions: int) -> None:
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    found = check_of(GPT2Config(**sizes, n_positions=positions, bos_token_id=1, eos_token_id=2))
    assert found.reads == positions
    assert found.tokens <= positions


def test_too_few_tokens_and_lengths_that_are_none_are_one_sentence() -> None:
    with pytest.raises(PipelineError, match="mine reads 32 tokens before its positions change or end, too few"):
        check_of(LlamaConfig(**SIZES | {"max_position_embeddings": 32}))
    with pytest.raises(PipelineError, match="does not say how many tokens it reads"):
        check_of(LlamaConfig(**SIZES | {"max_position_embeddings": -5}))


def write_document() -> None:
    """Put the table of today's verdicts into docs/MODELS.md."""
    before = DOCUMENT.read_text().partition(HEADER)[0]
    DOCUMENT.write_text("\n".join([f"{before}{HEADER}", "| --- | --- | --- |", *map(row, FAMILIES)]) + "\n")


if __name__ == "__main__":
    write_document()
