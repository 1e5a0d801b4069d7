"""From what a user names as a model to the folder that holds it."""

import re
from importlib import resources
from pathlib import Path
from typing import Final

from baton.common.errors import ModelError

HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What the engine and the router read, once: no other formats of the same weights.
WANTED: Final = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
WEIGHTS: Final = "*.safetensors"
UNWANTED: Final = ("original/*", "consolidated*", "onnx/*")

# What the model that ships with Baton is served as.
SHIPPED_MODEL: Final = "baton-tiny"


def resolve_model(model: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """The folder of `model`: a folder, or ORG/NAME on the Hugging Face hub, through its cache.

    Without `with_weights` the hub's weights are not fetched, but they may be there.

    Raises ModelError when it is neither, or cannot be fetched.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if HUB_NAME.fullmatch(model) is None or folder.exists():
        raise ModelError(
            f"there is no model folder at {model!r}, and it is no ORG/NAME of the hub either; "
            "name a folder with config.json and safetensors files"
        )
    return _fetch(model, revision, (*WANTED, WEIGHTS) if with_weights else WANTED)


def shipped_model() -> Path:
    """The folder of baton-tiny, a small trained model that is part of the package."""
    return Path(str(resources.files("baton.models").joinpath("baton_tiny")))


def _fetch(name: str, revision: str | None, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision is not None else ""
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(UNWANTED)
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name} on the Hugging Face hub asks for consent: accept its terms on its page, then "
            "log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} on the Hugging Face hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name!r} here and no public model {name} on the Hugging Face hub; "
            "check the name, or log in with `hf auth login` if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name}{at} is not in the local cache and the Hugging Face hub cannot be reached; "
            "connect to the network once, or name a folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{name}{at} cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {error}); try again, or name a folder"
        ) from error
    return Path(found)
