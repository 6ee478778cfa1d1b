"""The original Wan text-to-video release to a folder in diffusers layout.

    Wan2.1-T2V-*      config.json  diffusion_pytorch_model*.safetensors        -> transformer/
    Wan2.2-T2V-A14B   high_noise_model/  low_noise_model/  (as above, each)    -> transformer/  transformer_2/
    both              models_t5_umt5-xxl-enc-bf16.pth                          -> text_encoder/
                      Wan2.1_VAE.pth                                           -> vae/
                      google/umt5-xxl/                                         -> tokenizer/

What diffusers' scripts/convert_wan_to_diffusers.py does, without diffusers: names change (`wan_keys`), numbers and their dtype
do not. Every key and shape is checked before a byte is written; one tensor is in memory at a time; the target appears whole or
not at all. A `.pth` is a pickle and needs PyTorch to be read; a `.safetensors` file of the same name is taken instead.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.models.families import WAN
from smartdiff_jax.models.vae.wan_vae import WanVAEConfig
from smartdiff_jax.weights import pickled, stream, wan_keys
from smartdiff_jax.weights.tensor_file import Tensor, read_header, write

DIFFUSERS_VERSION = "0.35.0"  # whose layout is written
BOUNDARY_RATIO = 0.875  # of Wan2.2-T2V-A14B: the high-noise expert serves timesteps from 875 up
VAE_FIELDS = {"attn_scales", "base_dim", "dim_mult", "dropout", "latents_mean", "latents_std"}
VAE_FIELDS |= {"num_res_blocks", "temperal_downsample", "z_dim"}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One component to be written: its config and, by output file, its tensors under their new names."""

    config: dict[str, Any]
    files: dict[str, dict[str, Tensor]]

    def tensors(self) -> dict[str, Tensor]:
        return {key: tensor for tensors in self.files.values() for key, tensor in tensors.items()}


def convert(source: str | Path, target: str | Path, on_file: Callable[[str], None] = lambda name: None) -> Path:
    """Writes `target`, a folder in diffusers layout, from an original Wan2.1 or Wan2.2 text-to-video release.

    on_file: called with the name of each file about to be written, for progress.
    Raises CheckpointError, with nothing written, where the source is incomplete, damaged, another model, or does not fit; where
    the target exists; and where a .pth must be read without PyTorch.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give the folder of the original Wan release")
    if (source / "model_index.json").is_file():
        raise CheckpointError(f"{source}: already in diffusers layout; use it as it is")
    if target.exists():
        raise CheckpointError(f"{target}: already exists; choose a new folder, or remove it first")
    experts = {"transformer": source / "high_noise_model", "transformer_2": source / "low_noise_model"}
    two_experts = any(folder.is_dir() for folder in experts.values())
    transformers = experts if two_experts else {"transformer": source}
    tokenizer = source / "google" / "umt5-xxl"
    if not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(f"{tokenizer / 'tokenizer.json'}: not found; download the whole release")

    parts = {name: _transformer(folder) for name, folder in transformers.items()}
    parts["text_encoder"] = _text_encoder(pickled.read(source / "models_t5_umt5-xxl-enc-bf16.pth"))
    parts["vae"] = _vae(pickled.read(source / "Wan2.1_VAE.pth"))
    for name, part in parts.items():
        _check(name, part)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as work:
        folder = Path(work) / target.name
        for name, part in parts.items():
            _write_part(folder / name, part, on_file)
        shutil.copytree(tokenizer, folder / "tokenizer")
        _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
        _write_json(folder / "model_index.json", _model_index(two_experts))
        os.rename(folder, target)
    return target


def _transformer(folder: Path) -> Part:
    config_file = folder / "config.json"
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not config_file.is_file() or not files:
        raise CheckpointError(f"{folder}: no config.json with diffusion_pytorch_model*.safetensors; download the whole release")
    _check_shards(folder, files)
    try:
        original = json.loads(config_file.read_text())
        model_type = original["model_type"]
        numbers = {key: original[key] for key in ("dim", "num_heads", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_layers")}
        eps = original["eps"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{config_file}: not the config of an original Wan model ({error!r}); download it again"
        ) from error
    if model_type != "t2v":
        raise CheckpointError(f"{config_file}: model_type={model_type!r}; only text-to-video (t2v) can be converted")

    headers = {file: read_header(file)[0] for file in files}
    tensors = {key: tensor for header in headers.values() for key, tensor in header.items()}
    names = _rename(folder, tensors, wan_keys.TRANSFORMER)
    patch, text = tensors.get("patch_embedding.weight"), tensors.get("text_embedding.0.weight")
    if patch is None or text is None:
        raise CheckpointError(f"{folder}: no patch_embedding.weight or text_embedding.0.weight; download the whole release")
    config = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "added_kv_proj_dim": None,
        "attention_head_dim": numbers["dim"] // numbers["num_heads"],
        "cross_attn_norm": True,
        "eps": eps,
        "ffn_dim": numbers["ffn_dim"],
        "freq_dim": numbers["freq_dim"],
        "image_dim": None,
        "in_channels": numbers["in_dim"],
        "num_attention_heads": numbers["num_heads"],
        "num_layers": numbers["num_layers"],
        "out_channels": numbers["out_dim"],
        "patch_size": list(patch.shape[2:]),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": text.shape[-1],
    }
    return Part(config, {f.name: {names[key]: tensor for key, tensor in headers[f].items()} for f in files})


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Shards say how many they are in their own names; a missing one is better named than its thousand tensors."""
    counts = {match[1] for file in files if (match := re.search(r"-of-(\d+)\.safetensors$", file.name))}
    if counts and (len(counts) > 1 or len(files) != int(min(counts))):
        raise CheckpointError(f"{folder}: {len(files)} shards of {'/'.join(sorted(counts))}; download what is missing")


def _text_encoder(tensors: Mapping[str, Tensor]) -> Part:
    names = _rename("the text encoder", tensors, wan_keys.TEXT_ENCODER)
    layers = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")}
    try:
        vocab_size, d_model = tensors["token_embedding.weight"].shape
        buckets, num_heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
        inner, d_ff = tensors["blocks.0.attn.q.weight"].shape[0], tensors["blocks.0.ffn.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the text encoder's weights are not Wan's UMT5 ({error!r}); download them again") from error
    config = {
        "architectures": ["UMT5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": d_ff,
        "d_kv": inner // num_heads,
        "d_model": d_model,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "umt5",
        "num_decoder_layers": len(layers),
        "num_heads": num_heads,
        "num_layers": len(layers),
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "scalable_attention": True,
        "tie_word_embeddings": False,
        "torch_dtype": str(tensors["token_embedding.weight"].dtype),
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    return Part(config, {"model.safetensors": {names[key]: tensor for key, tensor in tensors.items()}})


def _vae(tensors: Mapping[str, Tensor]) -> Part:
    names = _rename("the VAE", tensors, wan_keys.VAE)
    if "encoder.conv1.weight" not in tensors or "conv2.weight" not in tensors:
        raise CheckpointError("the VAE's weights are not Wan's; download Wan2.1_VAE.pth again")
    z_dim = tensors["conv2.weight"].shape[0]
    if z_dim != WanVAEConfig().z_dim:
        raise CheckpointError(
            f"the VAE has {z_dim} latent channels; only Wan2.1's, of {WanVAEConfig().z_dim}, can be converted"
        )
    numbers = WanVAEConfig(base_dim=tensors["encoder.conv1.weight"].shape[0])  # all else is the same in every release
    config = {"_class_name": "AutoencoderKLWan", "_diffusers_version": DIFFUSERS_VERSION}
    config |= numbers.model_dump(mode="json", include=VAE_FIELDS)
    return Part(config, {"diffusion_pytorch_model.safetensors": {names[key]: tensor for key, tensor in tensors.items()}})


def _rename(what: str | Path, tensors: Mapping[str, Tensor], table: list) -> dict[str, str]:
    names, unknown = wan_keys.renamed(tensors, table)
    if unknown:
        more = f" and {len(unknown) - stream.MAX_LISTED} more" if len(unknown) > stream.MAX_LISTED else ""
        listed = ", ".join(sorted(unknown)[: stream.MAX_LISTED])
        raise CheckpointError(f"{what}: keys that no Wan text-to-video model has: {listed}{more}; use the original release")
    return names


def _check(name: str, part: Part) -> None:
    architecture = WAN.architectures[name]
    try:
        config = architecture.config.model_validate(part.config)
    except ValidationError as error:
        raise CheckpointError(f"{name}: its numbers are not a Wan text-to-video model's ({error})") from error
    stream.check(architecture, config, part.tensors(), where=name)


def _model_index(two_experts: bool) -> dict[str, Any]:
    transformer = ["diffusers", "WanTransformer3DModel"]
    index: dict[str, Any] = {"_class_name": "WanPipeline", "_diffusers_version": DIFFUSERS_VERSION}
    if two_experts:
        index["boundary_ratio"] = BOUNDARY_RATIO
    return index | {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "transformer_2": transformer if two_experts else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def _write_part(folder: Path, part: Part, on_file: Callable[[str], None]) -> None:
    _write_json(folder / "config.json", part.config)
    for name, tensors in part.files.items():
        on_file(f"{folder.name}/{name}")
        write(folder / name, tensors, metadata={"format": "pt"})
    if len(part.files) > 1:
        total = sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in part.tensors().values())
        weight_map = {key: name for name, tensors in part.files.items() for key in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
