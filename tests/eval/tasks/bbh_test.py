"""BIG-Bench Hard: its prompts, and the sentence that answers are read from."""

import pytest

from llama_jax.eval.tasks.bbh import BBH, SUBSETS, extracted


def test_prompt_has_the_authors_three_examples(shared_data):
    data_dir = str(shared_data / 'eval')
    documents = {document['subset']: document for document in BBH.documents(data_dir)}
    assert tuple(documents) == SUBSETS
    shots = BBH.draw(list(documents.values()), data_dir)
    for (subset, document), examples in zip(documents.items(), shots, strict=True):
        (request,) = BBH.requests(document, BBH.prefix(document, examples))
        assert request.prompt.count("\nA: Let's think step by step.\n") == 4, subset
        assert 'canary' not in request.prompt and request.prompt.endswith(
            f'Q: {document["input"]}' + STEPS
        ), subset
        for example in examples:
            assert (
                extracted(example['target']) in ('True', 'False', 'Yes', 'No', 'yes', 'no')
                or subset not in YES_NO
            )


STEPS = "\nA: Let's think step by step.\n"
YES_NO = ('boolean_expressions', 'causal_judgement', 'navigate', 'sports_understanding', 'web_of_lies')


@pytest.mark.parametrize(
    ('text', 'answer'),
    [
        ('So the answer is (B).', '(B)'),
        (
            'the answer is no. Or the answer is yes.\n',
            'no. Or the answer is yes',
        ),  # up to the line's last character
        (
            'So the answer is True',
            'Tru',
        ),  # as the harness's pattern has it: the last character goes, dot or not
        ('unsure', '[invalid]'),
        ('', '[invalid]'),
    ],
)
def test_extraction(text, answer):
    assert extracted(text) == answer
