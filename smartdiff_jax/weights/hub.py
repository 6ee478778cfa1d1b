"""A repository of the Hugging Face hub to a local checkpoint folder."""

from pathlib import Path

import huggingface_hub

from smartdiff_jax.errors import CheckpointError

INDEX = "model_index.json"
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]  # configs, weights, tokenizers; never pickled weights


def fetch(repo_id: str, cache_dir: str | Path | None = None) -> Path:
    """Downloads (or finds in the cache) a diffusers-layout repository, and returns its folder.

    repo_id: "owner/name" on the hub. cache_dir: None is the hub's own cache.
    Raises CheckpointError with the remedy: no such repository, no access, no network, or another layout.
    """
    from huggingface_hub import errors  # brings an HTTP client, without which a model that lies here starts sooner

    try:
        # The index alone first: a repository of another layout is then refused before gigabytes are fetched.
        for patterns in ([INDEX], WANTED):
            folder = Path(huggingface_hub.snapshot_download(repo_id, cache_dir=cache_dir, allow_patterns=patterns))
            if not (folder / INDEX).is_file():
                raise CheckpointError(
                    f"{repo_id}: no {INDEX} in this repository; choose one in diffusers layout (for Wan, names ending in "
                    f"-Diffusers), or download it and run `smartdiff convert`"
                )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id}: access is restricted; accept its terms on the hub's page and log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{repo_id}: no such repository, or a private one; check the name (owner/name), or log in with `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repo_id}: could not be downloaded ({str(error).splitlines()[0]}); check the network and the disk, or give the "
            f"path of a folder downloaded elsewhere"
        ) from error
    return folder


def find_fetched(repo_id: str, cache_dir: str | Path) -> Path | None:
    """Where `fetch` has downloaded the repository to, or has begun to; the network is not asked."""
    index = huggingface_hub.try_to_load_from_cache(repo_id, INDEX, cache_dir=cache_dir)
    return Path(index).parent if isinstance(index, str) else None
