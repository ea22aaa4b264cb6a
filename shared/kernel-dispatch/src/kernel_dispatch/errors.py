"""The errors a caller may want to catch; each message says what came and what was expected."""

from __future__ import annotations


class ArgumentError(ValueError):
    """An argument has an unusable value; `argument` is its name as the caller wrote it."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)  # both in args, so that the error survives pickling
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument}: {self.problem}"


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has the wrong Python type, or a tensor has the wrong dtype."""


class ProviderError(TypeError):
    """A provider breaks its contract: `supports` or `load` returned something else than it must."""


class NoKernelError(RuntimeError):
    """No provider can run the problem; the message lists every provider and its reason."""


class CompilationForbiddenError(RuntimeError):
    """A compilation was needed inside `forbid_compilation()`; the message describes its key."""
