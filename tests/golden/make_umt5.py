"""Makes umt5.npz with transformers' UMT5EncoderModel at tiny random size (run where torch and transformers are).

Weights are rounded to float16 before the reference runs, so that storing them as float16 is exact. The position buckets
of the real size (32 buckets, 512 tokens) are stored too: their edges depend on rounding.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import UMT5Config, UMT5EncoderModel

HERE = Path(__file__).parent
CONFIG = dict(
    vocab_size=40,
    d_model=24,
    d_kv=10,
    d_ff=37,
    num_layers=3,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)


def main() -> None:
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(**CONFIG)).eval()
    arrays = {"config": np.array(json.dumps(model.config.to_dict()))}
    for key, parameter in model.named_parameters():
        scale = 1.0 if "bias" in key or "shared" in key else 0.1 if ".q." in key else 0.3
        offset = 1.0 if "norm" in key else 0.0
        half = (offset + scale * torch.randn_like(parameter)).half()
        parameter.data = half.float()
        arrays[f"weight/{key}"] = half.numpy()

    input_ids = torch.randint(1, CONFIG["vocab_size"], (2, 23))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 9:] = 0
    attention_mask[1, 9:] = 0
    with torch.no_grad():
        states = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    arrays |= {"input_ids": input_ids.int().numpy(), "attention_mask": attention_mask.int().numpy()}
    arrays["states"] = states.numpy()

    real = UMT5EncoderModel(UMT5Config(**CONFIG | dict(relative_attention_num_buckets=32, relative_attention_max_distance=128)))
    attention = real.encoder.block[0].layer[0].SelfAttention
    arrays["buckets"] = attention._relative_position_bucket(torch.arange(-511, 512)).int().numpy()
    np.savez_compressed(HERE / "umt5.npz", **arrays)


if __name__ == "__main__":
    main()
