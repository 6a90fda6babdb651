"""Where models and data come from: pinned, fetched, recorded."""
