"""Copies of what lies in files, in MLflow; nothing reads them back, and deleting the database loses nothing."""
