"""The sensitivity study, which the paper leaves out, and its figure 5b. Outside the default pipeline."""
