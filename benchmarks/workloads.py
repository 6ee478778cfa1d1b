"""The shapes that benchmarks measure at: attention of the supported models at their usual sizes."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """queries and keys of one sample; what of a model it is."""

    name: str
    queries: int
    keys: int
    heads: int
    head_dim: int
    batch: int = 1

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.queries * self.keys * self.heads * self.head_dim


ATTENTION_SHAPES = (
    AttentionShape("wan2.1-1.3b 832x480x81", 32_760, 32_760, 12, 128),
    AttentionShape("wan2.1-1.3b 832x480x81, text", 32_760, 512, 12, 128),
    AttentionShape("wan2.1-14b 1280x720x81", 75_600, 75_600, 40, 128),
    AttentionShape("wan2.1-14b 1280x720x81, one of 8 ring steps", 9_450, 9_450, 40, 128),
    AttentionShape("flux.1 1024x1024", 4_608, 4_608, 24, 128),
    AttentionShape("qwen-image 1328x1328", 7_017, 7_017, 24, 128),
    AttentionShape("z-image 1024x1024", 4_224, 4_224, 30, 128),
    AttentionShape("pocket-video", 720, 720, 5, 64),
)

TINY_SHAPES = (AttentionShape("tiny", 100, 77, 2, 64), AttentionShape("tiny, text", 100, 5, 2, 64))
"""To see that a benchmark runs, on any machine."""
