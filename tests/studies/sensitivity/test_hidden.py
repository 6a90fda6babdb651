"""Hidden states against transformers' own, and their files against interruption and damage."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.errors import PipelineError
from pipeline.models.layers import full_attention_layers
from pipeline.samples.sample import Sample, Split
from pipeline.traces.build import build_traces
from pipeline.traces.params import TracesParams
from pipeline.traces.shards import ExampleReader
from studies.sensitivity.hidden import HiddenReader, build_hidden_states, record_hidden_states
from tests.conftest import FAMILIES, SIZES, MakeModel

TRACES = TracesParams(cuts=2, at_prompt_end=0.5, tokens=8, sequences_per_shard=2, seed=0)
LAYERS = (0, 2)
Advance = Callable[[int], None]


def sample(split: Split, number: int) -> Sample:
    ids = tuple((torch.arange(30 + number) * 31 % 125 + 3).tolist())
    return Sample(f"{split}-{number}", "ruler", "vt", split, ids, 20, None, (), 0, "{}")


SPLITS = {
    "train": [sample("train", number) for number in range(5)],
    "validation": [sample("validation", number) for number in range(1)],
}


def build(root: Path, model: PreTrainedModel, advance: Advance = lambda _: None) -> None:
    build_hidden_states(root, model, SPLITS, LAYERS, TRACES.sequences_per_shard, advance)


@pytest.fixture(scope="module")
def directory(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces and hidden states of the same samples."""
    root = tmp_path_factory.mktemp("traces")
    model = make_model("llama")
    build_traces(root / "traces", model, "tiny", "ruler", SPLITS, TRACES, lambda _: None)
    build(root / "hidden", model)
    return root


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_recorded_states_are_what_transformers_says_behind_the_norm(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    ids = torch.arange(40)[None] * 17 % 128
    layers = full_attention_layers(model.config)
    with torch.no_grad(), record_hidden_states(model, layers) as states:
        residuals = model(ids, output_hidden_states=True).hidden_states
    assert set(states) == set(layers)
    for layer in layers:
        block = model.base_model.layers[layer]  # type: ignore[index, union-attr]
        with torch.no_grad():
            expected = block.input_layernorm(residuals[layer])  # type: ignore[operator, union-attr]
        torch.testing.assert_close(states[layer], expected[0])
    kept = {layer: entering.clone() for layer, entering in states.items()}
    with torch.no_grad():
        model(ids.flip(1))
    assert all(torch.equal(states[layer], kept[layer]) for layer in layers)  # the hooks are gone


def test_keys_and_values_are_computed_from_them(make_model: MakeModel, directory: Path) -> None:
    model = make_model("llama")
    reader = ExampleReader(directory / "traces", "train", 0, [2])
    larger = next(index for index, info in enumerate(reader.examples) if info.cache_size >= 20)
    hidden = HiddenReader(directory / "traces", directory / "hidden", "train", 0, [2]).read(larger)
    example = reader.read(larger)
    for head in range(2):
        known = example.count[head] > 0
        states, values = hidden.keys[head][known].float(), example.values[head][known].float()
        with torch.no_grad():
            projected = model.base_model.layers[2].self_attn.v_proj(states)  # type: ignore[index, operator, union-attr]
        torch.testing.assert_close(projected.view(-1, 2, 16)[:, head], values, rtol=1e-2, atol=1e-2)
        assert 1 < len(values) < example.cache_size


def test_a_reader_gives_hidden_states_in_place_of_keys(directory: Path) -> None:
    reader = HiddenReader(directory / "traces", directory / "hidden", "train", 1 << 20, (2, 0), [4, 1])
    plain = ExampleReader(directory / "traces", "train", 0, (2, 0), [4, 1])
    width, kv_heads = SIZES["hidden_size"], SIZES["num_key_value_heads"]
    assert (reader.shape.head_dim, reader.shape.layer_numbers) == (width, (2, 0))
    assert [info.sequence for info in reader.examples] == [1, 1, 4, 4]
    for index in range(4):
        found, example = reader.read(index), plain.read(index)
        heads, known = example.count.shape
        assert found.keys.shape == (heads, known, width) == (2 * kv_heads, known, width)
        assert found.values.shape == (heads, known, 0)
        for name in ("positions", "importance", "count", "best_cost"):
            assert torch.equal(getattr(found, name), getattr(example, name))
        # The heads of a layer share the state of a token.
        by_token = [dict(zip(example.positions[h].tolist(), found.keys[h], strict=True)) for h in range(heads)]
        for token in set(by_token[0]) & set(by_token[1]):
            assert torch.equal(by_token[0][token], by_token[1][token])
            assert token not in by_token[2] or not torch.equal(by_token[0][token], by_token[2][token])


def test_an_interrupted_run_continues_and_ends_with_the_same_bytes(
    directory: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    done = 0

    def press_ctrl_c(count: int) -> None:
        nonlocal done
        done += count
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, make_model("llama"), press_ctrl_c)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(path.relative_to(tmp_path)) for path in before} == {
        f"train/hidden={layer:02d}/shard-00000.parquet" for layer in LAYERS
    }
    counts: list[int] = []
    build(tmp_path, make_model("llama"), counts.append)
    assert counts == [2, 1, 1, 1, 1]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    ours, theirs = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path, directory / "hidden")
    )
    assert ours == theirs


def test_a_changed_file_is_named(directory: Path, tmp_path: Path) -> None:
    root = tmp_path / "hidden"
    for path in (directory / "hidden").rglob("*"):
        if path.is_file():
            target = root / path.relative_to(directory / "hidden")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    damaged = root / "train/hidden=02/shard-00001.parquet"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    reader = HiddenReader(directory / "traces", root, "train", 0, LAYERS)
    reader.read(0)
    with pytest.raises(PipelineError, match=r"hidden=02/shard-00001.parquet is missing or was changed"):
        reader.read(4)
    (root / "manifest.json").unlink()
    with pytest.raises(PipelineError, match="run the stage sensitivity_traces again"):
        HiddenReader(directory / "traces", root, "train", 0, LAYERS)


def test_a_layer_without_the_whole_context_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"sensitivity\.layers names 2, which"):
        build_hidden_states(tmp_path, make_model("gemma3"), SPLITS, (1, 2), 2, lambda _: None)


def test_a_state_outside_float16_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    model = copy.deepcopy(make_model("llama"))
    with torch.no_grad():
        model.base_model.layers[2].input_layernorm.weight.mul_(1e6)  # type: ignore[index, operator, union-attr]
    with pytest.raises(PipelineError, match="Sample train-0, layer 2: a hidden state is outside the range of float16"):
        build(tmp_path, model)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
