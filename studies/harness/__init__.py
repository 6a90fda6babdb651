"""The uncompressed model's multiple choice against lm-eval's own numbers; needs the extra ``harness``."""
