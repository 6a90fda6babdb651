"""The table of ranked tokens, from a tiny model on disk to the file that the stage leaves."""

import copy
import itertools
from pathlib import Path

import polars as pl
import pytest
import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import PipelineError
from pipeline.evaluation.selfcheck import check_model
from pipeline.evaluation.texts import choose_texts, token_texts
from pipeline.files import write_json
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, save_policy
from pipeline.profiles import render
from pipeline.samples.sample import Sample, write_samples
from pipeline.tables import TOKENS
from stages.texts import main
from tests.conftest import MakeModel
from tests.eviction.prefills import RANKERS, layer_caches

REPOSITORY = Path(__file__).parents[2]
MODEL = "smollm2-135m"
LAYERS, KV_HEADS, N = 3, 2, 260
SEED = 7  # of the evaluation
SHAPE = PolicyShape(LAYERS, KV_HEADS, 16, AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "age")))
TRAINED = tuple(itertools.product(("exact", "rloo"), ("ruler", "dialogues")))
KEYS = {("oracle", None), *((name, None) for name in RANKERS), *((f"kvp-{how}", where) for how, where in TRAINED)}


def make_sample(number: int, task: str) -> Sample:
    ids = (torch.arange(N + 6) * (37 + 2 * number) % 125 + 3).tolist()
    return Sample(f"s{number}", "ruler", task, "test", tuple(ids), N, None, ("w9",), 4, "{}", ("text",))


SAMPLES = [make_sample(0, "fwe"), make_sample(1, "vt"), make_sample(2, "vt"), make_sample(3, "qa_1")]


@pytest.fixture
def directory(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, its policies, samples and params, as current directory."""
    params = YAML(typ="safe").load(render("ci", REPOSITORY / "profiles").params)
    params["texts"]["tasks"] = {"ruler": ["vt", "fwe"]}
    params["evaluation"]["seed"] = SEED
    params["benchmarks"]["ruler"]["samples"]["tasks"] = ["vt", "fwe", "qa_1"]
    with (tmp_path / "params.yaml").open("w") as stream:
        YAML(typ="safe").dump(params, stream)
    make_model("llama").save_pretrained(tmp_path / "models" / MODEL)
    verdict = check_model(copy.deepcopy(make_model("llama")), MODEL, "float32")
    write_json(tmp_path / "checks" / f"{MODEL}.json", verdict.model_dump(mode="json"))
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 128)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")))
    tokenizer.save_pretrained(tmp_path / "models" / MODEL)
    write_samples(tmp_path / "samples" / MODEL / "ruler/test.parquet", SAMPLES)
    for how, where in TRAINED:
        save_policy(tmp_path / "policies" / MODEL / where / how, make_policy(how, where), {"model": MODEL})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_policy(how: str, where: str) -> Policy:
    return Policy(SHAPE, torch.Generator().manual_seed(TRAINED.index((how, where))))


def test_the_stage_ranks_every_token_by_every_policy_in_every_head(directory: Path, make_model: MakeModel) -> None:
    main(MODEL, "ruler")
    table = pl.read_parquet(directory / "texts" / MODEL / "ruler/tokens.parquet")
    assert dict(table.schema) == TOKENS
    # The first sample of each task that params.yaml names, in its order.
    assert table.select("sample_id", "task").unique(maintain_order=True).rows() == [("s1", "vt"), ("s0", "fwe")]
    rows = ["sample_id", "policy", "trained_on", "layer", "kv_head", "position"]
    expected = itertools.product(("s0", "s1"), KEYS, range(LAYERS), range(KV_HEADS), range(N))
    assert set(table.select(rows).rows()) == {(s, *key, layer, head, token) for s, key, layer, head, token in expected}
    assert not table.select(rows).is_duplicated().any()

    model = make_model("llama")
    for index in (0, 1):
        sample = SAMPLES[index]
        part = table.filter(pl.col("sample_id") == sample.sample_id)
        per_token = part.select("layer", "kv_head", "position", "importance").unique()
        assert per_token.height == LAYERS * KV_HEADS * N  # one importance, whatever the policy
        text = part.filter(pl.col("policy") == "oracle", pl.col("layer") == 1, pl.col("kv_head") == 0)
        assert "".join(text["token"]) == " ".join(f"w{token}" for token in sample.input_ids[:N])
        caches = layer_caches(model, torch.tensor(sample.input_ids[:N]), seed=SEED + index)
        for (policy, trained_on), layer in itertools.product(KEYS, range(LAYERS)):
            trained = pl.col("trained_on").eq_missing(pl.lit(trained_on))
            mine = part.filter(pl.col("policy") == policy, trained, pl.col("layer") == layer)
            ranks = torch.tensor(mine["rank"].to_list()).view(KV_HEADS, N)
            ranking = ranks.argsort(-1)
            assert torch.equal(ranks.sort(-1).values, torch.arange(N).expand(KV_HEADS, N)), policy
            if policy == "oracle":
                scores = torch.tensor(mine["importance"].to_list()).view(KV_HEADS, N)
            elif trained_on is not None:
                with torch.no_grad():
                    how = policy.removeprefix("kvp-")
                    scores = make_policy(how, trained_on)(caches[layer].keys, caches[layer].values, layer=layer)
            else:
                scores = RANKERS[policy](caches[layer])
            ordered = scores.gather(-1, ranking)
            # Two ways to compute attention differ in the last bits, which turns near ties; LagKV compares ranks.
            slack = 1e-3 * (scores.max() - scores.min()) if policy != "lagkv" else 0.1
            assert (ordered.diff(dim=-1) <= slack).all(), (policy, trained_on, layer)


def test_an_interrupted_stage_keeps_finished_samples(directory: Path) -> None:
    main(MODEL, "ruler")
    out = directory / "texts" / MODEL / "ruler/tokens.parquet"
    first, (part, _) = out.read_bytes(), sorted(directory.glob(".work/texts-*/*/parts/*.parquet"))
    made = part.stat().st_mtime_ns
    out.unlink()
    main(MODEL, "ruler")
    assert out.read_bytes() == first
    assert part.stat().st_mtime_ns == made


def test_a_task_without_samples_is_one_sentence() -> None:
    with pytest.raises(PipelineError, match=r"texts\.tasks\.ruler names 'cwe', .* there are fwe, qa_1, vt\."):
        choose_texts(SAMPLES, ["vt", "cwe"])


def test_a_benchmark_that_is_not_named_gives_its_first_sample() -> None:
    assert choose_texts(SAMPLES, ()) == [0]


@pytest.mark.parametrize("text", ["naïve “quote” – 7", "日本語\nテキスト", "emoji 👩‍🚀!", "  spaces  "])
def test_token_texts_read_as_the_text_where_a_character_has_several_tokens(text: str) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    written = f"<|im_start|>{text}"
    ids = tokenizer(written)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) == 1 + len(text.encode())
    assert "".join(texts) == written
    assert texts[0] == "<|im_start|>"
