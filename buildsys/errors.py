"""The one error a user sees: where it is, what is wrong, and what mends it."""

from __future__ import annotations


class BuildError(Exception):
    """Bad input or a machine that cannot go on; printed as three parts, never as a traceback.

    where: a place that an editor can open (`recipes/q.yaml:9`), a file, or a step.
    what:  what is wrong, with both values (`format awq holds 4-bit codes, bits is 3`).
    fix:   an imperative that mends it (`set bits: 4`), or a command.
    """

    def __init__(self, where: str, what: str, fix: str) -> None:
        super().__init__(where, what, fix)
        self.where, self.what, self.fix = where, what, fix

    def __str__(self) -> str:
        return f"{self.where}  {self.what}\n    fix: {self.fix}"


class BuildErrors(BuildError):
    """Several errors found in one pass, so that a user mends them in one go."""

    def __init__(self, errors: list[BuildError]) -> None:
        first = errors[0]
        super().__init__(first.where, first.what, first.fix)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)
