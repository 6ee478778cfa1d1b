"""A tiny Wan checkpoint folder in diffusers layout, the same bytes wherever it is written.

Shared by the tests and by golden/make_pipeline.py, which loads the very same folder with diffusers; so only outputs need to be
stored. The numbers come from RandomState, whose streams NumPy promises never to change.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

KEYS = Path(__file__).parent / "golden" / "tiny_keys.json"
PROMPT = "a red fox jumps over the lazy dog"
WORDS = "a an the red green blue fox dog cat jumps runs over under lazy quick on in".split()

TRANSFORMER = dict(
    patch_size=[1, 2, 2], num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6,
    image_dim=None, added_kv_proj_dim=None, rope_max_seq_len=1024, pos_embed_seq_len=None,
)  # fmt: skip
VAE = dict(
    base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, attn_scales=[], temperal_downsample=[False, True, True],
    dropout=0.0, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.8, 1.1],
)  # fmt: skip
TEXT = dict(
    vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, relative_attention_num_buckets=32,
    relative_attention_max_distance=128, layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    pad_token_id=0, eos_token_id=1, tie_word_embeddings=False, is_encoder_decoder=True,
)  # fmt: skip
CONFIGS = {"transformer": TRANSFORMER, "transformer_2": TRANSFORMER, "vae": VAE, "text_encoder": TEXT}
CLASSES = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
}
SCHEDULER = dict(
    _class_name="UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2,
    solver_type="bh2", num_train_timesteps=1000, final_sigmas_type="zero", lower_order_final=True,
)  # fmt: skip


def tensor(component: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that keep activations of order one: norms near 1, weights ~ 1 / sqrt(fan in)."""
    rng = np.random.RandomState(zlib.crc32(f"{component}/{key}".encode()))
    noise = rng.standard_normal(shape).astype(np.float32)
    is_norm = "norm" in key and key.endswith("weight") or key.endswith(("gamma", "layer_norm.weight"))
    if is_norm and len(shape) == 1:
        return 1.0 + 0.1 * noise
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 and "scale_shift" not in key else 25
    return noise / np.sqrt(fan_in).astype(np.float32)


def fill(module, name: str) -> dict[str, list[int]]:
    """Give a torch module's floating-point parameters and buffers the numbers of `tensor`; returns {checkpoint key: shape}."""
    shapes = {}
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            numbers = tensor(name, key, tuple(value.shape))
            value.copy_(value.new_tensor(np.abs(numbers) if key.endswith("running_var") else numbers))
            shapes[key] = list(value.shape)
    return shapes


def write_folder(path: Path, *, two_experts: bool = False, flow_shift: float = 3.0, keys: dict | None = None) -> Path:
    """Write the folder and return it. `keys` maps component to {checkpoint key: shape}."""
    keys = keys or json.loads(KEYS.read_text())
    index: dict = {"_class_name": "WanPipeline", "_diffusers_version": "0.42.1"}
    if two_experts:
        index["boundary_ratio"] = 0.875
    for component, entry in CLASSES.items():
        if component == "transformer_2" and not two_experts:
            index[component] = [None, None]
            continue
        index[component] = entry
        folder = path / component
        folder.mkdir(parents=True)
        if component == "scheduler":
            (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | {"flow_shift": flow_shift}))
        elif component == "tokenizer":
            tiny_tokenizer().save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast"}))
        else:
            class_name = {"_class_name": entry[1]} if entry[0] == "diffusers" else {"model_type": "umt5"}
            (folder / "config.json").write_text(json.dumps(class_name | CONFIGS[component]))
            name = "model" if component == "text_encoder" else "diffusion_pytorch_model"
            shapes = keys["transformer" if component == "transformer_2" else component]
            save_file(
                {key: tensor(component, key, tuple(shape)) for key, shape in shapes.items()},
                folder / f"{name}.safetensors",
                metadata={"format": "pt"},
            )
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def tiny_tokenizer() -> Tokenizer:
    """Words of WORDS, <unk> for others, </s> appended."""
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: index + 3 for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Latents [1, 4, f, h, w] for a clip of that many pixels."""
    shape = (1, VAE["z_dim"], (frames - 1) // 4 + 1, height // 8, width // 8)
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


CASES = {
    "clip": dict(two_experts=False, flow_shift=3.0, size=(48, 32), num_frames=5, num_inference_steps=5, guidance_scale=5.0),
    "still": dict(two_experts=False, flow_shift=8.0, size=(32, 48), num_frames=1, num_inference_steps=2, guidance_scale=1.0),
    "experts": dict(
        two_experts=True, flow_shift=12.0, size=(32, 32), num_frames=9, num_inference_steps=6, guidance_scale=4.0,
        guidance_scale_2=3.0,
    ),
}  # fmt: skip


def with_default(spec, width: int, height: int, num_frames: int):
    """The spec of a model whose default request is so small."""
    fields = {"width": width, "height": height, "num_frames": num_frames}
    return spec.model_copy(update={"sampling": spec.sampling.model_copy(update=fields)})
