"""What is wrong with a file, in parts: the loaders raise or warn of it, the linter lists it."""

from dataclasses import dataclass

from ..errors import FormatError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: where, what was found, what was expected, what to do. `kind` is a short name for programs."""

    kind: str
    file: str
    tensor: str | None
    found: str
    expected: str = ""
    advice: str = ""
    error: bool = True  # False: the checkpoint can be used, with the care that the text asks for

    def __str__(self):
        where = f"{self.file}: tensor '{self.tensor}'" if self.tensor else self.file
        text = f"{where}: {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        return f"{text}; {self.advice}" if self.advice else text


class FoundError(FormatError):
    """A FormatError that keeps its finding."""

    def __init__(self, finding: Finding):
        super().__init__(str(finding))
        self.finding = finding


class FoundUnsupported(UnsupportedError):
    """An UnsupportedError that keeps its finding."""

    def __init__(self, finding: Finding):
        super().__init__(str(finding))
        self.finding = finding


class FoundWarning(UserWarning):
    """A warning that keeps its findings, all of one kind; the text is of the first."""

    def __init__(self, findings: list[Finding]):
        more = len(findings) - 1
        super().__init__(str(findings[0]) + (f" (and {more} more tensors)" if more else ""))
        self.findings = findings
