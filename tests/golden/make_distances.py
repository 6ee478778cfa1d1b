"""LPIPS by the `lpips` package 0.1.4 and FID's formula by torchmetrics 1.9, in an environment of their own.

python tests/golden/make_distances.py     writes distances.json; weights and features are drawn anew by whoever reads it
"""

import json
from pathlib import Path

import numpy as np
from make_metrics import pair

CASES = [(0, 64, 64, 12.0), (1, 75, 90, 40.0)]
FEATURES = [(0, 40, 30, 8), (1, 300, 200, 16), (2, 12, 9, 24)]
"""seed, rows of the one set and of the other, numbers a row; the last has fewer rows than numbers: covariances are singular."""


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random ones for a network that keeps its activations in size, and heads that are positive, as trained ones are."""
    random = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32)
        if name.startswith("lin"):
            found[name] = np.abs(values)
        else:
            found[name] = values * np.float32(np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.05)
    return found


def features(seed: int, rows: int, others: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mix = random.standard_normal((width, width))
    return random.standard_normal((rows, width)) @ mix, random.standard_normal((others, width)) @ mix * 0.8 + 0.3


def main() -> None:
    import lpips
    import torch
    from torchmetrics.image.fid import _compute_fid

    found: dict = {"lpips": {}, "fid": []}
    for name in ("alex", "vgg"):
        model = lpips.LPIPS(net=name, pretrained=False, pnet_rand=True, verbose=False)
        # The package numbers a network's layers as torchvision does, and puts slices around them.
        own = {key: tuple(value.shape) for key, value in model.state_dict().items() if key.startswith(("net.", "lin"))}
        own = {key: shape for key, shape in own.items() if not key.startswith("lins.")}
        keys = {".".join(["features", *key.split(".")[2:]]) if key.startswith("net.") else key: key for key in own}
        shapes = {ours: own[key] for ours, key in keys.items()}
        state = {keys[ours]: torch.from_numpy(value) for ours, value in weights(shapes).items()}
        model.load_state_dict(state, strict=False)
        found["lpips"][name] = {"shapes": shapes, "values": []}
        for case in CASES:
            tensors = [torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in pair(*case)]
            with torch.no_grad():
                found["lpips"][name]["values"].append(model(*tensors).item())
    for case in FEATURES:
        one, other = (torch.from_numpy(x) for x in features(*case))
        found["fid"].append(_compute_fid(one.mean(0), one.T.cov(), other.mean(0), other.T.cov()).item())
    Path(__file__).with_name("distances.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
