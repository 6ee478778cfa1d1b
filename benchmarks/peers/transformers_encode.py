"""The peer: transformers' text encoders of a model, as diffusers' pipeline runs them. Prints one line of JSON.

Told what to run by `benchmarks/encode.py`, as JSON (benchmarks/random_model.py: problem).
"""

import argparse
import json

import torch
import transformers
from diffusers_images import DEVICE, build, forget_peak, measured

CLASSES = {
    ("wan", "text_encoder"): ("UMT5EncoderModel", "UMT5Config"),
    ("flux1", "text_encoder"): ("CLIPTextModel", "CLIPTextConfig"),
    ("flux1", "text_encoder_2"): ("T5EncoderModel", "T5Config"),
    ("flux2-klein", "text_encoder"): ("Qwen3ForCausalLM", "Qwen3Config"),
    ("qwen-image", "text_encoder"): ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"),
    ("z-image", "text_encoder"): ("Qwen3Model", "Qwen3Config"),
}


class TextEncoders:
    """All text encoders of a task in place, random weights."""

    def __init__(self, task: dict):
        self.modules, self.lengths = {}, task["text"]
        for name in self.lengths:
            model, config = CLASSES[task["family"], name]
            numbers = task["components"][name]
            if config in ("T5Config", "UMT5Config"):
                numbers = numbers | {"feed_forward_proj": "gated-gelu"}
            if config == "Qwen2_5_VLConfig":
                numbers = {"text_config": numbers, "vision_config": {"depth": 1}}  # which text alone does not use
            self.modules[name] = build(getattr(transformers, model), {"config": getattr(transformers, config)(**numbers)})

    def __call__(self) -> dict[str, torch.Tensor]:
        """The states of one prompt by encoder; of language models those of one of the layers the pipeline takes."""
        found = {}
        for name, module in self.modules.items():
            ids = torch.ones(1, self.lengths[name], dtype=torch.long, device=DEVICE)
            kind = type(module).__name__
            masked = kind not in ("CLIPTextModel", "T5EncoderModel")
            told = {"input_ids": ids} | ({"attention_mask": ids} if masked else {})
            if kind.startswith("Qwen"):
                found[name] = module(**told, output_hidden_states=True, **({"use_cache": False} if "Qwen3" in kind else {}))
                found[name] = found[name].hidden_states[-2]
            elif kind == "CLIPTextModel":
                found[name] = module(**told).pooler_output
            else:
                found[name] = module(**told).last_hidden_state
        return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", type=json.loads)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    encoders = TextEncoders(arguments.task)
    forget_peak()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "encode": measured(encoders, arguments.repeats)}))


if __name__ == "__main__":
    main()
