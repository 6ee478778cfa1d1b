"""Latents to tokens and back: every model's loop runs on packed patches.

A token holds one patch. Its features are ordered (pt, ph, pw, c) in Wan and Z-Image, whose patches a convolution took upstream,
and (c, pt, ph, pw) in FLUX and Qwen-Image, whose pipelines fold the pixels of a patch into the channels.
"""

import dataclasses

from jaxtyping import Array, Float

Triple = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Patches:
    """How one architecture cuts latents [b, c, f, h, w] into tokens [b, s, p], frame by frame and row by row.

    size: (frames, height, width) of a patch; it must divide (f, h, w).
    channels_first: whether a token's features are ordered by channel first.
    """

    size: Triple
    channels_first: bool = False

    def grid(self, latent_shape: tuple[int, ...]) -> Triple:
        """Tokens along (frames, rows, columns) of latents [b, c, f, h, w]."""
        f, h, w = (n // p for n, p in zip(latent_shape[2:], self.size, strict=True))
        return f, h, w

    def pack(self, latents: Float[Array, "b c f h w"]) -> Float[Array, "b s p"]:
        b, c = latents.shape[:2]
        (f, h, w), (pt, ph, pw) = self.grid(latents.shape), self.size
        patches = latents.reshape(b, c, f, pt, h, ph, w, pw)
        order = (0, 2, 4, 6, 1, 3, 5, 7) if self.channels_first else (0, 2, 4, 6, 3, 5, 7, 1)
        return patches.transpose(order).reshape(b, f * h * w, pt * ph * pw * c)

    def unpack(self, tokens: Float[Array, "b s p"], grid: Triple) -> Float[Array, "b c f h w"]:
        """The inverse of `pack`, for a grid of (frames, rows, columns) tokens."""
        (f, h, w), (pt, ph, pw) = grid, self.size
        shape = (-1, pt, ph, pw) if self.channels_first else (pt, ph, pw, -1)
        order = (0, 4, 1, 5, 2, 6, 3, 7) if self.channels_first else (0, 7, 1, 4, 2, 5, 3, 6)
        patches = tokens.reshape(tokens.shape[0], f, h, w, *shape).transpose(order)
        return patches.reshape(tokens.shape[0], -1, f * pt, h * ph, w * pw)
