"""A checkpoint to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi

from mergequant.errors import InputError
from mergequant.model.reader import open_checkpoint


def files_to_push(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's folder, hidden ones left out.

    Raises:
        InputError: the folder is no finished checkpoint.
    """
    open_checkpoint(checkpoint)
    inside = {x.relative_to(checkpoint): x for x in checkpoint.rglob("*") if x.is_file()}
    return sorted(file for name, file in inside.items() if not any(y[0] == "." for y in name.parts))


def push(checkpoint: Path, name: str, *, private: bool = False) -> str:
    """Upload a checkpoint; the token is that of `hf auth login` or of HF_TOKEN.

    Args:
        checkpoint: its folder.
        name: ORG/NAME of the model on the hub, made if it is not there.
        private: whether only its owners see it, if it is made.

    Returns:
        the model's address.

    Raises:
        InputError: the hub refused.
    """
    files = files_to_push(checkpoint)
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=str(checkpoint),
            allow_patterns=[str(file.relative_to(checkpoint)) for file in files],
            commit_message="Quantized by mergequant",
        )
    except Exception as error:  # the hub client raises many types, all meaning: refused
        raise InputError(
            f"The Hugging Face hub did not take {name} ({type(error).__name__}): check the name, "
            "`hf auth login` and the network."
        ) from error
    return str(address)
