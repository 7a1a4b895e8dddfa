"""What became of every record of prepared sources, as people read it: a line each, and a picture."""

import io
from typing import Any


def describe_report(report: dict[str, Any], output: str) -> str:
    """One line for all, above it one for each of several sources."""
    sources = report['sources']
    lines = [f'{name}: {_describe(row)}' for name, row in sources.items()] if len(sources) > 1 else []
    parts = [row[part] for row in sources.values() for part in ('train', 'validation') if part in row]
    rows, documents, size = (sum(part[key] for part in parts) for key in ('rows', 'documents', 'text_bytes'))
    total = f'{rows:,} rows of {report["seq_len"]} tokens from {documents:,} documents, {size / 1e6:.1f} MB'
    bad = sum(row['bad'] for row in sources.values())
    return '\n'.join([*lines, f'{output}: {total}' + (f'; {bad:,} bad records left out' if bad else '')])


def _describe(row: dict[str, Any]) -> str:
    train = row['train']
    left_out = ', '.join(f'{row[name]:,} {name}' for name in ('empty', 'bad') if row[name])
    held_out = f', {row["held_out"]:,} documents held out' if row['held_out'] else ''
    return (
        f'{train["documents"]:,} documents, {train["tokens"]:,} tokens, {train["rows"]:,} rows in {train["shards"]:,} '
        f'shards{held_out}' + (f'; left out: {left_out}' if left_out else '')
    )


def draw_report(report: dict[str, Any]) -> bytes:
    """Tokens of each source, and how long its documents are, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100, layout='constrained')
    tokens, lengths = figure.subplots(1, 2)
    sources = report['sources']
    tokens.barh(list(sources), [row['train']['tokens'] for row in sources.values()])
    tokens.invert_yaxis()
    tokens.set_xlabel('tokens to train on')
    for name, row in sources.items():
        counts = row['train']['lengths']
        shares = [count / max(sum(counts), 1) for count in counts]
        last = max((bits for bits, count in enumerate(counts) if count), default=1)
        lengths.plot([2.0**bits for bits in range(1, last + 1)], shares[1 : last + 1], marker='.', label=name)
    lengths.set_xscale('log', base=2)
    lengths.set_xlabel('tokens of a document, up to')
    lengths.set_ylabel('share of documents')
    lengths.legend()
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
