"""Faults of speculative decoding: all of them give plausible text."""

from tests.planted_faults.fault import faults_in

_LAW = (
    'inference/speculative_test.py::test_three_tokens_follow_the_law_that_they_have_one_by_one[propose_drawn]'
)
_LOOKUP = 'inference/speculative_test.py::test_a_lookup_proposes_what_followed_the_longest_match_of_the_end'
_ROWS = 'inference/speculative_test.py::test_what_is_proposed_without_draws_changes_no_row'
_DRAFT = (
    'inference/speculative_test.py::test_a_draft_leaves_greedy_rows_as_they_are_and_draws_by_the_seed_alone'
)

# fmt: off
FAULTS = (
    *faults_in('llama_jax/inference/speculative.py',
        ('speculation: what is rejected is drawn anew by p', _LAW,
         'jnp.maximum(jnp.exp(own_p) - jnp.exp(own_q), 0)', 'jnp.exp(own_p)'),
        ('speculation: all is taken', _LAW, 'jnp.log(uniform) < ratio', 'jnp.log(uniform) < 0'),
        ('speculation: penalties see nothing of a run', _LAW,
         'count_drawn(places[-1], proposed[:, column])', 'seen'),
        ('speculation: what was taken is not seen later', _DRAFT,
         '(column < count)[:, None], count_drawn', '((column < count) & (column == 0))[:, None], count_drawn'),
        ('speculation: a taken stop token is passed over', _DRAFT,
         'jax.vmap(settings.is_stop, 1, 1)(drawn.token) |', ''),
        ('speculation: rows get more than they may', _ROWS, '| (step >= rows.allowed[:, None])', ''),
        ('speculation: the cache keeps what was rejected', _ROWS,
         'cache=dataclasses.replace(written, length=length + count)', 'cache=written'),
        ('speculation: the number of a draw is that of its pass', _ROWS,
         '(step[:, None] + jnp.arange(num_places)[None])',
         'jnp.broadcast_to(step[:, None], (batch, num_places))')),
    *faults_in('llama_jax/inference/proposers.py',
        ('lookup: the end matches itself', _LOOKUP, 'jnp.where(places < last, length, -1)', 'length'),
        ('lookup: any token of the end matches', _LOOKUP, 'is_equal &=', 'is_equal ='),
        ('draft: does not read the last of what was taken', _DRAFT,
         'jnp.maximum(heard.last - 1, 0)', 'jnp.maximum(heard.last - 1, 0) + 1')),
)
