"""Studies beside the pipeline: a DVC project of its own (``studies/dvc.yaml``), which the pipeline knows nothing of."""
