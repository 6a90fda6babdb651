"""Run trained policies and baselines on benchmarks and record what comes out."""
