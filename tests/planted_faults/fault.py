"""A mistake that somebody could make, and the test that is there for it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake.

    Attributes:
      what: it is; a name of its own.
      file: it is in.
      old: what stands there, once in the file.
      new: what the mistake makes of it.
      test: that must fail, as pytest names it.
    """

    what: str
    file: str
    old: str
    new: str
    test: str

    def applied_to(self, text: str) -> str:
        """The file's text with the mistake in it."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f'{self.what!r}: the text to replace stands {count} times in {self.file}, not once'
            )
        return text.replace(self.old, self.new)


def faults_in(file: str, *faults: tuple[str, str, str, str]) -> tuple[Fault, ...]:
    """Those of one file, each as (what it is, its test below `tests`, text before, text after)."""
    return tuple(Fault(what, file, old, new, f'tests/{test}') for what, test, old, new in faults)
