"""Makes qwen3_text_*.npz and qwen25_text_*.npz with transformers' Qwen3 and Qwen2.5-VL at tiny size, and what diffusers'
pipelines take of them (run where torch, transformers and diffusers are).

The tokenizers are stand-ins that return fixed ids: what they are given is in test_prompts.py. Weights are not stored:
tests/tiny.py makes the same numbers on both sides.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, QwenImagePipeline, ZImagePipeline
from safetensors import safe_open
from transformers import (
    BatchEncoding,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
WIDE = dict(
    vocab_size=61, hidden_size=20, intermediate_size=27, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, rope_parameters=dict(rope_type="default", rope_theta=1e6), rms_norm_eps=1e-6, **IDS,
)  # fmt: skip
NARROW = dict(
    vocab_size=43, hidden_size=14, intermediate_size=33, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
    head_dim=10, rope_parameters=dict(rope_type="default", rope_theta=1e4), rms_norm_eps=1e-5, **IDS,
)  # fmt: skip
VL_WIDE = dict(
    vocab_size=47, hidden_size=24, intermediate_size=31, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[1, 1, 1]), rms_norm_eps=1e-6, **IDS,
)  # fmt: skip
VL_NARROW = dict(
    vocab_size=53, hidden_size=30, intermediate_size=17, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
    rope_theta=1e4, rope_scaling=dict(type="mrope", mrope_section=[1, 2, 2]), rms_norm_eps=1e-5, **IDS,
)  # fmt: skip
VISION = dict(
    depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, window_size=8, fullatt_block_indexes=[0],
)  # fmt: skip

# Padded length and how many tokens of each prompt count.
LENGTHS = {
    "qwen3_text_wide": (13, (13, 7)),
    "qwen3_text_narrow": (17, (5, 16)),
    "qwen25_text_wide": (15, (9, 15)),
    "qwen25_text_narrow": (11, (11, 6)),
}
KLEIN_LAYERS = (3, 1, 4)
SKIP = 3


def make(name: str):
    if name == "qwen3_text_wide":
        return Qwen3ForCausalLM(Qwen3Config(**WIDE))
    if name == "qwen3_text_narrow":
        return Qwen3Model(Qwen3Config(**NARROW))
    text = VL_WIDE if name == "qwen25_text_wide" else VL_NARROW
    vision = VISION | dict(out_hidden_size=text["hidden_size"])
    special = dict(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special))


class FixedTokenizer:
    """Returns the ids it was made with, one prompt or all of them, and checks what it is asked for."""

    def __init__(self, ids, mask, asked, template=None):
        self.ids, self.mask, self.asked, self.template, self.calls = ids, mask, asked, template, 0

    def apply_chat_template(self, messages, **kwargs):
        assert kwargs == self.template, kwargs
        return messages[0]["content"]

    def __call__(self, text, **kwargs):
        assert kwargs == self.asked | dict(truncation=True, return_tensors="pt"), kwargs
        rows = slice(None) if isinstance(text, list) else slice(self.calls, self.calls + 1)
        self.calls += 1
        return BatchEncoding({"input_ids": self.ids[rows], "attention_mask": self.mask[rows]})


def pipeline_embeds(name: str, model, ids, mask) -> list[torch.Tensor]:
    """What the pipeline hands its transformer, one array a prompt."""
    prompts, length = ["one", "two"], ids.shape[1]
    padded = dict(padding="max_length", max_length=length)
    template = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    if name == "qwen3_text_wide":
        tokenizer = FixedTokenizer(ids, mask, padded, template)
        embeds = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            model, tokenizer, prompts, max_sequence_length=length, hidden_states_layers=KLEIN_LAYERS
        )
    elif name == "qwen3_text_narrow":
        tokenizer = FixedTokenizer(ids, mask, padded, template | dict(enable_thinking=True))
        pipe = SimpleNamespace(tokenizer=tokenizer, text_encoder=model)
        embeds = ZImagePipeline._encode_prompt(pipe, prompts, device=torch.device("cpu"), max_sequence_length=length)
    else:
        pipe = SimpleNamespace(
            tokenizer=FixedTokenizer(ids, mask, dict(padding=True, max_length=length)),
            text_encoder=model,
            tokenizer_max_length=length - SKIP,
            prompt_template_encode="{}",
            prompt_template_encode_start_idx=SKIP,
            _extract_masked_hidden=lambda *args: QwenImagePipeline._extract_masked_hidden(None, *args),
        )
        embeds, counts = QwenImagePipeline._get_qwen_prompt_embeds(pipe, prompts, device=torch.device("cpu"))
        embeds = [states[: int(count.sum())] for states, count in zip(embeds, counts, strict=True)]
    return list(embeds)


def saved_keys(model) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            return sorted(file.keys())


@torch.no_grad()
def main() -> None:
    for name, (length, counts) in LENGTHS.items():
        torch.manual_seed(0)
        model = make(name).eval()
        shapes = tiny.fill(model, name)
        config = json.loads(model.config.to_json_string(use_diff=False))
        arrays = {"config": np.array(json.dumps(config)), "keys": np.array(json.dumps(shapes))}
        arrays["saved_keys"] = np.array(json.dumps(saved_keys(model)))

        vocab_size = next(shape[0] for key, shape in shapes.items() if key.endswith("embed_tokens.weight"))
        mask = (torch.arange(length) < torch.tensor(counts)[:, None]).long()
        ids = torch.randint(7, vocab_size, mask.shape) * mask
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        arrays |= {"input_ids": ids.int().numpy(), "attention_mask": mask.int().numpy(), "states": torch.stack(states).numpy()}
        for row, embeds in enumerate(pipeline_embeds(name, model, ids, mask)):
            arrays[f"embeds_{row}"] = embeds.numpy()

        ids = torch.randint(7, vocab_size, (1, 131))
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
        arrays |= {"long/input_ids": ids.int().numpy(), "long/states": states[-1].numpy()}
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
