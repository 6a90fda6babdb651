"""Language models: exported, loaded, asked for their layout, run."""
