"""The peer: diffusers' AutoencoderKLWan in bfloat16, eager, as it is and with cuDNN's search. Prints one line of JSON."""

import argparse
import json
import statistics
import time

import diffusers
import torch
from diffusers import AutoencoderKLWan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    numbers, shape = {}, (1, 16, 21, 60, 104)
    if arguments.tiny:
        numbers, shape = dict(base_dim=16, num_res_blocks=1), (1, 16, 3, 6, 10)
    cuda = arguments.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    with torch.device(arguments.device):
        vae = AutoencoderKLWan(**numbers).to(dtype).eval()
        latents = torch.randn(shape, dtype=dtype)
        pixels = torch.zeros(1, 3, 4 * shape[2] - 3, 8 * shape[3], 8 * shape[4], dtype=dtype)

    def seconds(call) -> dict:
        times = []
        for _ in range(2 + arguments.repeats):
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        times = times[2:]
        return {"median": statistics.median(times), "min": min(times), "max": max(times)}

    results: dict = {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    with torch.no_grad():
        before = torch.cuda.memory_allocated() if cuda else 0
        results["decode"] = {"seconds": seconds(lambda: vae.decode(latents))}
        results["decode"]["peak_above_weights_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else 0
        results["encode"] = {"seconds": seconds(lambda: vae.encode(pixels))}
        torch.backends.cudnn.benchmark = True
        results["decode_with_cudnn_search"] = {"seconds": seconds(lambda: vae.decode(latents))}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
