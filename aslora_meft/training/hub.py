"""The Hugging Face Hub: what ``train --push_to_hub`` uploads, and the check before the run that it will be let."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from aslora_meft.errors import UsageError, as_usage_error

# Of the output folder: what a run needs to go on is for nobody else.
_KEPT_HERE = ["checkpoint-*/**", "runs/**", ".*", "training_args.bin"]
# The first base is that of the HTTP client's errors; which client it is depends on the hub's version.
_ERRORS = (HfHubHTTPError.__bases__[0], HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError)


def prepare_push(args: Any) -> str | None:
    """Make the repository that a run shall be pushed to, and switch the Trainer's own uploads off.

    Those push checkpoints, and replace the model card.

    Args:
        args: `TrainingArguments`: `push_to_hub`, `hub_model_id`, `hub_token`, `hub_private_repo`.

    Returns:
        The repository's id; None where nothing is pushed.

    Raises:
        UsageError: the hub cannot be reached, or refuses.
    """
    if not args.push_to_hub:
        if args.hub_model_id is not None:
            raise UsageError(f"hub_model_id={args.hub_model_id!r} is only used by --push_to_hub; give that too")
        return None
    args.push_to_hub = False
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    with as_usage_error(*_ERRORS, prefix=f"push_to_hub: the repository {name!r} cannot be made: "):
        return HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def push(folder: str, repository: str, token: str | None) -> str:
    """Upload an adapter's folder without its checkpoints, in one commit.

    Returns:
        The address of the repository.

    Raises:
        UsageError: the hub cannot be reached, or refuses; the folder is whole.
    """
    remedy = f"the adapter is in '{folder}'; hf upload {repository} '{folder}' uploads it: "
    with as_usage_error(*_ERRORS, prefix=f"push_to_hub failed, {remedy}"):
        commit = HfApi(token=token).upload_folder(
            folder_path=folder, repo_id=repository, ignore_patterns=_KEPT_HERE, commit_message="Adapter"
        )
    return str(commit.repo_url)
