"""The method of the paper: agents, rankings, training."""
