"""Three seeds of one prompt through the Python API, written as animated WebP."""

from smartdiff_jax import Pipeline

pipe = Pipeline.from_pretrained("pocket-video")
out = pipe("a rocket moving up on a black background", seed=1, num_outputs=3)
for path in out.save("rocket.webp"):
    print(path)
print(out.report.to_json())
