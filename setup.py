"""For tools that still ask for a setup.py, and for archives of the same bytes; all else stands in pyproject.toml."""

import gzip
import os
import pathlib
import tarfile

from setuptools import setup
from setuptools.command.sdist import sdist


class ReproducibleSdist(sdist):
    """The source archive with the time of SOURCE_DATE_EPOCH and nobody's name, which setuptools gives wheels alone."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """As the original does, in the order of names."""
        if format != 'gztar' or 'SOURCE_DATE_EPOCH' not in os.environ:
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        moment = int(os.environ['SOURCE_DATE_EPOCH'])

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = moment, 0, 0, '', ''
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        name, folder = f'{base_name}.tar.gz', pathlib.Path(root_dir or '.')
        with (
            gzip.GzipFile(name, 'wb', mtime=moment) as packed,
            tarfile.open(fileobj=packed, mode='w') as archive,
        ):
            for file in sorted([folder / base_dir, *(folder / base_dir).rglob('*')]):
                archive.add(file, file.relative_to(folder), recursive=False, filter=plain)
        return name


setup(cmdclass={'sdist': ReproducibleSdist})
