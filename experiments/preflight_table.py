"""Writes docs/preflight.md: preflight of well-known runs, each beside the speed that others have published for it.

    python -m experiments.preflight_table [--only=TEXT]

Each row is one `experiments.preflight` in a process of its own, minutes on two cores. --only renews the rows that have
TEXT in their model, topology or kind of step ('train', 'decode') and keeps the others.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import app, flags

from llama_jax.chips import GIB

_ONLY = flags.DEFINE_string('only', '', 'renew only the rows with this in their model, topology or step')

PAGE = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'preflight.md'
_END = '<!-- end of table -->'


@dataclasses.dataclass(frozen=True)
class Row:
    """A run to compile.

    Attributes:
      model: preset.
      topology: chips.
      settings: config keys that differ from the recipe's.
      published: MFU with causal attention that others measured, in per cent, and who; None where nobody did.
      rows: of a decode step, to compile instead of the train step; 0: the train step.
      weights: of the decode step.
    """

    model: str
    topology: str
    settings: dict[str, object]
    published: tuple[float, str] | None = None
    rows: int = 0
    weights: str = 'auto'

    @property
    def step(self) -> str:
        """What a step of it is: of decoding or of training."""
        return 'decode' if self.rows else 'train'

    @property
    def key(self) -> str:
        """The beginning of its line."""
        start = f'| {self.model} | {self.topology} |'
        return f'{start} {self.weights}, {self.rows} x' if self.rows else start


_8K = {'data.seq_len': 8192, 'train.loss_chunks': 16}
_OFFLOAD = {'model.remat': 'full_offload'}  # as in the published runs
_LONG = {'data.seq_len': 131_072, 'train.loss_chunks': 64}
_BY_8: dict[str, object] = {
    'mesh.data': 2,
    'mesh.fsdp': 1,
    'mesh.tensor': 8,
}  # as many parts as there are key/value heads

ROWS = (
    Row('llama2_7b', 'v5e:4x4', {'train.batch_size': 32}),
    Row('llama2_70b', 'v5p:4x4x8', {'train.batch_size': 256}, (64.6, 'MaxText, 512 chips')),
    Row('llama2_70b', 'v6e:16x16', {'train.batch_size': 512}, (42.2, 'MaxText')),
    Row('llama3_8b', 'v6e:2x4', {'train.batch_size': 16, **_8K}, (40.0, 'tpu-recipes, 3.1 8B')),
    Row('llama3_8b', 'v5p:2x2x2', {'train.batch_size': 32, **_8K}),
    Row('llama3_1_70b', 'v6e:16x16', {'train.batch_size': 512, **_8K, **_OFFLOAD}, (47.0, 'tpu-recipes')),
    Row('llama3_1_405b', 'v5p:8x8x8', {'train.batch_size': 512, **_8K}, (68.5, 'tpu-recipes')),
    Row(
        'llama3_1_405b',
        '2xv6e:16x16',
        {
            'train.batch_size': 512,
            'mesh.dcn_data': 2,
            'mesh.axis_rules': 'embed=dcn_data+fsdp',
            **_8K,
            **_OFFLOAD,
        },
        (41.1, 'tpu-recipes'),
    ),  # fmt: skip
    Row('llama3_1_70b', 'tpu7x:4x4x4', {'train.batch_size': 256, **_8K}, (52.0, 'tpu-recipes')),
    Row('llama3_1_8b', 'v5p:4x4x4', {'train.batch_size': 8, 'mesh.context': 8, **_LONG}),
    *(
        Row('llama2_70b', topology, _BY_8, rows=32, weights='int8')
        for topology in ('v5e:4x4', 'v5p:2x2x4', 'v6e:4x4')
    ),
)

_HEADERS = {
    'train': (
        '| model | topology | tokens a step | HBM a device, GiB | bound by | step at least | tokens/s a device at most '
        '| MFU at most, causal | published | involuntary remat. | trace + compile |\n' + '|---' * 11 + '|'
    ),
    'decode': (
        '| model | topology | weights, rows x tokens | HBM a device, GiB | must be read, GB | reading '
        '| tokens/s of all rows at most | this program at least | trace + compile |\n' + '|---' * 9 + '|'
    ),
}


def line(row: Row) -> str:
    """Runs preflight and returns the row's line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / 'report.json'
        command = [sys.executable, '-m', 'experiments.preflight', f'--config=configs/pretrain.py:{row.model}',
                   f'--topology={row.topology}', f'--json={file}', '--max_tries=0']  # fmt: skip
        command += [f'--config.{name}={value}' for name, value in row.settings.items()]
    if row.rows:
        command += ['--notrain', f'--decode_batch={row.rows}', f'--decode_weights={row.weights}']
        print(' '.join(command[1:]), flush=True)
        subprocess.run(command, check=True)
        report = json.loads(file.read_text())
    return decode_line(row, report) if row.rows else train_line(row, report)


def train_line(row: Row, report: dict[str, Any]) -> str:
    """Of a train step."""
    train, values = report['train'], report['settings']
    size = f'{values["train.batch_size"]} x {values["data.seq_len"]:,}'
    remat = len(train['involuntary_rematerializations']) or 'none'
    if not train['fits']:
        return f'{row.key} {size} | does not fit | | | | | | {remat} | |'
    hbm, roof = train['hbm'], train['roofline']
    if row.published is not None and 100 * roof['mfu_causal'] < row.published[0]:
        raise SystemExit(
            f'{row.key} the bound {roof["mfu_causal"]:.1%} is below what others measured: {row.published}'
        )
    published = '' if row.published is None else f'{row.published[0]:.1f} % ({row.published[1]})'
    return (
        f'{row.key} {size} | {hbm["total"] / GIB:.1f} of {hbm["available"] / GIB:.2f} | {roof["bound"]} '
        f'| {roof["seconds"]:.2f} s | {roof["tokens_per_second_per_device"]:,.0f} | {roof["mfu_causal"]:.1%} '
        f'| {published} | {remat} | {train["trace_seconds"] + train["compile_seconds"]:.0f} s |'
    )


def decode_line(row: Row, report: dict[str, Any]) -> str:
    """Of a decode step."""
    decode = report['decode']
    hbm, reading = decode['hbm'], decode['reading']
    start = f'{row.key} {report["settings"]["data.seq_len"]:,} |'
    if not decode['fits']:
        return f'{start} does not fit |' + ' |' * 5
    return (
        f'{start} {hbm["total"] / GIB:.1f} of {hbm["available"] / GIB:.2f} | {reading["bytes"] / 1e9:.2f} '
        f'| {reading["seconds"] * 1e3:.1f} ms | {reading["tokens_per_second"]:,.0f} '
        f'| {decode["roofline"]["seconds"] * 1e3:.1f} ms, by {decode["roofline"]["bound"]} '
        f'| {decode["trace_seconds"] + decode["compile_seconds"]:.0f} s |'
    )


def begin(step: str) -> str:
    """What stands before the table of a kind of step."""
    return f'<!-- table of {step} steps: python -m experiments.preflight_table -->'


def main(argv: list[str]) -> None:
    """Renews the tables, a row at a time, so that what is done is kept."""
    del argv
    for row in ROWS:
        if _ONLY.value not in f'{row.model} {row.topology} {row.step}':
            continue
        new = line(row)
        before, rest = PAGE.read_text().split(begin(row.step))
        table, after = rest.split(_END, 1)
        lines = {text for text in table.splitlines() if text.startswith('| llama')}
        lines = {text for text in lines if not text.startswith(row.key)} | {new}
        order = [one.key for one in ROWS if one.step == row.step]
        known = [text for start in order for text in lines if text.startswith(start)]
        PAGE.write_text('\n'.join([before + begin(row.step), _HEADERS[row.step], *known, _END]) + after)


if __name__ == '__main__':
    app.run(main)
