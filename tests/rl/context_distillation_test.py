"""Answers drawn behind a preprompt: kept only where they score higher than those without, and learnt without it."""

import pytest

from llama_jax.errors import InputError
from llama_jax.rl.context_distillation import default_preprompts, distilled_lines, with_preprompt
from llama_jax.rl.rejection import Candidate, Keep
from llama_jax.tokenizer.chat_format import Message

BE = 'You are a wise assistant.'


def candidates(without, behind):
    return [
        *(Candidate(f'plain {i}', score) for i, score in enumerate(without)),
        *(Candidate(f'wise {i}', score, preprompt=BE) for i, score in enumerate(behind)),
    ]


def test_preprompts_are_the_papers_adjectives_alone_and_by_two_and_a_template():
    found = default_preprompts()
    assert BE in found and 'You are a responsible and respectful assistant.' in found
    assert len(set(found)) == len(found) == 4 + 6 + 1


def test_a_preprompt_stands_before_the_users_first_words():
    talk = (
        Message('system', 'Be.'),
        Message('user', 'Hi'),
        Message('assistant', 'Yes?'),
        Message('user', 'Go'),
    )
    found = with_preprompt(talk, BE)
    assert [message.content for message in found] == ['Be.', f'{BE}\n\nHi', 'Yes?', 'Go']
    with pytest.raises(InputError, match='no message by the user'):
        with_preprompt(talk[:1], BE)


def test_only_what_scores_above_all_without_is_kept():
    (line,) = distilled_lines('Say', candidates([0.5, 1.0], [0.2, 1.5, 1.4]), Keep())
    assert (line['completion'], line['score'], line['preprompt']) == ('wise 1', 1.5, BE)
    assert (line['original'], line['score_original'], line['prompt']) == ('plain 1', 1.0, 'Say')
    assert len(line['candidates']) == 5 and 'chosen' not in line
    assert distilled_lines('Say', candidates([0.5, 1.5], [0.2, 1.5]), Keep()) == [], 'equal is no rise'
    assert distilled_lines('Say', candidates([2.0], [1.9]), Keep()) == []
    assert distilled_lines('Say', candidates([], [1.9]), Keep()) == []
    (line,) = distilled_lines('Say', candidates([0.5], [1.5]), Keep('pair'))
    assert (line['chosen'], line['rejected'], line['score_rejected']) == ('wise 0', 'plain 0', 0.5)
