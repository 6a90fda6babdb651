"""From samples to traces with tiny models: what is kept, and what an interruption costs."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.models.layers import full_attention_layers
from pipeline.samples.sample import Sample, Split
from pipeline.traces import build
from pipeline.traces.build import build_traces
from pipeline.traces.params import TracesParams, training_cuts
from pipeline.traces.shards import ExampleReader
from tests.conftest import MakeModel

PARAMS = TracesParams(cuts=2, at_prompt_end=0.5, tokens=12, sequences_per_shard=2, seed=7)


def sample(split: Split, number: int, tokens: int) -> Sample:
    ids = tuple((torch.arange(tokens) * 31 % 120 + 3 + number).tolist())
    return Sample(f"{split}-{number}", "ruler", "vt", split, ids, tokens - 9, None, (), 0, "{}")


SPLITS: dict[str, list[Sample]] = {
    "train": [sample("train", number, 40 + number) for number in range(5)],
    "validation": [sample("validation", 5, 45)],
}


def make(root: Path, model: PreTrainedModel, advance: Callable[[int], None] = lambda _: None) -> Path:
    build_traces(root, model, "tiny", "ruler", SPLITS, PARAMS, advance)
    return root


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_examples_are_what_a_float64_model_says(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(family)
    make(tmp_path, model)
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    layers, kv_heads = full_attention_layers(model.config), model.config.num_key_value_heads
    groups = model.config.num_attention_heads // kv_heads
    for split, samples in SPLITS.items():
        reader = ExampleReader(tmp_path, split, 0)
        assert reader.shape.layer_numbers == tuple(layers)
        found = iter(range(len(reader.examples)))
        for sequence, text in enumerate(samples):
            cache = DynamicCache(config=exact.config)
            with torch.no_grad():
                weights = exact(
                    torch.tensor(text.input_ids)[None], output_attentions=True, past_key_values=cache
                ).attentions
            cuts = training_cuts(len(text.input_ids), text.prompt_len, text.sample_id, PARAMS)
            for cut in cuts if split == "train" else (len(text.input_ids) // 2,):
                index = next(found)
                info, example = reader.examples[index], reader.read(index)
                assert (info.sequence, info.sample_id, info.cache_size) == (sequence, text.sample_id, cut)
                for place, layer in enumerate(layers):
                    for kv_head in range(kv_heads):
                        head, mine = place * kv_heads + kv_head, slice(kv_head * groups, (kv_head + 1) * groups)
                        importance = weights[layer][0, mine].amax(0)[cut:, :cut].sum(0)
                        known = example.count[head] > 0
                        where = example.positions[head][known].long()
                        for states, true in (
                            (example.importance, importance),
                            (example.keys, cache.layers[layer].keys[0, kv_head]),
                            (example.values, cache.layers[layer].values[0, kv_head]),
                        ):
                            torch.testing.assert_close(states[head][known].double(), true[where], rtol=2e-3, atol=1e-3)
                        best = (importance.sort(descending=True).values * torch.arange(cut)).sum()
                        assert example.best_cost[head].item() == pytest.approx(best.item(), rel=1e-3)
                        if split == "validation":
                            assert known.sum() == cut
                            assert (example.count[head] == 1).all()
        assert next(found, None) is None


def test_tokens_are_kept_as_often_as_their_probability_says(make_model: MakeModel, tmp_path: Path) -> None:
    # The same text many times under other names: probabilities are equal, draws are not.
    text = SPLITS["train"][0]
    copies = [Sample(**{**vars(text), "sample_id": f"copy-{number}"}) for number in range(150)]
    params = PARAMS.model_copy(update={"cuts": 1, "at_prompt_end": 1.0, "sequences_per_shard": 50})
    build_traces(tmp_path, make_model("llama"), "tiny", "ruler", {"train": copies}, params, lambda _: None)
    reader = ExampleReader(tmp_path, "train", 0)
    kept = torch.zeros(3 * 2, text.prompt_len)
    probability = torch.zeros_like(kept)
    for index in range(150):
        example = reader.read(index)
        for head, (positions, count) in enumerate(zip(example.positions.long(), example.count, strict=True)):
            known = count > 0
            kept[head, positions[known]] += 1
            probability[head, positions[known]] = 1 / count[known]
    error = (probability * (1 - probability) / 150).sqrt().clamp_min(1e-3)
    assert ((kept / 150 - probability).abs() < 5 * error).all()
    assert abs(kept.sum(-1).mean() / 150 - 12) < 0.3


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_run_continues_and_ends_with_the_same_bytes(
    stop: int, make_model: MakeModel, tmp_path: Path
) -> None:
    model, done, counts = make_model("llama"), 0, list[int]()

    def press_ctrl_c(count: int) -> None:
        nonlocal done
        done += count
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", model, press_ctrl_c)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert len(finished) == {1: 0, 4: 3 * 2 + 1}[stop]  # two files of each layer and a marker
    make(tmp_path / "a", model, counts.append)
    assert sum(counts) == 6
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert files(tmp_path / "a") == files(make(tmp_path / "b", model))


def test_threads_change_no_byte(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "many", make_model("llama"))
    monkeypatch.setattr(build, "_THREADS", 1)
    make(tmp_path / "one", make_model("llama"))
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_an_error_of_a_writing_thread_stops_the_run(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PipelineError("No space.")

    monkeypatch.setattr(build.ShardWriter, "write_layer", refuse)
    with pytest.raises(PipelineError, match="No space"):
        make(tmp_path, make_model("llama"))
    assert not files(tmp_path)


def test_sequences_without_anything_to_rank_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    short = Sample("short", "ruler", "vt", "train", (3, 4), 1, None, (), 0, "{}")
    with pytest.raises(PipelineError, match=r"Sample short has 2 tokens; 3 are the least .* drop it"):
        build_traces(tmp_path, make_model("llama"), "tiny", "ruler", {"train": [short]}, PARAMS, lambda _: None)
