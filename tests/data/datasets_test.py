import json

import numpy as np
import pytest

from llama_jax.data.datasets import pretrain_dataset, train_tokenizer
from llama_jax.data.shards import write_prepared
from llama_jax.data.sources import read_documents
from llama_jax.errors import InputError


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    rng = np.random.default_rng(0)
    words = [''.join(map(chr, rng.integers(97, 123, 5))) for _ in range(200)]
    for name in ('a', 'b'):
        texts = [' '.join(rng.choice(words, 30)) for _ in range(200)]
        (folder / f'{name}.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    return folder


@pytest.fixture(scope='module')
def tokenizer(corpus):
    return train_tokenizer([str(corpus / '*.jsonl')], 400, corpus / 'tokenizer.model')


def test_training_data_and_what_is_held_out(corpus, tokenizer):
    train = [str(corpus / 'a.jsonl'), str(corpus / 'b.jsonl')]
    data = pretrain_dataset(train, tokenizer, 64, weights=[3, 1], validation_fraction=0.1)
    assert data.validation.num_documents + data.num_train_documents == 400
    assert 15 < data.validation.num_documents < 75  # 40 expected, standard deviation 6
    assert data.num_train_rows == sum(map(len, data.train_rows))
    again = pretrain_dataset(train[::-1], tokenizer, 64, validation_fraction=0.1)  # by text, not by place
    assert again.validation.num_documents == data.validation.num_documents
    trained, validated = (
        {tokenizer.decode(part) for rows in group for part in _documents(rows)}
        for group in (data.train_rows, [data.validation])
    )
    assert not trained & validated
    assert trained | validated == {text for source in train for text in read_documents(source)}
    row = data.train[0]
    assert row['tokens'].shape == row['segment_ids'].shape == (65,)


def _documents(rows):
    """Ids of the documents that rows hold, put together again."""
    stream = np.concatenate(
        [row['tokens'][: None if i == 0 else None][i > 0 :] for i, row in enumerate(rows)]
    )
    stream = stream[: rows.num_tokens].tolist()
    begins = [i for i, token in enumerate(stream) if token == 1] + [len(stream)]
    return [stream[a:b] for a, b in zip(begins, begins[1:], strict=False)]


def test_validation_sources_leave_the_training_documents_alone(corpus, tokenizer):
    train, validation = str(corpus / 'a.jsonl'), str(corpus / 'b.jsonl')
    data = pretrain_dataset([train], tokenizer, 32, validation=[validation])
    assert (data.num_train_documents, data.validation.num_documents) == (200, 200)
    assert pretrain_dataset(train, tokenizer, 32, validation_fraction=0.0).validation is None
    (corpus / 'one.txt').write_text('one document')
    alone = pretrain_dataset([str(corpus / 'one.txt')], tokenizer, 32, validation_fraction=0.99)
    assert (alone.num_train_documents, alone.validation) == (1, None)


def test_a_prepared_folder_gives_the_same_training(corpus, tokenizer, tmp_path):
    source = str(corpus / 'a.jsonl')
    write_prepared(read_documents(source), tokenizer, 64, tmp_path / 'prepared')
    prepared = pretrain_dataset([str(tmp_path / 'prepared')], tokenizer, 64, validation=[source], seed=3)
    in_memory = pretrain_dataset([source], tokenizer, 64, validation=str(tmp_path / 'prepared'), seed=3)
    assert prepared.train_rows[0].fingerprint == in_memory.train_rows[0].fingerprint
    assert prepared.fingerprint != in_memory.fingerprint  # the order of what is prepared is its own
    assert len(prepared.validation) == len(in_memory.validation)
    for i in range(len(prepared.train_rows[0])):
        np.testing.assert_array_equal(
            prepared.train_rows[0][i]['tokens'], in_memory.train_rows[0][i]['tokens']
        )
    assert pretrain_dataset([source], tokenizer, 32, validation=[source]).fingerprint != in_memory.fingerprint
    with pytest.raises(InputError, match='seq_len 128 is longer than the rows of .*, 64'):
        pretrain_dataset([str(tmp_path / 'prepared')], tokenizer, 128)
    other = train_tokenizer([source], 350, tmp_path / 'other.model')
    with pytest.raises(InputError, match='was prepared with another tokenizer'):
        pretrain_dataset([str(tmp_path / 'prepared')], other, 64)
    with pytest.raises(InputError, match='prepare all of it'):
        pretrain_dataset([source], tokenizer, 64, validation=[str(tmp_path / 'prepared'), source])
    with pytest.raises(InputError, match='no training data'):
        pretrain_dataset([], tokenizer, 64)
    with pytest.raises(InputError, match='validation_fraction is 1'):
        pretrain_dataset([source], tokenizer, 64, validation_fraction=1.0)


def test_of_a_single_document_the_end_is_held_out(corpus, tokenizer, tmp_path):
    lines = [json.loads(line)['text'] for line in (corpus / 'a.jsonl').read_text().splitlines()]
    (tmp_path / 'book.txt').write_text('\n'.join(lines))
    data = pretrain_dataset([str(tmp_path / 'book.txt')], tokenizer, 64, validation_fraction=0.1)
    head, tail = (tokenizer.decode(_documents(rows)[0]) for rows in (data.train_rows[0], data.validation))
    assert (head + tail).replace('\n', '') == ''.join(lines)
    assert len(tail) == pytest.approx(0.1 * len(head + tail), abs=len(lines[0]) + 60)  # to the nearest line
    assert tail.split('\n')[0] in lines


def test_what_was_held_out_of_folders_validates_each_by_itself(corpus, tokenizer, tmp_path):
    for name in ('a', 'b'):
        documents = list(read_documents(str(corpus / f'{name}.jsonl')))
        write_prepared(documents[20:], tokenizer, 64, tmp_path / name)
        write_prepared(documents[:20], tokenizer, 64, tmp_path / name / 'validation')
    train = [str(tmp_path / 'a'), f'{tmp_path}/b/']
    data = pretrain_dataset(train, tokenizer, 64)
    assert data.names == ('a', 'b') and list(data.validation_parts) == ['a', 'b']
    joined = [row['tokens'] for part in data.validation_parts.values() for row in part]
    np.testing.assert_array_equal([row['tokens'] for row in data.validation], joined)
    assert data.validation_parts['b'].num_documents == 20
    given = pretrain_dataset(
        train, tokenizer, 64, validation=[f'{tmp_path}/{name}/validation' for name in 'ab']
    )
    assert list(given.validation_parts) == ['a_validation', 'b_validation']
    mixed = pretrain_dataset([train[0], str(corpus / 'b.jsonl')], tokenizer, 64, validation_fraction=0.1)
    assert list(mixed.validation_parts) == ['a', 'held_out'] and mixed.names == ('a', 'b.jsonl')
    assert pretrain_dataset(train, tokenizer, 64, validation_fraction=0.0).validation is None


def test_the_order_of_a_folder_is_its_own(corpus, tokenizer, tmp_path):
    for name in ('a', 'b'):
        write_prepared(read_documents(str(corpus / f'{name}.jsonl')), tokenizer, 64, tmp_path / name)

    def order(*names, of):
        data = pretrain_dataset(
            [str(tmp_path / name) for name in names], tokenizer, 64, validation_fraction=0.0
        )
        place = names.index(of)
        found = (data.train.find_row(i) for i in range(600))
        return [row for source, row in found if source == place][:200]

    assert order('a', of='a') == order('b', 'a', of='a') == order('a', 'b', of='a')
    assert order('a', of='a') != order('b', of='b')
