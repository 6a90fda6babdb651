"""The sensitivity study: what the held-out cost depends on (figure 5b included).

``make studies STUDY=sensitivity`` runs all of it; from the repository root, its commands run a piece each:

    python -m studies.sensitivity traces --model MODEL --trained-on BENCHMARK
    python -m studies.sensitivity train
    python -m studies.sensitivity report
"""

from stages._app import run
from studies.sensitivity.report import report
from studies.sensitivity.traces import traces
from studies.sensitivity.train import train

if __name__ == "__main__":
    run(traces, train, report)
