"""A checkpoint folder in diffusers layout: what is in it and where, without reading a single weight.

model_index.json                 {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"], ...}
transformer/config.json          numbers of the architecture
transformer/diffusion_pytorch_model.safetensors            or shards named by *.safetensors.index.json
text_encoder/model.safetensors   transformers' name for the same
scheduler/scheduler_config.json, tokenizer/tokenizer.json  no weights
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights import quantized
from smartdiff_jax.weights.tensor_file import Tensor, read_header, sample_digest

WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
CONFIG_NAMES = ("config.json", "scheduler_config.json", "tokenizer_config.json")
ORIGINAL_WAN = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "high_noise_model")


@dataclasses.dataclass(frozen=True)
class Component:
    """One folder of a checkpoint.

    config: its config.json (or scheduler_config.json, tokenizer_config.json), {} where it has none.
    files: its safetensors files, none for a scheduler or a tokenizer.
    """

    name: str
    library: str
    class_name: str
    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def fingerprint(self) -> str:
        """Digest of the files' headers and of bytes all over them: other weights have another, a copy has the same."""
        return sample_digest(self.files)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the component by its checkpoint key; headers are read here, numbers when asked for.

        Raises CheckpointError where there is no file, one is damaged, or two hold the same key.
        """
        if not self.files:
            raise CheckpointError(f"{self.path}: no safetensors files in it; download the repository's")
        found: dict[str, Tensor] = {}
        index = _read_index(self.path)
        for file in self.files:
            tensors, metadata = read_header(file)
            if index is not None:
                lost = [key for key, name in index.items() if name == file.name and key not in tensors]
                if lost:
                    raise CheckpointError(f"{file}: the index promises {lost[0]!r} in it; download the file again")
            twice = found.keys() & tensors.keys()
            if twice:
                raise CheckpointError(f"{file}: {min(twice)!r} is in another file of {self.path} too; keep only one set")
            packed = metadata.get("format") == quantized.FORMAT
            found |= quantized.dequantized(tensors, metadata) if packed else tensors
        return found


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint folder whose index has been read and whose files are all there.

    settings: the entries of model_index.json that are no components, for example boundary_ratio.
    """

    path: Path
    pipeline_class: str
    components: dict[str, Component]
    settings: dict[str, Any]

    def component(self, name: str) -> Component | None:
        """A component, or None where the checkpoint does without it."""
        return self.components.get(name)

    def require(self, name: str) -> Component:
        """A component without which nothing runs. Raises CheckpointError."""
        if name not in self.components:
            raise CheckpointError(
                f"{self.path}: model_index.json has no {name!r} (it has {', '.join(self.components)}); "
                f"choose a folder of a whole pipeline"
            )
        return self.components[name]


def open_folder(path: str | Path) -> CheckpointFolder:
    """Reads model_index.json and the components' configs, and checks that every file they name is there.

    Raises CheckpointError with the remedy where it is not such a folder.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give the folder that holds model_index.json")
    if not (path / "model_index.json").is_file():
        raise CheckpointError(_not_a_pipeline(path))
    index = _read_json(path / "model_index.json")
    components, settings = {}, {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2:
            if entry[0] is not None and entry[1] is not None:
                components[name] = _open_component(path / name, name, str(entry[0]), str(entry[1]))
        elif not name.startswith("_"):
            settings[name] = entry
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise CheckpointError(f"{path / 'model_index.json'}: no _class_name; download the file again")
    return CheckpointFolder(path, pipeline_class, components, settings)


def _not_a_pipeline(path: Path) -> str:
    if any((path / name).exists() for name in ORIGINAL_WAN):
        return (
            f"{path}: this is the original Wan release, not a diffusers folder; "
            f"run `smartdiff convert {path} NEW_FOLDER` once and use NEW_FOLDER"
        )
    inner = sorted(child.name for child in path.iterdir() if (child / "model_index.json").is_file())
    hint = f"give {path / inner[0]}" if inner else "give the folder that holds it, or download the whole repository"
    return f"{path}: no model_index.json, so not a checkpoint in diffusers layout; {hint}"


def _open_component(path: Path, name: str, library: str, class_name: str) -> Component:
    if not path.is_dir():
        raise CheckpointError(f"{path}: model_index.json names {name!r} but the folder is missing; download it")
    config_file = next((path / n for n in CONFIG_NAMES if (path / n).is_file()), None)
    config = _read_json(config_file) if config_file else {}
    return Component(name, library, class_name, path, config, _weight_files(path))


def _weight_files(path: Path) -> tuple[Path, ...]:
    """The safetensors files of a component, in a stable order."""
    index = _read_index(path)
    if index is not None:
        files = tuple(path / name for name in sorted(set(index.values())))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{path}: the index names {', '.join(missing)}, not found; download what is missing")
        return files
    for name in WEIGHT_NAMES:
        if (path / f"{name}.safetensors").is_file():
            return (path / f"{name}.safetensors",)
    others = sorted(path.glob("*.safetensors"))
    if len(others) > 1:
        raise CheckpointError(
            f"{path}: {len(others)} safetensors files and no *.safetensors.index.json saying which to read; "
            f"download the index, or keep one file"
        )
    pickled = sorted([*path.glob("*.bin"), *path.glob("*.pth"), *path.glob("*.pt"), *path.glob("*.ckpt")])
    if not others and pickled:
        raise CheckpointError(f"{path}: weights only as {pickled[0].name}; download the repository's safetensors files")
    return tuple(others)


def _read_index(path: Path) -> dict[str, str] | None:
    """Checkpoint key to file name, where the component is sharded."""
    for name in WEIGHT_NAMES:
        file = path / f"{name}.safetensors.index.json"
        if file.is_file():
            weight_map = _read_json(file).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{file}: no weight_map; download the file again")
            for shard in weight_map.values():
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise CheckpointError(f"{file}: {shard!r} is not the name of a file beside it; download it again")
            return weight_map
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a table; download the file again")
    return content
