"""What monitoring reads: names as Prometheus wants them, and all that the page and the dashboard speak of."""

import json
import pathlib
import re

from prometheus_client.parser import text_string_to_metric_families

from tests.serve.serving import Script, scripted, serving

DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs'


def test_metrics_are_named_by_the_rules_and_told_of():
    script = Script('Hello')
    script.num_steps = 7  # before it is served: not the server's
    with serving(lambda: scripted(script)) as (client, _):
        asked = {'model': 'toy', 'prompt': 'ab'}
        assert client.post('/v1/completions', json=asked | {'n': 2}).json()['usage'] == {
            'prompt_tokens': 3, 'completion_tokens': 10, 'total_tokens': 13,
            'prompt_tokens_details': {'cached_tokens': 1},
        }  # fmt: skip
        assert client.post('/v1/completions', json=asked | {'n': 0}).status_code == 400
        response = client.get('/metrics')
    assert response.headers['content-type'].startswith('text/plain; version=0.0.4')
    families = list(text_string_to_metric_families(response.text))
    samples = {
        (sample.name, *sample.labels.values()): sample.value for one in families for sample in one.samples
    }
    assert samples['llama_prompt_tokens_total',] == 3 and samples['llama_generated_tokens_total',] == 10
    assert samples['llama_prompt_cached_tokens_total',] == 1  # of a prompt that is read once for two answers
    assert (
        samples['llama_requests_completed_total',] == 2 and samples['llama_first_token_seconds_count',] == 2
    )
    drafted, accepted = samples['llama_draft_tokens_total',], samples['llama_draft_tokens_accepted_total',]
    assert (drafted, accepted) == (4 * (script.num_steps - 7), 3 * (script.num_steps - 7)) != (0, 0)
    assert samples['llama_requests_refused_total', 'invalid'] == 1
    for family in families:  # much of what `promtool check metrics` says
        assert re.fullmatch('(llama|process)_[a-z_]+', family.name) and family.documentation.endswith('.')
        for sample in family.samples:
            assert sample.name.endswith('_total') == (family.type == 'counter')
            assert not re.search('(milli|minutes|hours|created)', sample.name)
    names = {name for name, *_ in samples}
    page = (DOCS / 'serving.md').read_text()
    told = set(re.findall('`((?:llama|process)_[a-z_]+)', page)) - {'llama_jax', 'process_id'}
    shown = set(
        re.findall(
            'llama_[a-z_]+', json.dumps(json.loads((DOCS / 'serving_dashboard.json').read_text())['panels'])
        )
    )
    assert shown <= names and told - {family.name for family in families} <= names
    assert {family.name for family in families} <= {name.removesuffix('_total') for name in told}
