"""PSNR, SSIM and MS-SSIM of picture pairs by scikit-image 0.26 and piqa 1.3, in an environment of their own.

python tests/golden/make_metrics.py     writes metrics.json; the pictures are drawn anew by whoever reads it
"""

import json
from pathlib import Path

import numpy as np

CASES = [(0, 40, 33, 12.0), (1, 64, 64, 3.0), (2, 176, 208, 25.0), (3, 240, 192, 60.0)]
"""seed, height, width, standard deviation of the noise between the two; the last two are large enough for five scales,
and even at all of them: implementations differ in what they do with an odd row."""


def pair(seed: int, height: int, width: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [h, w, 3]: waves and edges, and the same with noise and a little less contrast."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / random.uniform(2, 20) + y / random.uniform(2, 20) + random.uniform(0, 6)) for _ in range(3)]
    picture = 128 + 60 * np.stack(waves, axis=-1) + 40 * ((x // 11 + y // 7) % 2)[..., None] - 20
    other = 10 + 0.9 * picture + noise * random.standard_normal(picture.shape)
    return tuple(np.clip(np.round(each), 0, 255).astype(np.uint8) for each in (picture, other))


def main() -> None:
    import torch
    from piqa import MS_SSIM
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    found = []
    for case in CASES:
        a, b = pair(*case)
        window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        row = {
            "psnr": float(peak_signal_noise_ratio(a, b, data_range=255)),
            "ssim": float(structural_similarity(a, b, channel_axis=-1, data_range=255, **window)),
        }
        if min(case[1:3]) >= 176:
            tensors = [torch.from_numpy(x).permute(2, 0, 1)[None].double() / 255 for x in (a, b)]
            row["ms_ssim"] = float(MS_SSIM().double()(*tensors))
        found.append(row)
    Path(__file__).with_name("metrics.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
