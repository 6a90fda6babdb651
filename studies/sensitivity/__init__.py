"""The sensitivity study, which the paper leaves out, and its figure 5b."""
