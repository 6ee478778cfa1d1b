"""Makes clip_*.npz with transformers' CLIPTextModel at tiny random sizes (run where torch and transformers are).

Called without a mask, as FLUX.1's pipeline does it, and with one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

# Two ways to find the end token: its id, or (with the 2 that CLIP-L's config.json gives) the highest id of all.
CONFIGS = {
    "clip_legacy": dict(vocab_size=50, hidden_size=24, intermediate_size=41, num_hidden_layers=3, num_attention_heads=2,
                        max_position_embeddings=19, eos_token_id=2, bos_token_id=0, pad_token_id=1),
    "clip_eos": dict(vocab_size=37, hidden_size=35, intermediate_size=20, num_hidden_layers=2, num_attention_heads=5,
                     max_position_embeddings=11, eos_token_id=9, bos_token_id=3, pad_token_id=0, layer_norm_eps=1e-6),
}  # fmt: skip
# The last id is the end token of the legacy tokenizer; padded with it, as CLIP-L is, or with another token.
END = {"clip_legacy": 49, "clip_eos": 9}
PAD = {"clip_legacy": 49, "clip_eos": 0}
# Files of transformers 4, like FLUX.1's, have the prefix; those of a model that transformers 5 made have none.
PREFIX = {"clip_legacy": "text_model.", "clip_eos": ""}
LENGTHS = {"clip_legacy": (19, (6, 19, 2)), "clip_eos": (10, (10, 7))}


def main() -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = CLIPTextModel(CLIPTextConfig(**config)).eval()
        keys = {PREFIX[name] + key: list(value.shape) for key, value in model.state_dict().items()}
        numbers = {key.removeprefix(PREFIX[name]): tiny.tensor(name, key, tuple(shape)) for key, shape in keys.items()}
        model.load_state_dict({key: torch.from_numpy(value) for key, value in numbers.items()})

        length, lengths = LENGTHS[name]
        input_ids = torch.randint(10, config["vocab_size"] - 1, (len(lengths), length))
        positions, last = torch.arange(length)[None], torch.tensor(lengths)[:, None] - 1
        input_ids = torch.where(positions == last, END[name], torch.where(positions > last, PAD[name], input_ids))
        mask = (positions <= last).long()
        with torch.no_grad():
            unmasked, masked = model(input_ids=input_ids), model(input_ids=input_ids, attention_mask=mask)
        arrays = {"config": np.array(json.dumps(model.config.to_dict())), "keys": np.array(json.dumps(keys))}
        arrays |= {"input_ids": input_ids.int().numpy(), "attention_mask": mask.int().numpy()}
        arrays |= {"unmasked": unmasked.pooler_output.numpy(), "masked": masked.pooler_output.numpy()}
        print(name, float(unmasked.pooler_output.std()))
        np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
