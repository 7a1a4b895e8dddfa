"""The launch guide's files and scripts: the image, JobSet's schema, loops and Slurm scripts run against stand-ins."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from llama_jax.checkpoint.interval import state_bytes
from llama_jax.models.presets import PRESETS

ROOT = pathlib.Path(__file__).resolve().parents[1]
GUIDE = (ROOT / 'docs' / 'launch.md').read_text()
SCRIPTS = re.findall(r'```bash\n(.*?)```', GUIDE, re.DOTALL)


def written_by_the_guide(name):
    [text] = re.findall(rf"cat > {re.escape(name)} <<'END'\n(.*?)^END\n", GUIDE, re.DOTALL | re.MULTILINE)
    return text


# What hadolint asks of such a file: (what is wrong where it is found, its rule).
WRONG = [
    (r'^FROM [^\s:@]+$|^FROM \S+:latest', 'DL3006, DL3007: the base has a version'),
    (r'^ADD ', 'DL3020: COPY takes files'),
    (r'^WORKDIR [^/$]', 'DL3000: an absolute folder'),
    (r'\bsudo\b', 'DL3004: no sudo'),
    (r'^RUN cd ', 'DL3003: WORKDIR changes the folder'),
    (r'pip install (?!.*--no-cache-dir)', 'DL3042: pip keeps no cache in the image'),
    (r'apt-get install (?!.*-y)', 'DL3014: apt-get asks nothing'),
    (r'^(CMD|ENTRYPOINT) (?!\[)', 'DL3025: arguments as JSON'),
    (r'^(MAINTAINER|[a-z]+) ', 'DL4000, instructions are there, in capitals'),
]


def lint(dockerfile):
    return [rule for pattern, rule in WRONG if re.search(pattern, dockerfile, re.MULTILINE)]


def test_the_image_is_the_repositorys_and_well_made():
    text = (ROOT / 'Dockerfile').read_text()
    assert re.findall(r'```dockerfile\n(.*?)```', GUIDE, re.DOTALL) == [text]
    assert not lint(text) and '.git\n' in (ROOT / '.dockerignore').read_text()
    extras = re.search(r'^ARG EXTRAS=(\S+)$', text, re.MULTILINE)
    known = (ROOT / 'pyproject.toml').read_text()
    assert extras and all(re.search(rf'^{name} = \[', known, re.MULTILINE) for name in extras[1].split(','))


@pytest.mark.parametrize(
    ('line', 'rule'),
    [
        ('FROM python', 'DL3006'), ('FROM python:latest', 'DL3007'), ('ADD . .', 'DL3020'),
        ('WORKDIR here', 'DL3000'), ('RUN pip install x', 'DL3042'), ('CMD python x', 'DL3025'),
        ('RUN cd /x && make', 'DL3003'), ('RUN apt-get install x', 'DL3014'), ('RUN sudo x', 'DL3004'),
    ],
)  # fmt: skip
def test_an_ill_made_image_is_found(line, rule):
    assert [found for found in lint(line + '\n') if rule in found]


def jobset():
    yaml = pytest.importorskip('yaml')
    [text] = re.findall(r'```yaml\n(.*?)```', GUIDE, re.DOTALL)
    return yaml.safe_load(text)


def test_the_jobset_is_one_by_its_published_schema():
    jsonschema = pytest.importorskip('jsonschema')
    schema = json.loads((ROOT / 'tests' / 'jobset_schema.json').read_text())
    jsonschema.validate(jobset(), schema)
    for change in (
        lambda job: job['spec']['failurePolicy'].update(maxRestart=1),
        lambda job: job['spec']['replicatedJobs'][0].update(replicas='one'),
        lambda job: job['spec']['replicatedJobs'][0]['template']['spec']['template']['spec'].update(args=[]),
        lambda job: job.update(apiVersion='jobset.x-k8s.io/v1'),
    ):
        wrong = jobset()
        change(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    [replicated] = jobset()['spec']['replicatedJobs']
    pods = replicated['template']['spec']
    topology = pods['template']['spec']['nodeSelector']['cloud.google.com/gke-tpu-topology']
    chips = eval(topology.replace('x', '*'))
    [container] = pods['template']['spec']['containers']
    limit = container['resources']['limits']['google.com/tpu']
    assert pods['parallelism'] == pods['completions'] == chips // limit


def test_each_host_has_four_chips():
    """Sizes of groups and pools are those of the topologies beside them."""
    for script in SCRIPTS:
        for topology, size in re.findall(
            r'topology=(\d+x\d+x\d+).*?--(?:size|num-nodes)=(\d+)', script, re.DOTALL
        ):
            if int(size):
                assert eval(topology.replace('x', '*')) == 4 * int(size)


def test_the_table_of_what_is_saved_in_a_grace():
    rows = re.findall(r'^\| (\d+) s \| (\w+) \| (\w+) \| (\w+) \|$', GUIDE, re.MULTILINE)
    assert [int(grace) for grace, *_ in rows] == [15, 30, 105]
    sizes = {name: state_bytes(config) for name, config in PRESETS.items()}
    for grace, *names in rows:
        for hosts, name in zip((4, 32, 256), names, strict=True):
            fitting = max(size for size in sizes.values() if size <= int(grace) * hosts * 1e9)
            assert sizes[name] == fitting, (grace, hosts)


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='needs shellcheck: the extra `lint`')
def test_shellcheck_finds_nothing():
    # Paths of the guide hold no spaces; $! in a trap is meant to be read when it comes.
    command = [
        'shellcheck',
        '--shell=bash',
        '--severity=warning',
        '--exclude=SC2086,SC2064,SC2154,SC2164',
        '-',
    ]
    for script in (*SCRIPTS, written_by_the_guide('restart.sh'), written_by_the_guide('pretrain.sh')):
        subprocess.run(command, input=script, text=True, check=True)


# Stands for a run: notes that it was started, and ends as $RUN says for that start.
RUN = """#!/bin/bash
echo "$@" >> starts
outcome=$(echo $RUN | cut -d, -f$(wc -l < starts))
case $outcome in
  done) touch $WORKDIR/report.json ;;
  waits) trap 'exit 0' TERM; echo listens; while :; do sleep 0.05; done ;;
  *) exit $outcome ;;
esac
"""


def stand_ins(folder, **programs):
    """A folder of programs in the place of others, and the environment that finds them first."""
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    (folder / 'python').write_text(python)
    (folder / 'python').chmod(0o755)
    return {'PATH': f'{folder}:{os.environ["PATH"]}', 'WORKDIR': str(folder), 'HOME': str(folder)}


@pytest.mark.parametrize(
    ('outcomes', 'status', 'starts'), [('1,137,done', 0, 3), ('2', 2, 1), ('0,done', 0, 2), ('waits', 0, 1)]
)
def test_the_restart_loop_goes_on_until_the_run_has_finished(tmp_path, outcomes, status, starts):
    environment = stand_ins(tmp_path, run=RUN, nap='#!/bin/bash\n')
    script = written_by_the_guide('restart.sh').replace('sleep 10', 'nap')
    process = subprocess.Popen(
        ['bash', '-c', script, 'restart.sh', 'run', '--config=X'],
        env=environment | {'RUN': outcomes}, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process.stdout:
        if outcomes == 'waits':
            assert process.stdout.readline() == 'listens\n'
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == status
    assert (tmp_path / 'starts').read_text() == '--config=X\n' * starts


SLURM = [script for script in SCRIPTS if '#SBATCH' in script]


@pytest.mark.parametrize('script', SLURM, ids=['plain', 'containers'])
@pytest.mark.parametrize(('run', 'status', 'requeued'), [('0', 0, True), ('done', 0, False), ('1', 1, False)])
def test_a_slurm_job_is_queued_again_until_the_run_has_finished(tmp_path, script, run, status, requeued):
    srun = RUN.replace('echo "$@" >> starts', '[ "$#" -gt 5 ] && printf "%s\\n" "$*" >> starts')
    scontrol = '#!/bin/bash\necho "$@" > requeued\n'
    environment = stand_ins(tmp_path, srun=srun, scontrol=scontrol) | {
        'RUN': run, 'SLURM_JOB_ID': '17', 'SLURM_CPUS_PER_TASK': '96', 'DATA': 'rows', 'TOKENIZER': 'file',
    }  # fmt: skip
    done = subprocess.run(['bash', '-c', script], env=environment, cwd=tmp_path)
    assert done.returncode == status
    assert (tmp_path / 'requeued').exists() == requeued
    if requeued:
        assert (tmp_path / 'requeued').read_text() == 'requeue 17\n'
    started = (tmp_path / 'starts').read_text()
    assert (
        started.startswith('--kill-on-bad-exit=1 --cpus-per-task=96') and f'--workdir={tmp_path}' in started
    )


def test_the_slurm_scripts_ask_for_the_same():
    first, second = (re.findall(r'#SBATCH .*', script) for script in SLURM)
    assert first == second
    assert '--container-image=' in SLURM[1] and '--container-mounts=' in SLURM[1]


def test_what_boots_a_host_installs_and_starts_the_loop(tmp_path):
    """The script that the guide writes is one that bash reads, with the loop inside."""
    [block] = [script for script in SCRIPTS if 'cat > host.sh' in script]
    variables = {'WORKDIR': 'gs://B/run', 'DATA': 'gs://B/rows', 'TOKENIZER': 'gs://B/t'}
    subprocess.run(['bash', '-c', block], env=os.environ | variables, cwd=tmp_path, check=True)
    host = (tmp_path / 'host.sh').read_text()
    assert written_by_the_guide('restart.sh') in host and '--workdir=gs://B/run' in host
    assert ':$PATH\n' in host  # of the host, not of who wrote it
    subprocess.run(['bash', '-n'], input=host, text=True, check=True)
