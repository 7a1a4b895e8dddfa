"""Who takes turns in a benchmark."""

from experiments.benchmark.turns import has_peer


def test_a_peer_that_is_not_installed_is_said_to_be_left_out(capsys):
    assert has_peer('ours', 'jax') and not capsys.readouterr().out
    assert not has_peer('theirs', 'jax', 'no_such_package')
    assert capsys.readouterr().out.startswith('theirs: left out for want of no_such_package; pip install')
