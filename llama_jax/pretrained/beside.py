"""What stands beside weights: the workdir around a step, the tokenizer."""

from etils import epath

from llama_jax.checkpoint.model_file import CHECKPOINTS, MODEL_FILE
from llama_jax.convert import gguf_file
from llama_jax.errors import InputError, checked_names
from llama_jax.pretrained.hub import resolve
from llama_jax.storage import read_range
from llama_jax.tokenizer import tokenizer as tokenizers
from llama_jax.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from llama_jax.tokenizer.tokenizer import Tokenizer


def run_of(path: epath.Path) -> epath.Path:
    """A run's workdir, where the path is WORKDIR/checkpoints[/STEP]; else the path itself."""
    for folder in (path, path.parent):
        if folder.name == CHECKPOINTS and (folder.parent / MODEL_FILE).exists():
            return folder.parent
    return path


@checked_names()
def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """The tokenizer at a path: its own file, or the one in or beside a checkpoint of any format.

    Raises:
      InputError: there is none, or several.
    """
    place = run_of(resolve(path))
    if place.is_dir():
        return tokenizers.load_tokenizer(folder_of_tokenizer(place))
    if not place.exists():
        raise InputError(f'no tokenizer at {place}: there is no such file or folder')
    if read_range(place, 0, 4) == b'GGUF':
        return tokenizer_from_gguf(gguf_file.read_metadata(place), str(place))
    if place.name.endswith(('.pt', '.bin')):
        return tokenizers.load_tokenizer(place.parent)
    return tokenizers.load_tokenizer(place)


def folder_of_tokenizer(folder: epath.Path) -> epath.Path:
    """Meta's releases before Llama 3 keep one tokenizer above the folders of all their models."""
    above = folder.parent / 'tokenizer.model'
    if not has_tokenizer(folder) and (folder / 'params.json').exists() and above.exists():
        return above
    return folder


def has_tokenizer(place: epath.Path) -> bool:
    """Whether it is one, or a folder that holds some."""
    if not place.is_dir():
        return True
    return any(
        file.name.endswith('.model') or file.name in ('tokenizer.json', 'tokenizer.bin')
        for file in place.iterdir()
    )
