"""Trained policies from and to other places: a directory, a repository on the hub. Safetensors, JSON and a card.

Reached through :class:`pipeline.policy.agents.Policy`; no stage takes a policy from here.
"""

import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from pipeline.errors import PipelineError
from pipeline.files import atomic_write, write_text
from pipeline.policy.agents import Policy, load_policy, save_policy
from pipeline.policy.card import CARD_KEYS, draw_costs, model_card
from pipeline.sources.fetch import fetch
from pipeline.sources.pins import PinnedUri


def load_pretrained(source: str | Path, revision: str | None, model: str | None) -> Policy:
    """See :meth:`pipeline.policy.agents.Policy.from_pretrained`."""
    directory = Path(source)
    if not str(source):
        raise PipelineError("No policy is named; give the directory that the train stage wrote, or a repository.")
    if not directory.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise PipelineError(f"{source} is no directory, and no repository of the hub (owner/name); correct it.")
        try:
            pinned = PinnedUri(uri=f"hub:{source}", revision=revision)
        except ValidationError:
            raise PipelineError(
                f"{source} is no directory; as a repository of the hub it needs revision=..., the 40 lower-case "
                "hexadecimal digits of a commit."
            ) from None
        directory = fetch(pinned)
    elif revision is not None:
        raise PipelineError(f"{source} is a directory, which has no revisions; leave revision={revision} out.")
    return load_policy(directory, model)[0]


def save_pretrained(policy: Policy, directory: Path, licence: str | None) -> None:
    """See :meth:`pipeline.policy.agents.Policy.save_pretrained`."""
    if not policy.provenance:
        raise PipelineError("Nothing is known of how this policy was trained; save one that from_pretrained loaded.")
    if lacking := [key for key in CARD_KEYS if key not in policy.provenance]:
        raise PipelineError(
            f"The policy's config does not say {', '.join(lacking)}, as of an older version; train again."
        )
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise PipelineError(f"{licence!r} is no licence as the hub names it, like apache-2.0; 'other' is one, too.")
    costs, heads = policy.provenance["held_out_cost"], policy.shape.heads
    if len(costs) != heads or not all(isinstance(cost, float) and math.isfinite(cost) for cost in costs):
        raise PipelineError(f"The policy's config does not hold a held-out cost of each of {heads} heads; train again.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PipelineError(f"{directory} is there already and not empty; choose another directory.")
    with atomic_write(directory) as temporary:
        temporary.mkdir()
        save_policy(temporary, policy, policy.provenance)
        draw_costs(policy.provenance, temporary / "costs.png")
        write_text(temporary / "README.md", model_card(temporary, licence))


def push_to_hub(policy: Policy, repository: str, licence: str, private: bool) -> str:
    """See :meth:`pipeline.policy.agents.Policy.push_to_hub`."""
    import httpx
    from huggingface_hub import HfApi, errors

    hub = HfApi()
    with TemporaryDirectory() as temporary:
        save_pretrained(policy, Path(temporary), licence)
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            commit = hub.upload_folder(repo_id=repository, folder_path=temporary, commit_message="Upload the policy")
        except (errors.HfHubHTTPError, errors.HFValidationError, httpx.HTTPError, ConnectionError) as error:
            raise PipelineError(
                f"{repository}: the hub did not take the policy ({type(error).__name__}); check the name and the "
                "network, and log in with `hf auth login`."
            ) from None
    return commit.oid
