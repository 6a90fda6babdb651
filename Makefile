# make repro             the whole story on the profile in params.yaml
# make repro PROFILE=ci  makes params.yaml and studies/params.yaml from profiles/ci.yaml first
# make studies           the same, then all studies, which dvc repro leaves alone
# make studies STUDY=latency      one of them: latency or sensitivity; `python -m studies.harness --model MODEL` holds
#                        the multiple choice against lm-eval's own numbers
# make ui                MLflow's pages on this computer, and where to look in them; PORT=5000
# make test              style and types beside the tests, two files of these at a time, the longest one first
# make bench             the benchmarks of speed, one after the other; results in perf/results
# make gpu               the checks and benchmarks that need a GPU; results in perf/results
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := true

PORT ?= 5000

.PHONY: repro studies ready ui test style behaviour bench gpu
repro: $(VENV)/installed
	$(if $(PROFILE),python -m stages.profile $(PROFILE))
	$(MAKE) --no-print-directory ready
	dvc repro
	# It has said why. Everything was computed, so this is no failure of the run.
	python -m stages.track || { test $$? -eq 1 && echo "The results are complete; only MLflow lacks them." >&2; }

# A DVC project of its own, see studies/dvc.yaml.
studies: repro
	$(MAKE) --no-print-directory --directory studies --file ../Makefile ready
	cd studies && dvc repro $(STUDY)

# Of the DVC project in the current folder.
ready:
	# A copy of the files without their repository: DVC must not look for one.
	git rev-parse --git-dir >/dev/null 2>&1 || dvc config --local core.no_scm true
	# A kill while DVC writes dvc.lock leaves a part of it, which DVC refuses; its cache of finished runs has the rest.
	! dvc stage list 2>&1 | grep -q "^'./dvc.lock'" || mv dvc.lock dvc.lock.damaged

ui: $(VENV)/installed
	python -m stages.ui --port $(PORT)

test: $(VENV)/installed
	$(MAKE) --no-print-directory --jobs 2 style behaviour

style: $(VENV)/installed
	ruff check .
	ruff format --check .
	mypy

behaviour: $(VENV)/installed
	python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/installed
	set -e; for script in $(filter-out perf/__init__.py perf/measure.py perf/gpu.py,$(wildcard perf/*.py)); do \
		python -m perf.$$(basename $$script .py); done

gpu: $(VENV)/installed
	python -m perf.gpu

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	# Every stage is a process: without compiled libraries, and where Python may write none, each starts 10 s later.
	python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@
