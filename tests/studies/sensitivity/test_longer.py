"""Longer samples of RULER: made once, of another length, sharing nothing with what policies were trained on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.base import Making
from pipeline.benchmarks.ruler import Ruler
from pipeline.errors import PipelineError
from pipeline.models.tokenizer import load_tokenizer
from pipeline.ruler.splits import units
from pipeline.ruler.wheel import read_tasks
from pipeline.samples.sample import Sample, Split
from studies.sensitivity import longer as module
from studies.sensitivity.longer import build_longer, longer_samples
from studies.sensitivity.params import Longer

YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def few(ruler: Ruler) -> Ruler:
    return ruler.model_copy(update={"tasks": ("niah_multikey_1", "vt", "qa_1", "qa_2")})


@pytest.fixture(scope="module")
def making(ruler_wheel: Path, splitter_wheel: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Making:
    sources = {"source": ruler_wheel, "sentence_splitter": splitter_wheel}
    return Making("ruler", sources, smollm2, load_tokenizer(smollm2), tmp_path_factory.mktemp("ruler"))


@pytest.fixture(scope="module")
def samples(few: Ruler, ruler_samples: dict[Split, list[Sample]]) -> dict[Split, list[Sample]]:
    """What is trained on, with more haystacks than there are longer ones."""
    tasks = (*few.tasks, "niah_single_2", "niah_multivalue")
    return {split: [sample for sample in found if sample.task in tasks] for split, found in ruler_samples.items()}


def prompt(tokenizer: Any, sample: Sample) -> str:
    text = tokenizer.decode(list(sample.input_ids[: sample.prompt_len]), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def test_longer_samples_are_longer_and_share_nothing_with_training(
    few: Ruler, making: Making, samples: dict[Split, list[Sample]], tmp_path: Path
) -> None:
    tasks, tokenizer = read_tasks(making.sources["source"]), making.tokenizer
    made = build_longer(few, Longer(length=4096, samples=1), replace(making, work=tmp_path), samples["train"])
    assert [(sample.task, sample.split) for sample in made] == [(task, "validation") for task in few.tasks]
    assert all(sample.ask == () for sample in made)
    assert all(2500 < len(sample.input_ids) < 4300 for sample in made)
    held = [
        set().union(*(units(tasks[s.task], prompt(tokenizer, s)) for s in part)) for part in (made, samples["train"])
    ]
    assert all(len(of_part) > 30 for of_part in held)
    assert not held[0] & held[1]
    essays = [
        [prompt(tokenizer, s).split("afterwards.\n")[1].split() for s in part if tasks[s.task].uses_essays]
        for part in (made, samples["train"])
    ]
    runs = [
        {run for words in part for run in zip(*(words[start:] for start in range(12)), strict=False)} for part in essays
    ]
    assert min(map(len, runs)) > 1000
    # The question and the needles are worded alike.
    assert all("magic" in " ".join(run) for run in runs[0] & runs[1])


def test_a_length_that_needs_the_essays_of_training_is_refused(ruler: Ruler, making: Making, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"sensitivity\.longer\.ruler: at 8192 tokens .* up to 4584 are possible"):
        build_longer(ruler, Longer(length=8192, samples=1), replace(making, work=tmp_path), [])


def test_a_length_beyond_the_window_is_one_sentence(ruler: Ruler, tmp_path: Path) -> None:
    config = {"max_position_embeddings": 1024, "rope_scaling": YARN}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match=r"^sensitivity\.longer\.long: length 4097 is above the 4096 tokens"):
        longer_samples(ruler, Longer(length=4097, samples=1), "long", tmp_path, {}, [], tmp_path)


def test_longer_samples_are_made_once(
    few: Ruler, making: Making, samples: dict[Split, list[Sample]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    longer = Longer(length=1024, samples=1)
    monkeypatch.setattr(module, "build_longer", lambda *_: samples["validation"])
    made = longer_samples(few, longer, "ruler", making.model, {}, samples["train"], tmp_path)
    monkeypatch.setattr(module, "build_longer", None)
    again = longer_samples(few, longer, "ruler", making.model, {}, samples["train"], tmp_path)
    assert again == made == samples["validation"]
