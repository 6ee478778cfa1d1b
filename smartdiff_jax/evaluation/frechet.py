"""The Fréchet distance of two sets of features: FID with Inception's of pictures, FVD with I3D's of clips.

    |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))

The features are brought by whoever has the network: a file of numbers [n, d], a row a result or a frame. Follows Heusel et
al. 2017 and torchmetrics' `_compute_fid`, in float64.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from smartdiff_jax.errors import InvalidRequest

FILES = {"fid": "fid.npy", "fvd": "fvd.npy"}
"""What a folder of results calls its features, by the metric they make."""


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m e"]) -> float:
    """0 for equal sets. Raises InvalidRequest for features of different lengths, or fewer than two rows."""
    if a.shape[1] != b.shape[1]:
        raise InvalidRequest("features", b.shape, f"the reference's have {a.shape[1]} numbers a row; take one network for both")
    if min(len(a), len(b)) < 2:
        raise InvalidRequest("features", min(len(a), len(b)), "give those of two results or more; thousands tell something")
    a, b = a.astype(np.float64), b.astype(np.float64)
    one, other = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # Of the root of C1 C2 only the trace is needed: the roots of its eigenvalues, which are those of R C2 R with R R = C1.
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other @ root), 0.0)).sum()
    return float(np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.trace(one) + np.trace(other) - 2 * shared)


def distances(reference: Path, other: Path) -> dict[str, float]:
    """By metric, of the features that both folders hold."""
    found = {}
    for name, file in FILES.items():
        places = [place / file for place in (reference, other)]
        if all(place.is_file() for place in places):
            found[name] = frechet_distance(*map(read_features, places))
    return found


def read_features(file: Path) -> Float[np.ndarray, "n d"]:
    """A .npy file of float numbers [n, d]. Raises InvalidRequest."""
    try:
        features = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidRequest("features", str(file), f"cannot be read ({error}); write it by numpy.save") from None
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not np.isfinite(features).all():
        raise InvalidRequest("features", f"{features.dtype} {features.shape}", f"{file} must hold finite floats [n, d]")
    return features
