"""The hub: asked before a training whether it will take the result (--push_to_hub), and given it afterwards."""

import shlex
from pathlib import Path

from common.config import UserError
from common.runtime import say

REMEDY = "or leave --push_to_hub out and upload checkpoints/best later (hf upload)"


def check_hub(name: str) -> None:
    """UserError, before hours are spent, where an upload to owner/name cannot succeed: its name, the network, the token."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        well_formed = name.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise UserError(f"--push_to_hub {name} is no name on the hub: it has the form owner/name, of letters, digits, - _ and .")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push_to_hub: HF_HUB_OFFLINE forbids to upload; unset it, {REMEDY}")
    if not get_token():
        raise UserError(f"--push_to_hub: nobody is logged in; hf auth login, or the variable HF_TOKEN, does that, {REMEDY}")
    try:
        user = HfApi().whoami(token=get_token())
    except Exception as error:  # every network library has errors of its own, and all mean the same here
        raise UserError(
            f"--push_to_hub: the hub does not answer to this token ({type(error).__name__}); log in again, {REMEDY}"
        ) from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub: this token may only read; make one that may write, {REMEDY}")


def push(folder: Path, name: str) -> None:
    """Uploads a checkpoint folder with its model card to owner/name, which is made, private, if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi()
    say(f"uploading {folder} to {name} (if that fails: hf upload {name} {shlex.quote(str(folder))})")
    api.create_repo(name, private=True, exist_ok=True)
    done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Best checkpoint")
    say(f"uploaded to {done.repo_url}")
