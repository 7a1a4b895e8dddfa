"""The commands: `llama_jax VERB --...`, or `python -m experiments VERB --...`; without a verb they are listed."""

import ast
import pathlib
import runpy
import sys

import experiments

_FOLDER = pathlib.Path(__file__).parent


def verbs() -> dict[str, str]:
    """Every command with the first line of what it says of itself."""
    found = {}
    for place in sorted([*_FOLDER.glob('*.py'), *_FOLDER.glob('*/__main__.py')]):
        source = place.read_text()
        if place != pathlib.Path(__file__) and "__name__ == '__main__'" in source:
            name = place.parent.name if place.name == '__main__.py' else place.stem
            found[name] = (ast.get_docstring(ast.parse(source)) or '').partition('\n')[0]
    return found


def main() -> None:
    """Runs the command that the first argument names."""
    from llama_jax.errors import did_you_mean

    known, (verb, *rest) = verbs(), [*sys.argv[1:2], *([''] if len(sys.argv) < 2 else []), *sys.argv[2:]]
    if verb in ('', '-h', '--help', 'help'):
        width = max(map(len, known))
        lines = [f'  {name:{width}}  {line}' for name, line in known.items()]
        print(
            '\n'.join(['llama_jax VERB --option=value ...; `llama_jax VERB --help` tells of one\n', *lines])
        )
        return
    if verb not in known:
        print(f'error: there is no command {verb!r}; {did_you_mean(verb, known)}', file=sys.stderr)
        sys.exit(2)
    experiments.begin_process()
    sys.argv = [f'llama_jax {verb}', *rest]
    runpy.run_module(f'experiments.{verb}', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    main()
