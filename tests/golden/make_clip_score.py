"""CLIP scores by transformers' CLIPModel, its image processor and its tokenizer, tiny random weights.

python tests/golden/make_clip_score.py     writes clip_score.json; weights and pictures are drawn anew by whoever reads it
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CONFIG = {
    "text_config": dict(
        vocab_size=600, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, eos_token_id=2,
    ),
    "vision_config": dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=8,
        hidden_act="gelu",
    ),
    "projection_dim": 16,
}  # fmt: skip
CASES = [(0, 60, 80, 12.0, "a red fox"), (1, 75, 50, 40.0, "a dog on a blue background, moving left"), (2, 48, 48, 3.0, "")]
"""seed, height, width and noise of a picture, and its prompt."""


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Scales of norms about 1, all else small enough that attention has a choice."""
    random = np.random.default_rng(seed)
    drawn = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: 1 + 0.1 * x if "norm" in name and name.endswith("weight") else 0.2 * x for name, x in drawn.items()}


def main() -> None:
    import torch
    from make_metrics import pair
    from tokenizers import Tokenizer
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = Tokenizer.from_file(str(HERE / "tokenizers" / "clip" / "tokenizer.json"))
    tokenizer.no_padding()
    size = max(tokenizer.get_vocab().values()) + 1
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"vocab_size": size}}
    model = CLIPModel(CLIPConfig(**config)).eval()
    state = {key: value for key, value in model.state_dict().items() if value.dtype == torch.float32}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    missing = model.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights(shapes).items()}, strict=False)
    assert not missing.unexpected_keys
    side = CONFIG["vision_config"]["image_size"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    values = []
    for *case, prompt in CASES:
        pixels = processor(images=pair(*case)[1], return_tensors="pt")["pixel_values"]
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=pixels)
        values.append(100 * float((out.image_embeds * out.text_embeds).sum()))
    told = {"config": config, "shapes": {key: list(shape) for key, shape in shapes.items()}, "values": values}
    (HERE / "clip_score.json").write_text(json.dumps(told) + "\n")
    print(values)


if __name__ == "__main__":
    main()
