"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

import hashlib

import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator of ``purpose``; a GPU's would draw other numbers."""
    # Hashed, because torch's CPU generator looks at the low 32 bits of a seed only.
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))
