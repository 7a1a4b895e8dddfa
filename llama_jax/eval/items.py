"""Items of a multiple-choice benchmark, one by one: what was asked, how probable each choice was, which is right.

An item is a line of `samples/TASK.jsonl`, or what an `ItemLog` holds of an evaluation in process.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from llama_jax.errors import InputError
from llama_jax.table import Table


def choice_probabilities(item: Mapping[str, Any]) -> Float[np.ndarray, ' choices']:
    """How probable each choice is among them all, by the probability of its tokens.

    Raises:
      InputError: the item's task is not one of several choices.
    """
    results = item['results'][: len(_choices(item))]
    log_probabilities = np.array([result['log_probability'] for result in results])
    weights = np.exp(log_probabilities - log_probabilities.max())
    return weights / weights.sum()


def confidences(
    items: Iterable[Mapping[str, Any]],
) -> tuple[Float[np.ndarray, ' n'], Bool[np.ndarray, ' n']]:
    """(the probability of the choice that is taken, whether it is right) of each item; see `figures.calibration`.

    Raises:
      InputError: as `choice_probabilities`.
    """
    found = [(choice_probabilities(item), item['answer']) for item in items]
    sure = np.array([probabilities.max() for probabilities, _ in found])
    return sure, np.array([int(probabilities.argmax()) in answer for probabilities, answer in found], bool)


def show_item(item: Mapping[str, Any], max_characters: int = 200) -> Table:
    """The question above, a row for each choice: its probability, and whether it is right.

    Args:
      item: of the log.
      max_characters: of a text, of which the end is shown.

    Raises:
      InputError: as `choice_probabilities`.
    """
    rows = tuple(
        (f'{probability:.1%}', 'right' if number in item['answer'] else '', choice.strip()[-max_characters:])
        for number, (choice, probability) in enumerate(
            zip(_choices(item), choice_probabilities(item), strict=True)
        )
    )
    question = item['requests'][0]['context'][-max_characters:]
    return Table(question, ('probability', '', 'choice'), rows)


def _choices(item: Mapping[str, Any]) -> list[str]:
    """The continuations of the item's first context; those of another ask how probable they are without it."""
    requests, found = item['requests'], []
    for request in requests:
        if 'continuation' not in request:
            raise InputError(
                f'item {item["index"]} is no choice between texts; its task has no probabilities of them'
            )
        if request['context'] not in (None, requests[0]['context']):
            break
        found.append(request['continuation'])
    return found
