"""Tiny checkpoint folders of the image families, the same bytes wherever they are written; see tiny.py.

golden/make_image_pipelines.py loads the very same folders with diffusers' pipelines and keeps what they give.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
KEYS = GOLDEN / "tiny_image_keys.json"
TOKENIZERS = GOLDEN / "tokenizers"
PROMPT = "a red fox jumps over the lazy dog"
NEGATIVE = "blurry, low quality"
CHAT_TEMPLATE = (  # what Qwen3's comes down to for one message of the user
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)

KL = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3, block_out_channels=[8, 8, 16, 16], layers_per_block=1,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
    norm_num_groups=4, sample_size=64, act_fn="silu", scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False,
    use_post_quant_conv=False, mid_block_add_attention=True, force_upcast=True,
)  # fmt: skip
NOT_OF_FLUX2 = ("scaling_factor", "shift_factor", "force_upcast")
QWEN3 = dict(
    model_type="qwen3", hidden_act="silu", hidden_size=16, intermediate_size=24, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-6, max_position_embeddings=2048, attention_bias=False,
    tie_word_embeddings=True, use_sliding_window=False, rope_theta=1000000.0,
)  # fmt: skip
EULER = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000)
LINEAR = EULER | dict(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, base_shift=0.5, max_shift=1.15)

# family: (pipeline class, {component: (library, class, config)}, {tokenizer: (class, kind)}, scheduler, settings of the index)
FAMILIES = {
    "flux1": dict(
        pipeline="FluxPipeline",
        scheduler=LINEAR,
        tokenizers={"tokenizer": "clip", "tokenizer_2": "t5"},
        components={
            "transformer": ("diffusers", dict(
                _class_name="FluxTransformer2DModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=2,
                attention_head_dim=12, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12,
                guidance_embeds=True, axes_dims_rope=[4, 4, 4],
            )),
            "text_encoder": ("transformers", dict(
                _class_name="CLIPTextModel", model_type="clip_text_model", hidden_size=12, intermediate_size=24,
                num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=77, hidden_act="quick_gelu",
                layer_norm_eps=1e-5, projection_dim=12,
            )),
            "text_encoder_2": ("transformers", dict(
                _class_name="T5EncoderModel", model_type="t5", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
                feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_gated_act=True, dropout_rate=0.0,
                tie_word_embeddings=False,
            )),
            "vae": ("diffusers", KL),
        },
    ),
    "flux2-klein": dict(
        pipeline="Flux2KleinPipeline",
        scheduler=EULER | dict(use_dynamic_shifting=True, shift=3.0),
        tokenizers={"tokenizer": "qwen2"},
        settings={"is_distilled": True},
        components={
            "transformer": ("diffusers", dict(
                _class_name="Flux2Transformer2DModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=2,
                attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48, mlp_ratio=3.0,
                axes_dims_rope=[4, 4, 4, 4], rope_theta=2000, guidance_embeds=False, timestep_guidance_channels=16,
            )),
            "text_encoder": ("transformers", dict(QWEN3, _class_name="Qwen3ForCausalLM", num_hidden_layers=28)),
            "vae": ("diffusers", {name: KL[name] for name in KL if name not in NOT_OF_FLUX2} | dict(
                _class_name="AutoencoderKLFlux2", use_quant_conv=True, use_post_quant_conv=True, batch_norm_eps=1e-4,
                patch_size=[2, 2],
            )),
        },
    ),
    "qwen-image": dict(
        pipeline="QwenImagePipeline",
        scheduler=LINEAR | dict(shift_terminal=0.02, max_shift=0.9),
        tokenizers={"tokenizer": "qwen2"},
        components={
            "transformer": ("diffusers", dict(
                _class_name="QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=2,
                attention_head_dim=12, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=[4, 4, 4],
                guidance_embeds=False,
            )),
            "text_encoder": ("transformers", dict(
                _class_name="Qwen2_5_VLForConditionalGeneration", model_type="qwen2_5_vl", tie_word_embeddings=False,
                text_config=dict(
                    model_type="qwen2_5_vl_text", hidden_act="silu", hidden_size=16, intermediate_size=24,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6,
                    max_position_embeddings=2048, use_sliding_window=False, rope_theta=1000000.0,
                    rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2]),
                ),
                vision_config=dict(
                    model_type="qwen2_5_vl", depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16,
                    fullatt_block_indexes=[0],
                ),
            )),
            "vae": ("diffusers", dict(
                _class_name="AutoencoderKLQwenImage", base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
                attn_scales=[], temperal_downsample=[False, True, True], dropout=0.0, latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 2.0, 0.8, 1.1],
            )),
        },
    ),
    "z-image": dict(
        pipeline="ZImagePipeline",
        scheduler=EULER | dict(shift=3.0),
        tokenizers={"tokenizer": "qwen2"},
        components={
            "transformer": ("diffusers", dict(
                _class_name="ZImageTransformer2DModel", all_patch_size=[2], all_f_patch_size=[1], in_channels=4, dim=24,
                n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16,
                rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 4, 4], axes_lens=[1536, 64, 64],
            )),
            "text_encoder": ("transformers", dict(QWEN3, _class_name="Qwen3Model", num_hidden_layers=3)),
            "vae": ("diffusers", KL),
        },
    ),
}  # fmt: skip

# Guidance on and off, square and not, token counts that divide by nothing.
CASES = {
    "flux1": [dict(size=(48, 32), num_inference_steps=4, guidance_scale=3.5), dict(size=(80, 48), num_inference_steps=2)],
    "flux2-klein": [dict(size=(48, 48), num_inference_steps=4), dict(size=(80, 48), num_inference_steps=2)],
    "qwen-image": [
        dict(size=(48, 48), num_inference_steps=4, guidance_scale=4.0),
        dict(size=(80, 48), num_inference_steps=3, guidance_scale=1.0),
    ],
    "z-image": [
        dict(size=(48, 48), num_inference_steps=4, guidance_scale=4.0),
        dict(size=(112, 80), num_inference_steps=3, guidance_scale=0.0),
    ],
}  # fmt: skip


def vocabulary(kind: str) -> int:
    tokenizer = json.loads((TOKENIZERS / kind / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    highest = len(vocab) if isinstance(vocab, list) else max(vocab.values()) + 1
    return max([highest, *(token["id"] + 1 for token in tokenizer["added_tokens"])])


def config_of(family: str, component: str) -> dict:
    """As it is written to the component's config.json."""
    entry = FAMILIES[family]
    library, config = entry["components"][component]
    if library == "diffusers":
        return config
    config = {name: value for name, value in config.items() if name != "_class_name"}
    kind = entry["tokenizers"]["tokenizer_2" if component == "text_encoder_2" else "tokenizer"]
    size = {"vocab_size": vocabulary(kind)}
    if kind == "clip":
        tokens = json.loads((TOKENIZERS / kind / "tokenizer.json").read_text())["model"]["vocab"]
        size |= {"bos_token_id": tokens["<|startoftext|>"], "eos_token_id": tokens["<|endoftext|>"]}
    return config | {"text_config": config["text_config"] | size} if "text_config" in config else config | size


def write_folder(path: Path, family: str, keys: dict | None = None) -> Path:
    """Write the folder and return it. `keys` maps family/component to {checkpoint key: shape}."""
    keys = keys or json.loads(KEYS.read_text())
    entry = FAMILIES[family]
    index: dict = {"_class_name": entry["pipeline"], "_diffusers_version": "0.42.1", **entry.get("settings", {})}
    for component, (library, config) in entry["components"].items():
        index[component] = [library, config["_class_name"]]
        folder = path / component
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config_of(family, component)))
        name = "model" if library == "transformers" else "diffusion_pytorch_model"
        shapes = keys[f"{family}/{component}"]
        save_file({key: tensor(family, component, key, shape) for key, shape in shapes.items()}, folder / f"{name}.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
    for tokenizer, kind in entry["tokenizers"].items():
        index[tokenizer] = ["transformers", {"clip": "CLIPTokenizer", "t5": "T5TokenizerFast", "qwen2": "Qwen2Tokenizer"}[kind]]
        shutil.copytree(TOKENIZERS / kind, path / tokenizer)
        if kind == "qwen2":
            file = path / tokenizer / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(entry["scheduler"]))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def tensor(family: str, component: str, key: str, shape: list[int]) -> np.ndarray:
    if key.endswith("num_batches_tracked"):
        return np.array(1, np.int64)
    numbers = tiny.tensor(f"{family}/{component}", key, tuple(shape))
    return np.abs(numbers) if key.endswith("running_var") else numbers


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Latents [1, 4, h, w] of a picture of that (width, height)."""
    width, height = size
    return np.random.RandomState(seed).standard_normal((1, 4, height // 8, width // 8)).astype(np.float32)
