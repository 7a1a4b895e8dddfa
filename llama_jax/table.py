"""A small table of texts: as lines in a terminal, as HTML in a notebook."""

import dataclasses
import html
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts; printed, the columns stand below each other.

    Attributes:
      title: above; '' for none.
      header: names of the columns; () for none.
      rows: as many texts each.
      footer: a last row; () for none.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [row for row in (self.header, *self.rows, self.footer) if row]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = (
            '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in lines
        )
        return '\n'.join([*([self.title] if self.title else []), *text])

    def _repr_html_(self) -> str:
        def line(row: tuple[str, ...], tag: str) -> str:
            cells = (f'<{tag} style="text-align:left">{html.escape(cell)}</{tag}>' for cell in row)
            return f'<tr>{"".join(cells)}</tr>' if row else ''

        body = ''.join(line(row, 'td') for row in self.rows)
        title = f'<caption>{html.escape(self.title)}</caption>' if self.title else ''
        return f'<table>{title}{line(self.header, "th")}{body}{line(self.footer, "th")}</table>'


def html_of(title: str, values: Mapping[str, object]) -> str:
    """Names beside their values, as HTML: what a notebook shows of an object."""
    return Table(title, (), tuple((name, str(value)) for name, value in values.items()))._repr_html_()
