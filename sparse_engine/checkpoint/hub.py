"""Finds a checkpoint: a local directory as it is, or a Hub id downloaded to the cache; safetensors weights only."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from sparse_engine.errors import CheckpointError

__all__ = ["resolve"]

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "merges.txt", "vocab.txt", "*.model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_CONVERSION_AUTHOR = "SFconvertbot"


def resolve(ckpt: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local directory of ``ckpt``: a directory, or a Hub id such as "facebook/opt-125m".

    Many OPT repositories keep only pickled weights on their main branch, while the Hub's own conversion bot has opened a
    pull request with the same weights as safetensors; without a ``revision`` that pull request is used.

    Raises:
        CheckpointError: there is no such directory, the Hub cannot be reached, or it holds no safetensors weights.
    """
    text = os.fspath(ckpt)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{text} is a file; give the directory that holds config.json and the .safetensors files")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"there is no checkpoint directory {text}")
    return _download(text, revision)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # What it says of its retries is said once, below, if they come to nothing.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        return Path(snapshot_download(repo, revision=revision or _safetensors_revision(repo), allow_patterns=_FILES))
    except CheckpointError:
        raise
    except Exception as error:  # the Hub client's HTTP library, and so the type of a network error, differs between its versions
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES, local_files_only=True))
        except Exception:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{repo} is no local directory and could not be had from the Hub ({reason})") from None


def _safetensors_revision(repo: str) -> str | None:
    from huggingface_hub import HfApi

    api = HfApi()
    if _has_safetensors(api.list_repo_files(repo)):
        return None
    for pull in api.get_repo_discussions(repo, author=_CONVERSION_AUTHOR, discussion_type="pull_request"):
        if pull.git_reference and _has_safetensors(api.list_repo_files(repo, revision=pull.git_reference)):
            return str(pull.git_reference)
    raise CheckpointError(
        f"{repo} has no safetensors weights on the Hub (pickled weights are refused); convert it with save_pretrained first"
    )


def _has_safetensors(files: list[str]) -> bool:
    return any(name.endswith(".safetensors") for name in files)
