"""Pictures from a folder in diffusers layout (FLUX.1, FLUX.2 klein, Qwen-Image or Z-Image), four seeds in one batch.

python examples/pictures.py ./Z-Image-Turbo "a fox in the snow"
"""

import sys

from smartdiff_jax import Pipeline

folder, prompt = sys.argv[1:]
pipe = Pipeline.from_pretrained(folder)
out = pipe(prompt, seed=1, num_outputs=4)
for path in out.save("picture.png"):
    print(path)
print(out.report.to_json())
