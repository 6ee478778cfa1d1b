"""What a function computes, counted in its jaxpr: nothing is run and no array exists."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from smartdiff_jax.kernels.base import QKV
from smartdiff_jax.sharding.workload import AttentionKind

PREFIX = "counted_"


@dataclasses.dataclass
class Counts:
    """matmul: FLOP of all dot products of more than one row. read: bytes of the right sides of those of one row.
    widest: features that the widest product of `rows` rows has.
    attention: calls by (kind, shape of the queries, length of the text).
    largest: bytes of the largest array. carried: bytes of the largest state that a scan hands on.
    """

    matmul: float = 0.0
    read: int = 0
    widest: int = 0
    largest: int = 0
    carried: int = 0
    attention: Counter[tuple[AttentionKind, tuple[int, ...], int]] = dataclasses.field(default_factory=Counter)


def count(jaxpr: ClosedJaxpr, rows: int = 0) -> Counts:
    """Loops count as often as they run; of a branch, and of a while loop, everything counts once."""
    counts = Counts()
    _count(jaxpr.jaxpr, 1, rows, counts)
    return counts


def _count(jaxpr: Jaxpr, times: int, rows: int, counts: Counts) -> None:
    for equation in jaxpr.eqns:
        name = str(equation.params.get("name", ""))
        if name.startswith(PREFIX):
            _count_attention(equation, cast(AttentionKind, name.removeprefix(PREFIX)), times, counts)
            continue
        if equation.primitive.name == "dot_general":
            _count_product(equation, times, rows, counts)
        is_scan = equation.primitive.name == "scan"
        if is_scan:
            # A state leaves the loop as it leaves its body; all else is stacked.
            pairs = zip(equation.outvars, equation.params["jaxpr"].jaxpr.outvars, strict=True)
            counts.carried = max(counts.carried, sum(_bytes(out) for out, of_body in pairs if out.aval == of_body.aval))
        else:
            counts.largest = max([counts.largest, *map(_bytes, equation.outvars)])
        for inner in _inner(equation.params):
            _count(inner, times * (equation.params["length"] if is_scan else 1), rows, counts)


def _count_attention(equation: Any, kind: AttentionKind, times: int, counts: Counts) -> None:
    shapes = [variable.aval.shape for variable in equation.invars]
    # Queries, keys and values of one stream; of joint attention the tokens' and then the text's.
    text = {"self": 0, "cross": shapes[1][1], "text": shapes[0][1], "joint": shapes[-1][1]}[kind]
    counts.attention[kind, shapes[0], text] += times


def _count_product(equation: Any, times: int, rows: int, counts: Counts) -> None:
    left, right = (variable.aval for variable in equation.invars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    out = equation.outvars[0].aval.shape
    if math.prod(out[:-1]) == 1:
        counts.read += times * _bytes(equation.invars[1])
        return
    counts.matmul += times * 2.0 * math.prod(out) * math.prod(left.shape[axis] for axis in contracted)
    if rows and len(out) > 1 and out[-2] == rows:
        counts.widest = max(counts.widest, out[-1])


def _bytes(variable: Any) -> int:
    aval = variable.aval
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


class CountedAttend:
    """`Attend` whose calls stand by name in a jaxpr. What comes out has the right shape and no meaning."""

    def pieces(self, picture, text):
        return None

    def fuse(self, place, *lengths):
        return None

    def self_attention(self, tokens):
        return _named("self", lambda q, k, v: q + k + v)(*tokens)

    def cross_attention(self, q, k, v, *, text_length=None):
        return _named("cross", lambda q, k, v: q + 1)(q, k, v)

    def text_attention(self, text, *, text_length=None, picture=0):
        return _named("text", lambda q, k, v: q + k + v)(*text)

    def joint_attention(self, tokens, text, *, text_length=None):
        def joined(*streams):
            first, second = QKV(*streams[:3]), QKV(*streams[3:])
            return first.q + first.k + first.v, second.q + second.k + second.v

        return _named("joint", joined)(*tokens, *text)


def _named(kind: str, function: Any) -> Any:
    function.__name__ = PREFIX + kind
    return jax.jit(function)
