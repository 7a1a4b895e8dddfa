"""Ten schemas whose answers end, a model of pydantic, a function, and what fits them: told without llguidance."""

import re
from typing import Annotated, Literal

import pydantic


class Step(pydantic.BaseModel):
    kind: Literal['add', 'take']
    number: Annotated[int, pydantic.Field(ge=0, le=99)]


SIZE = {'enum': ['S', 'M', 'L']}
SCHEMAS = [
    {'const': 'yes'},
    {'type': 'boolean'},
    {'type': 'integer', 'minimum': -5, 'maximum': 5},
    SIZE,
    {'type': 'string', 'maxLength': 4},
    {'type': 'string', 'pattern': '^[a-f]{2}[0-9]$'},
    {'type': 'array', 'items': {'type': 'boolean'}, 'minItems': 1, 'maxItems': 2},
    {'anyOf': [{'type': 'null'}, {'type': 'integer', 'minimum': 0, 'maximum': 9}]},
    {'type': 'object', 'properties': {'a': SIZE}, 'required': ['a'], 'additionalProperties': False},
    {'$ref': '#/$defs/size', '$defs': {'size': SIZE}},
]
SELL = {
    'type': 'function',
    'function': {
        'name': 'sell',
        'parameters': {
            'type': 'object', 'properties': {'size': SIZE}, 'required': ['size'], 'additionalProperties': False,
        },
    },
}  # fmt: skip


def fits(value, schema):
    """Of what the schemas above have."""
    schema = schema.get('$defs', {}).get('size', schema)
    of_type = {
        'boolean': bool, 'integer': int, 'string': str, 'array': list, 'object': dict, 'null': type(None)
    }  # fmt: skip
    if 'anyOf' in schema:
        return any(fits(value, one) for one in schema['anyOf'])
    if 'enum' in schema or 'const' in schema:
        return value in schema.get('enum', [schema.get('const')])
    if (
        not isinstance(value, of_type[schema['type']])
        or schema['type'] == 'integer'
        and isinstance(value, bool)
    ):
        return False
    size = len(value) if isinstance(value, str | list) else 0
    inside = (
        schema.get('minimum', 0) <= value <= schema.get('maximum', 0) if schema['type'] == 'integer' else True
    )
    return (
        inside
        and schema.get('minItems', 0) <= size <= schema.get('maxLength', schema.get('maxItems', 99))
        and re.search(schema.get('pattern', ''), value if isinstance(value, str) else '') is not None
        and (not isinstance(value, dict) or value.keys() == {'a'} and value['a'] in SIZE['enum'])
    )
