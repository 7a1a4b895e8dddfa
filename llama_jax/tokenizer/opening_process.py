"""The process in which `foreign_tokenizer` opens a tokenizer.json: the file on its input, a line on its output.

It imports nothing of llama_jax, so that it starts in a fraction of a second. The system enforces the limits.
"""

import json
import os
import resource
import sys


def _open(data: bytes, texts: list[str]) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    for text in texts:  # a pattern may fail at some text only
        tokenizer.encode(text)
        tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    tokenizer.decode(list(range(min(size, 1000))), skip_special_tokens=False)


def _answer(seconds: int, memory: int, texts: list[str]) -> str:
    """What went wrong; '' for nothing."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # ends the process
    if os.path.exists('/proc/self/statm'):
        with open('/proc/self/statm') as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    with os.fdopen(0, 'rb') as file:
        data = file.read()
    try:
        _open(data, texts)
    except BaseException as error:  # a panic of the library is no Exception
        return f'{type(error).__name__}: {error}'
    return ''


if __name__ == '__main__':
    answer = _answer(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
    with os.fdopen(1, 'wb') as file:
        file.write(json.dumps(answer).encode())
