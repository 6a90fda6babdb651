"""What the command traces captures with a tiny model, and what an interruption costs it."""

from pathlib import Path

import pytest
import torch

from pipeline.params import Params, check_params
from pipeline.profiles import render
from pipeline.samples.sample import Sample, Split
from pipeline.section import parse_text
from pipeline.traces.params import TracesParams
from studies.sensitivity.capture import capture, count_sequences
from studies.sensitivity.trace_sets import longer_sets, trace_sets
from tests.conftest import MakeModel
from tests.studies.sensitivity.conftest import STUDY

REPOSITORY = Path(__file__).parents[3]
TRACES = TracesParams(cuts=2, at_prompt_end=0.5, tokens=20, sequences_per_shard=1, seed=0)
LAYERS = STUDY.model_copy(update={"layers": (0, 2)})
CACHE_ONLY = LAYERS.model_copy(update={"inputs": ("keys",)})


def sample(split: Split, number: int, tokens: int) -> Sample:
    ids = tuple((torch.arange(tokens) * 31 % 120 + 3 + number % 2).tolist())
    return Sample(f"{split}-{number}", "ruler", "vt", split, ids, 20, None, (), 0, "{}")


SPLITS = {"train": [sample("train", 0, 30), sample("train", 1, 31)], "validation": [sample("validation", 0, 32)]}
LONGER = [sample("validation", 1, 70), sample("validation", 2, 71)]


def profile() -> Params:
    return check_params(parse_text(render("ci", REPOSITORY / "profiles").params))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_readers_find_what_was_captured(make_model: MakeModel, tmp_path: Path) -> None:
    model, done = make_model("llama"), []
    out = tmp_path / "extra/ruler"
    capture(out, model, "tiny", "ruler", SPLITS, LONGER, LAYERS, TRACES, done.append)
    assert sum(done) == count_sequences(SPLITS, LONGER, LAYERS) == 2 * 2 + 3
    found = longer_sets(LAYERS, tmp_path / "extra")["ruler"]
    assert found.length == 1024
    cache, hidden = (found.reader("validation", hidden, 0, (2, 0)) for hidden in (False, True))
    assert cache.shape.layer_numbers == (2, 0)
    assert [info.cache_size for info in cache.examples] == [35, 35]
    assert cache.read(1).keys.shape == (4, 35, 16)
    assert hidden.read(1).keys.shape == (4, 35, 64)
    # The hidden states of the sequences in traces/ lie apart from those.
    short = trace_sets(profile(), tmp_path / "traces", tmp_path / "extra")[0]
    assert (short.benchmark, short.length, short.traces) == ("ruler", 512, tmp_path / "traces/ruler")
    assert len(list((short.hidden / "train").rglob("*.parquet"))) == 2 * 2
    assert not (out / "longer/hidden/train").exists()


def test_hidden_states_are_captured_only_when_they_are_an_input(make_model: MakeModel, tmp_path: Path) -> None:
    done: list[int] = []
    capture(tmp_path / "a", make_model("llama"), "tiny", "ruler", SPLITS, LONGER, CACHE_ONLY, TRACES, done.append)
    assert sum(done) == count_sequences(SPLITS, LONGER, CACHE_ONLY) == 2
    assert not list(tmp_path.rglob("hidden*"))
    capture(tmp_path / "b", make_model("llama"), "tiny", "ruler", SPLITS, [], CACHE_ONLY, TRACES, done.append)
    assert list(files(tmp_path / "b")) == ["contents.json"]


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_capture_ends_with_the_same_bytes(stop: int, make_model: MakeModel, tmp_path: Path) -> None:
    model, done = make_model("llama"), 0

    def press_ctrl_c(count: int) -> None:
        nonlocal done
        done += count
        if done > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(tmp_path / "a", model, "tiny", "ruler", SPLITS, LONGER, LAYERS, TRACES, press_ctrl_c)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.parquet")}
    assert before
    capture(tmp_path / "a", model, "tiny", "ruler", SPLITS, LONGER, LAYERS, TRACES, lambda _: None)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capture(tmp_path / "b", model, "tiny", "ruler", SPLITS, LONGER, LAYERS, TRACES, lambda _: None)
    assert files(tmp_path / "a") == files(tmp_path / "b")
