"""From pydantic's errors to ours: one line that names every wrong field, its value and the remedy."""

import difflib
from typing import NoReturn

from pydantic import BaseModel, ValidationError

from smartdiff_jax.errors import InvalidField


def raise_invalid(error: ValidationError, kind: type[InvalidField], model: type[BaseModel], where: str = "") -> NoReturn:
    """Raise `kind` for the first wrong field; further ones are added to the message."""
    problems = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or model.__name__
        problems.append((field, item["input"], _remedy(item, model)))
    field, value, remedy = problems[0]
    also = "".join(f"; {f}={v!r}: {r}" for f, v, r in problems[1:])
    raise kind(field, value, remedy + where + also) from None


def _remedy(item, model: type[BaseModel]) -> str:
    if item["type"] == "extra_forbidden":
        name = str(item["loc"][-1])
        near = difflib.get_close_matches(name, model.model_fields, n=1)
        return (
            f"unknown field; did you mean {near[0]!r}?" if near else f"unknown field; known are {', '.join(model.model_fields)}"
        )
    message = item["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]
