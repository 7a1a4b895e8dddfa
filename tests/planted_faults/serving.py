"""Faults of the server: each answers as before where nobody goes away, waits, or means harm."""

from tests.planted_faults.fault import faults_in

_GONE = 'serve/worker_test.py::test_a_client_that_goes_away_frees_its_slot'
_SLOW = 'serve/worker_test.py::test_a_client_that_stops_reading_frees_its_slot_and_little_waits_for_it'
_FAILS = (
    'serve/worker_test.py::test_a_step_that_fails_is_its_requests_failure_alone_and_a_second_one_the_servers'
)
_METRICS = 'serve/metrics_test.py::test_metrics_are_named_by_the_rules_and_told_of'
_KEYS = 'serve/refusals_test.py::test_keys_open_and_nothing_else_does'
_PAGES = 'serve/refusals_test.py::test_pages_elsewhere_may_not_ask_unless_they_are_named'
_BODIES = 'serve/refusals_test.py::test_what_is_no_request_at_all_is_refused'
_CONTEXT = 'serve/refusals_test.py::test_nothing_is_cut_to_fit_the_context'
_TEXT = 'serve/chats_test.py::test_what_people_write_never_becomes_a_special_token'
_CHOICES = 'serve/chats_test.py::test_the_official_client_hears_choices_stops_limits_and_log_probabilities'
_RULES = 'inference/constraint_test.py::test_rows_keep_to_their_own_rules_and_others_to_none'
_SPELLED = 'inference/constraint_test.py::test_json_is_spelled_as_it_is_by_python'

# fmt: off
FAULTS = (
    *faults_in('llama_jax/serve/worker.py',
        ('server: a slot goes on for nobody', _GONE, 'self._job.cancel(number)', 'pass'),
        ('server: drafts are not counted', _METRICS, 'self._metrics.tell_drafts(*job.newly_drafted())', 'pass'),
        ('server: choices are drawn alike', _CHOICES, 'stream=stream', 'stream=0'),
        ('server: it goes on failing', _FAILS, 'len(self._failures) == 2', 'len(self._failures) == 3')),
    *faults_in('llama_jax/serve/ticket.py',
        ('server: all waits for who does not read', _SLOW, 'self._num_bytes > self._limit', 'False')),
    *faults_in('llama_jax/serve/access.py',
        ('server: any key opens', _KEYS, 'hmac.compare_digest(digest, known)', 'True'),
        ('server: a body is read whole, whatever its size', _BODIES, 'if len(body) > most:', 'if False:'),
        ('server: it is called by any name', _PAGES, 'name not in self._hosts', 'False')),
    *faults_in('llama_jax/serve/service.py',
        ('server: an answer is cut to fit', _CONTEXT,
         'if room < max(1 if most is None else most, 0):', 'if room < 1:')),
    *faults_in('llama_jax/inference/chat.py',
        ('chat: tags in a message are tags to a template', _TEXT,
         'text = self._whole.sub(lambda found: self._keep(found[0]), text)', 'pass')),
    *faults_in('llama_jax/inference/constraint.py',
        ('constraint: a token is not heard', _RULES, 'self._matcher.consume_token(token)', 'pass'),
        ('constraint: JSON is spelled without spaces', _SPELLED, "'key_separator': ': '", "'key_separator': ':'"),
        ('constraint: all rows keep to the first rule', _RULES, 'else row.mask for row',
         'else next(one.mask for one in rows if one) for row')),
)
