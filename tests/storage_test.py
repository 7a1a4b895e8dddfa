"""Local paths and addresses of buckets; results read ahead."""

import pytest

from llama_jax import storage
from llama_jax.types import InputError


def test_prefetched_results_come_in_order_and_errors_where_they_belong():
    assert list(storage.prefetch([lambda i=i: i for i in range(20)])) == list(range(20))
    results = storage.prefetch([lambda: 1, lambda: 1 // 0, lambda: 2])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize('address', ['https://huggingface.co/a/b', 's3://bucket/a', 'memory://a'])
def test_an_address_that_is_neither_local_nor_in_a_bucket_of_google_is_refused(address):
    with pytest.raises(InputError, match=rf'{address} is no path; give a local one or gs://BUCKET/PATH'):
        storage.enable_bucket(address)
