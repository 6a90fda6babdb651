"""Estimators of the gradient: a file each, named by ``matrix.estimator`` and in ``estimators`` of params.yaml."""
