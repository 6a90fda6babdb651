"""Benchmarks run: each as `make gpu` calls it, at sizes that mean nothing, and the command itself."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import typer

from perf import gpu, measure, rates
from pipeline.planning.devices import DEVICES, measured

STEPS = [step for step in gpu.STEPS if step.module != "pytest"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_benchmark_of_make_gpu_writes_its_result(
    step: gpu.Step, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [step.module, *step.tiny.split(), "--device", "cpu"])
    module = importlib.import_module(step.module)
    if hasattr(module, "typer"):
        with pytest.raises(SystemExit, match=r"^0$"):
            typer.run(module.main)
    else:
        module.main()
    # Those that `make bench` writes beside it would replace one another.
    assert json.loads((results / f"{step.name}-cpu.json").read_text())["machine"]["torch"] == torch.__version__


def test_the_plan_takes_the_rates_that_were_measured(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = next(step.tiny for step in STEPS if step.name == "rates")
    monkeypatch.setattr(sys, "argv", ["rates", *tiny.split()])
    rates.main()
    found = json.loads((results / "rates-cpu.json").read_text())["rates"]
    device = measured(DEVICES["cpu-2-cores"], results)
    assert device.flops == {name: found[f"flops.{name}"] for name in ("float32", "bfloat16", "float16")}
    for name in ("memory", "kernel", "write", "read", "commit"):
        assert getattr(device, name) == found[name]
        assert device.origins[name].startswith("measured")
    assert device.start == DEVICES["cpu-2-cores"].start


def test_make_gpu_runs_steps_as_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--only", "training_step"])
    gpu.main()
    assert "== training_step: done" in capsys.readouterr().out


def test_a_step_that_fails_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "STEPS", (gpu.Step("broken", "perf.nothing", "", "", 30),))
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny"])
    with pytest.raises(SystemExit, match=r"^1$"):
        gpu.main()
    assert "broken: failed (1)" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out.startswith("This machine has no GPU")
