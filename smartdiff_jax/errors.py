"""Every error a user can cause. Each message names the field, the value and the remedy."""


class SmartdiffError(Exception):
    """Base of all errors raised on purpose; the CLI prints its message and exits with 2."""


class InvalidField(SmartdiffError):
    """A request, a configuration or a flag holds a value that cannot be served."""

    def __init__(self, field: str, value: object, remedy: str):
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}={value!r}: {remedy}")


class InvalidRequest(InvalidField):
    """A user parameter cannot be served."""


class InvalidConfig(InvalidField):
    """A model or system parameter cannot be served."""


class CheckpointError(SmartdiffError):
    """Weights are missing, unreadable, or do not fit the model; nothing was loaded."""


class Unsupported(SmartdiffError):
    """A kernel cannot serve these shapes or this device; raised while tracing, with the reason."""


class HostLost(SmartdiffError):
    """A host that takes part is gone or has failed; nothing was written, and the mesh is of no use any more."""


class Conflict(SmartdiffError):
    """Something is under way that this would get in the way of."""


class Cancelled(SmartdiffError):
    """The run was stopped between two chunks; nothing was written."""
