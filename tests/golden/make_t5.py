"""Makes t5_*.npz with transformers' T5EncoderModel at tiny random sizes (run where torch and transformers are).

Every batch is encoded twice: with a mask, and without one as FLUX.1's pipeline does it, padding and all.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

BASE = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
# d_model, d_kv * num_heads and d_ff differ from each other; the wide one's text is longer than its farthest bucket.
CONFIGS = {
    "t5_narrow": dict(BASE, vocab_size=40, d_model=24, d_kv=10, d_ff=37, num_layers=3, num_heads=2,
                      relative_attention_num_buckets=8, relative_attention_max_distance=12),
    "t5_wide": dict(BASE, vocab_size=61, d_model=30, d_kv=6, d_ff=44, num_layers=2, num_heads=7, layer_norm_epsilon=1e-5),
}  # fmt: skip
LENGTHS = {"t5_narrow": (23, (23, 9)), "t5_wide": (151, (70, 151, 1))}


def main() -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = T5EncoderModel(T5Config(**config)).eval()
        # The embedding is one tensor under two names; a file has this one.
        keys = {key: list(value.shape) for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}
        numbers = {key: torch.from_numpy(tiny.tensor(name, key, tuple(shape))) for key, shape in keys.items()}
        model.load_state_dict(numbers | {"encoder.embed_tokens.weight": numbers["shared.weight"]})
        arrays = {"config": np.array(json.dumps(model.config.to_dict())), "keys": np.array(json.dumps(keys))}

        length, lengths = LENGTHS[name]
        input_ids = torch.randint(2, config["vocab_size"], (len(lengths), length))
        mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
        input_ids = torch.where(mask, input_ids, 0)
        with torch.no_grad():
            masked = model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
            unmasked = model(input_ids=input_ids).last_hidden_state
        arrays |= {"input_ids": input_ids.int().numpy(), "attention_mask": mask.int().numpy()}
        arrays |= {"masked": masked.numpy(), "unmasked": unmasked.numpy()}
        print(name, {key: float(value.std()) for key, value in (("masked", masked), ("unmasked", unmasked))})
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
