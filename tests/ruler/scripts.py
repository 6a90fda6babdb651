"""A wheel like NVIDIA's with scripts of our own, which need no second; and a job of them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.ruler.job import RulerJob
from pipeline.ruler.splits import Plan, Wanted

ROW = {"index": 0, "input": "2 + 2", "outputs": ["4"], "length": 3}
MAKES = f"""
import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
os.chdir(options["--save_dir"])
os.mkdir(options["--save_name"])
with open(options["--save_name"] + "/rows.jsonl", "w") as file:
    json.dump({ROW}, file)
"""


def write_wheel(wheel: Path, scripts: Mapping[str, str]) -> Path:
    """A task for each script."""
    folder = wheel / "long_context_eval/data/synthetic"
    folder.mkdir(parents=True)
    template = {"template": "{context}", "answer_prefix": "", "tokens_to_generate": 1}
    (folder / "constants.py").write_text(f"TASKS = {dict.fromkeys(scripts, template)!r}")
    listing = {name: {"task": name, "args": {}} for name in scripts}
    (wheel / "long_context_eval/synthetic.yaml").write_text(json.dumps(listing))
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text)
    return wheel


def job_of(wheel: Path, model: Path, directory: Path, *tasks: str) -> RulerJob:
    """A test split of one row a task, for which scripts start as they are."""
    wanted = Wanted("ruler", tasks, 64, {}, {"test": 1}, 7)
    return RulerJob("samples", directory, directory, Plan(wanted, "test", frozenset(), wheel, model))


def is_gone(group: int) -> bool:
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
