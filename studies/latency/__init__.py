"""How long a ranking takes beside prefill and decode (paper, figure 6)."""
