"""What a model attends to, captured, reduced and stored."""
