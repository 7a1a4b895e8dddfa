"""The picture of the floors in docs/architecture.md, drawn from the imports: `python -m tests.floors_test` does it."""

import ast
import pathlib
import re

from tests.architecture_test import FLOOR_OF, FLOORS, REPOSITORY, imports, modules

_PAGE = REPOSITORY / 'docs' / 'architecture.md'
_BLOCK = re.compile(r'```mermaid\n.*?```', re.DOTALL)
# What each floor is for, from the ground up.
_NAMES = (
    'refusals', 'words', 'the machine', 'arrays', 'models and text', 'formats, data, losses', 'whole checkpoints',
    'training, generating', 'wings',
)  # fmt: skip


def _rooms_imported(root: pathlib.Path) -> dict[str, set[str]]:
    """Each room with the rooms that any of its files imports."""
    graph: dict[str, set[str]] = {}
    for module, file in modules(root).items():
        room = '.'.join(module.split('.')[1:2])
        if not room:
            continue
        named = {name for _, name in imports(ast.parse(file.read_text()), module, file.name == '__init__.py')}
        rooms = {name.split('.')[1] for name in named if name.startswith('llama_jax.')}
        graph.setdefault(room, set()).update(rooms - {room})
    return graph


def _without_detours(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Only the imports that no chain of others implies: fewer arrows that say the same."""

    def reached(room: str) -> set[str]:
        return set().union(*({target} | reached(target) for target in graph.get(room, ())))

    return {
        room: {
            target for target in targets if not any(target in reached(other) for other in targets - {target})
        }
        for room, targets in graph.items()
    }


def picture(root: pathlib.Path) -> str:
    """A Mermaid flow chart: floors as boxes, the ground at the bottom; an arrow is "imports"."""
    graph = _without_detours(_rooms_imported(root))
    lines = ['```mermaid', 'flowchart TD']
    for floor, (name, (rooms, _)) in reversed(list(enumerate(zip(_NAMES, FLOORS, strict=True)))):
        label = floor - 2 if floor > 1 else ('below', 'ground')[floor]
        lines.append(f'  subgraph floor{floor}["{label}: {name}"]')
        lines += [f'    {room}' for room in sorted(rooms & graph.keys())]
        lines.append('  end')
    for room in sorted(graph, key=lambda room: (-FLOOR_OF[room], room)):
        lines += [f'  {room} --> {target}' for target in sorted(graph[room])]
    return '\n'.join([*lines, '```'])


def test_the_picture_is_drawn_from_todays_imports():
    found = _BLOCK.search(_PAGE.read_text())
    assert found and found.group() == picture(REPOSITORY), 'redraw it: python -m tests.floors_test'


def test_where_to_look_tells_every_room():
    page = _PAGE.read_text()
    told = re.findall(r'`(\w+)`', ''.join(re.findall(r'^\| (`[^|]*) \|', page, re.MULTILINE)))
    rooms = [place.parent.name for place in (REPOSITORY / 'experiments').glob('*/__init__.py')]
    assert sorted(told) == sorted([*FLOOR_OF, *rooms])


if __name__ == '__main__':
    _PAGE.write_text(_BLOCK.sub(lambda _: picture(REPOSITORY), _PAGE.read_text(), count=1))
