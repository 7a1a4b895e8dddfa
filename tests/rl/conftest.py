"""The toy model and its weights, once for all files: they share its programs."""

import pytest

from tests import toy


@pytest.fixture(scope='session')
def model():
    return toy.make_model()


@pytest.fixture(scope='session')
def params(model):
    return toy.make_params(model)
