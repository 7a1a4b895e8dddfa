"""Where a checkpoint is that was named by its path or its repository, which is downloaded: files, as they stand."""

import fnmatch
import functools
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Collection

from etils import epath

from llama_jax.errors import InputError, did_you_mean, error_line
from llama_jax.models.presets import PRESETS
from llama_jax.storage import enable_bucket

logger = logging.getLogger(__name__)


def resolve(path: epath.PathLike) -> epath.Path:
    """The local or `gs://` place of a checkpoint: downloads it where it is `hf://ORGANISATION/MODEL[@REVISION][/FILE]`."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).strip():
        raise InputError(f'{path!r} is no place; give a path, or hf://ORGANISATION/MODEL')
    text = os.fspath(path)
    if not text.startswith('hf://'):
        enable_bucket(text)
        return epath.Path(text)
    match = re.fullmatch(r'hf://([^/@\s]+/[^/@\s]+)(?:@([^/\s]+))?(?:/([^\s]+))?', text)
    if not match:
        raise InputError(
            f'{text} is not hf://ORGANISATION/MODEL, hf://ORGANISATION/MODEL@REVISION or either with /FILE behind it'
        )
    if importlib.util.find_spec('huggingface_hub') is None:
        raise InputError(f"{text} needs the package huggingface_hub: pip install 'llama_jax[hf]'")
    return _downloaded(text, match[1], match[2], (match[3] or '').strip('/'))


def check_there(path: epath.PathLike, place: epath.Path) -> None:
    """Refuses what is not there, and says what may have been meant: a preset, a model of the hub, what is beside it."""
    if place.exists():
        return
    text = os.fspath(path)
    if text in PRESETS:
        raise InputError(
            f"{text} is an architecture, PRESETS['{text}'], not weights; load a checkpoint by its path or "
            'hf://ORGANISATION/MODEL; random ones are init_params(LlamaForCausalLM(PRESETS[...]), jax.random.key(0))'
        )
    is_folder = '://' not in text and place.parent.is_dir()
    beside = [f.name for f in place.parent.iterdir() if not f.name.startswith('.')] if is_folder else []
    near = did_you_mean(place.name, [*beside[:1000], *(() if '/' in text else PRESETS)])
    hint = near if near.startswith('did you mean') else ''
    if not hint and re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', text):
        hint = f'of the Hugging Face hub it would be hf://{text}'
    raise InputError(f'no checkpoint at {place}: there is no such file or folder{"; " if hint else ""}{hint}')


def _downloaded(text: str, repository: str, revision: str | None, part: str) -> epath.Path:
    """The folder or file of a repository in the hub's cache, which goes on where it was interrupted."""
    import huggingface_hub
    from huggingface_hub import errors

    page = f'https://huggingface.co/{repository}'
    fetch = functools.partial(huggingface_hub.snapshot_download, repository, revision=revision)
    try:
        try:
            names = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
            patterns, place = _wanted_of(names, text, part)
            folder = epath.Path(fetch(allow_patterns=patterns))
        except (
            InputError, errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError
        ):  # fmt: skip
            raise
        except Exception as error:  # without a network, what was fetched before will do
            try:
                folder = epath.Path(fetch(local_files_only=True))
            except Exception:
                raise error from None
            logger.info('%s is read from the cache: %s', text, error_line(error))
            local = pathlib.Path(folder)
            names = [str(f.relative_to(local)) for f in local.rglob('*') if f.is_file()]
            _, place = _wanted_of(names, text, part)
    except errors.GatedRepoError as error:
        raise InputError(
            f'{text} cannot be downloaded: it is gated; accept its licence at {page}, then log in by `hf auth login`, '
            f'or set HF_TOKEN ({error_line(error)})'
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f'{text} cannot be downloaded: there is no {page}, or it is private; if it is yours, log in by '
            f'`hf auth login`, or set HF_TOKEN ({error_line(error)})'
        ) from error
    except InputError:
        raise
    except (
        Exception
    ) as error:  # the hub's own, of several lines each, and those of the HTTP client of its release
        raise InputError(f'{text} cannot be downloaded: {" ".join(str(error).split())}') from error
    return folder / place if place else folder


def _wanted_of(names: Collection[str], text: str, part: str) -> tuple[list[str], str]:
    """(patterns of the files of a repository that are needed, the place of the checkpoint in it)."""
    beside = ['*.json', 'tokenizer.model', '*.jinja']
    if part:
        if part in names and part.endswith('.gguf'):
            return [part], part
        inside = [name for name in names if name.startswith(f'{part}/')]
        if not inside:
            raise InputError(f'{text}: the repository has no {part}; it holds {", ".join(sorted(names)[:8])}')
        patterns, place = _wanted_of([name.removeprefix(f'{part}/') for name in inside], text, '')
        return [f'{part}/{pattern}' for pattern in patterns], f'{part}/{place}'.rstrip('/')
    at_top = [name for name in names if '/' not in name]
    for ending in ('safetensors', 'bin'):
        if any(re.fullmatch(rf'(pytorch_)?model[\w.-]*\.{ending}', name) for name in at_top):
            kept = [name for name in at_top if name.endswith(f'.{ending}')]
            return [name for name in at_top if any(fnmatch.fnmatch(name, p) for p in beside)] + kept, ''
    if 'params.json' in at_top:
        return ['params.json', 'tokenizer.model', 'consolidated.*.pth'], ''
    if 'original/params.json' in names:
        return ['original/*'], 'original'
    models = sorted(name for name in names if name.endswith('.gguf'))
    if len(models) == 1:
        return models, models[0]
    if models:
        raise InputError(
            f'{text} holds several GGUF files; give one of them: {text}/{models[0]}, {", ".join(models[1:8])}'
        )
    if 'adapter_config.json' in at_top:
        kept = [name for name in at_top if re.fullmatch(r'adapter_model\.(safetensors|bin)', name)]
        return [name for name in at_top if any(fnmatch.fnmatch(name, p) for p in beside)] + kept, ''
    raise InputError(f'{text} holds no weights of a Llama: {", ".join(sorted(names)[:8])}')
