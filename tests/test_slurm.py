"""Slurm: `labtasker sbatch`, and what a real Slurm on this machine does with what it submits; PBS and Kubernetes as docs/clusters.rst has them.

`tox -e slurm` installs Slurm, where that can be, and says so in LT_TEST_SLURM; the fixture `slurm` starts it in a folder
of the test's own. Each job leaves a line in the file `runs` when it begins, and one in `done` when it has done its work:
so a run that is doubled is seen. What a test starts has its working folder for its own: so a process that stays is seen.
"""
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import stat
import sys

import pytest

import harness
import labtasker
import labtasker_cli
from harness import MODULE, wait_until
from test_readme import blocks

# ---- the script, without Slurm

NO_MORE = re.compile("labtasker: (?:done: |no matching tasks)")  # a loop's last line
TRAIN = ["--", "python", "train.py", "--lr", "%(lr)"]
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=labtasker
#SBATCH --chdir={cwd}
#SBATCH --output=labtasker-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --ntasks=1
#SBATCH --array=0-7%4
#SBATCH -t 4:00:00
#SBATCH --mem=4G

export LABTASKER_ROOT={cwd}/.labtasker

# exec: the loop takes this shell's place, so that signals reach it.
exec {python} {module} loop -f 'args.lr > 0.1' --grace=30 \\
    -- python train.py --lr '%(lr)'
"""


def dry_run(place, *words, **options):
    """Return (the script's lines, stderr) that `sbatch --dry-run` prints."""
    result = place.cli("sbatch", "--dry-run", *words, **options)
    return result.lines, result.stderr


def options_of(lines):
    """Return the #SBATCH options of a script."""
    return [line[len("#SBATCH "):] for line in lines if line.startswith("#SBATCH ")]


def command_of(lines):
    """Return the words that the script of one loop puts in its shell's place."""
    text = "\n".join(lines).replace("\\\n", "")
    return shlex.split(text[text.index("\nexec ") + 6:])


def test_the_script_is_one_that_people_would_write(home):
    lines, _ = dry_run(home, "--array=0-7%4", "-t", "4:00:00", "-f", "args.lr > 0.1", "--mem", "4G", "--grace=30", *TRAIN)
    assert "\n".join(lines) + "\n" == SCRIPT.format(cwd=home.cwd, python=sys.executable, module=MODULE)


@pytest.mark.parametrize("words, options, loop", [
    (["-c", "4"], ["-c 4"], []),
    (["-c4", "-pgpu"], ["-c 4", "-p gpu"], []),
    (["--cpus-per-task", "4", "--exclusive", "-t", "10"], ["--cpus-per-task=4", "--exclusive", "-t 10"], []),
    (["--exclusive=user", "--nice", "--mem=4G"], ["--exclusive=user", "--nice", "--mem=4G"], []),
    (["--gpus-per-task=1", "-G", "2"], ["--gpus-per-task=1", "-G 2"], []),
    (["--gpus=2"], ["--gpus=2"], []),
    (["--gpus", "a100:2"], ["--gpus=a100:2"], []),
    (["--site-plugin", "on", "--site-switch", "-p", "x"], ["--site-plugin=on", "--site-switch", "-p x"], []),
    (["-v", "-p", "gpu", "--max-tasks", "3"], ["-p gpu"], ["-v", "--max-tasks", "3"]),
    (["--no-use-pty", "--eta-max=1h", "--qos", "low"], ["--qos=low"], ["--no-use-pty", "--eta-max=1h"]),
    (["-f", '{"args.lr": 1}'], [], ["-f", '{"args.lr": 1}']),
], ids=" ".join)
def test_what_the_loop_does_not_know_is_for_sbatch(home, words, options, loop):
    plain = options_of(dry_run(home, *TRAIN)[0])
    lines, _ = dry_run(home, *(words + TRAIN))
    assert [line for line in options_of(lines) if line not in plain] == options
    assert command_of(lines) == [sys.executable, str(MODULE), "loop"] + loop + TRAIN


@pytest.mark.parametrize("words, gone, there", [
    (["-J", "mine"], "--job-name", "-J mine"),
    (["-D", "/tmp"], "--chdir", "-D /tmp"),
    (["-o", "x.log"], "--output", "-o x.log"),
    (["--open-mode=truncate"], "--open-mode=append", "--open-mode=truncate"),
    (["--no-requeue"], "--requeue", "--no-requeue"),
    (["-n", "4"], "--ntasks", "-n 4"),
    (["--nodes=2"], "--ntasks", "--nodes=2"),
    (["--ntasks-per-node", "2"], "--ntasks=", "--ntasks-per-node=2"),
])
def test_what_was_typed_takes_the_place_of_what_is_usual(home, words, gone, there):
    assert [line for line in options_of(dry_run(home, *TRAIN)[0]) if line.startswith(gone)]
    lines = options_of(dry_run(home, *(words + TRAIN))[0])
    assert there in lines
    assert not [line for line in lines if line.startswith(gone) and line != there]


@pytest.mark.parametrize("words, there", [
    (["--signal=USR2@30"], "--signal=B:USR2@30"),
    (["--signal", "B:10@30"], "--signal=B:10@30"),
    (["--signal=R:USR2@30"], "--signal=R:USR2@30"),
    (["-N", "2", "--signal=USR2@30"], "--signal=USR2@30"),
])
def test_a_signal_goes_to_the_loop(home, words, there):
    """Without B: Slurm sends it to the job's steps, which srun makes, and not to the script."""
    lines, _ = dry_run(home, *(words + TRAIN))
    assert [line for line in options_of(lines) if line.startswith("--signal")] == [there]
    assert "SIG" not in str(dry_run(home, *TRAIN)[0]) and "--signal" not in str(dry_run(home, *TRAIN)[0])
    if "-N" not in words:
        text = "\n".join(dry_run(home, "--server", *(words + TRAIN))[0])
        name = there.rpartition(":")[2].partition("@")[0]
        assert "kill -%s " % name in text and text.count("trap ") == 2


def test_several_tasks_are_started_by_srun(home):
    lines, _ = dry_run(home, "-n", "4", "-c", "2", *TRAIN)
    assert command_of(lines)[:3] == ["srun", "--cpus-per-task=2", sys.executable]
    for one in (["-n", "1"], ["-N", "1"], ["--ntasks-per-node=1"]):
        lines, _ = dry_run(home, *(one + TRAIN))
        assert command_of(lines)[0] == sys.executable
        assert ("--ntasks=1" in options_of(lines)) == (one[0] != "-n")


def test_an_option_of_one_submission_is_not_in_the_script(home):
    lines, said = dry_run(home, "-d", "afterok:7", "--hold", *TRAIN)
    assert "afterok" not in "\n".join(lines) and "--hold" not in "\n".join(lines)
    assert "sbatch -d afterok:7 --hold" in said


NASTY = "it's \\ # a \"b\" $HOME `id` \u00e9"


def test_words_reach_the_loop_as_they_were_typed(home):
    """The script is run by bash with the loop's place taken by a command that prints its words."""
    lines, _ = dry_run(home, "-f", "args.x == 'a  b'", "--", "echo", NASTY, "two\nlines", "%(lr)", "", "-x")
    text = "\n".join(lines).replace("exec %s %s" % (sys.executable, MODULE), "exec %s -c %s" % (
        sys.executable, shlex.quote("import json, sys; print(json.dumps(sys.argv[1:]))")))
    assert "json" in text
    result = harness.run(["bash", "-c", text], home.cwd)
    assert labtasker.parse_json(result.stdout) == [
        "loop", "-f", "args.x == 'a  b'", "--", "echo", NASTY, "two\nlines", "%(lr)", "", "-x"]


@pytest.mark.parametrize("words, code, what", [
    ([], 2, "what should the loops run? python3 -m labtasker sbatch"),
    (["--array=0-3"], 2, "what should the loops run?"),
    (["--array=0-3", "--"], 2, "what should the loops run?"),
    (["python", "train.py"], 2, "unexpected argument python: the command goes after --"),
    (["--exclusive", "gpu", "--", "true"], 2, "unexpected argument gpu"),
    (["--wrap=true", "--", "true"], 2, "instead of --wrap the command goes after --"),
    (["--", "x", "%(lr"], 2, "not closed"),
    (["-f", "lr > 1", "--", "x"], 2, "args.lr"),
    (["--max-tasks", "many", "--", "x"], 2, "max-tasks"),
    (["--max-tasks"], 2, "max-tasks"),
    (["--cmd", "a", "--", "x"], 2, "One of a command"),
    (["--comment", "a\nb", "--", "x"], 2, "more than one line"),
    (["--server", "--listen", "head", "--", "x"], 2, "HOST:PORT"),
    (["--server", "--server-wait", "soon", "--", "x"], 2, "server-wait"),
])
def test_what_can_not_be_is_refused_before_anything_is_submitted(home, words, code, what):
    result = home.cli("sbatch", *words, check=False, env=fake_sbatch(home))
    assert (result.returncode, result.stdout) == (code, ""), result
    assert what in result.stderr and result.stderr.startswith("labtasker: error: ")
    assert not (home.cwd / "submitted").exists()


def fake_sbatch(place, text='cat > submitted; echo "$@" > words; echo "17;cluster"'):
    """Return an environment in which `sbatch` runs a shell's `text`."""
    folder = place.cwd / "fake"
    folder.mkdir()
    path = folder / "sbatch"
    path.write_text("#!/bin/sh\n%s\n" % text)
    path.chmod(0o755)
    return {"PATH": "%s:%s" % (folder, os.environ["PATH"])}


def test_the_script_is_submitted_and_the_job_s_id_printed(home):
    result = home.cli("sbatch", "--array=0-3", "-d", "afterok:3", *TRAIN, env=fake_sbatch(home))
    assert result.stdout == "17;cluster\n"
    assert (home.cwd / "words").read_text() == "--parsable -d afterok:3\n"
    assert (home.cwd / "submitted").read_text().splitlines() == dry_run(home, "--array=0-3", *TRAIN)[0]


def test_what_a_job_was_told_of_itself_does_not_reach_the_job_that_it_submits(home):
    of_job = ["SLURM_JOB_ID", "SLURM_JOBID", "SLURM_MEM_PER_NODE", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_CPU_BIND",
              "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_TRES_PER_TASK", "SLURM_SOMETHING_NEW", "SLURMD_NODENAME", "SRUN_DEBUG",
              "SBATCH_CPU_BIND", "SBATCH_MEM_BIND_TYPE", "LABTASKER_TASK_ID", "LABTASKER_RUN_ID", "LABTASKER_END_TIME", "LABTASKER_SLOT"]
    of_others = ["SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_EXPORT",
                 "LABTASKER_QUEUE", "OMP_NUM_THREADS"]
    env = dict(fake_sbatch(home, "cat > /dev/null; env > seen; echo 17"), **dict.fromkeys(of_job + of_others, "7"))
    home.cli("sbatch", *TRAIN, env=env)
    seen = {line.partition("=")[0] for line in (home.cwd / "seen").read_text().splitlines()}
    assert seen.issuperset(of_others) and not seen.intersection(of_job)


def test_jobs_of_a_loop_keep_what_srun_finds_the_loops_allocation_by(home):
    home.submit("--", "--n=1")
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SLURM_CONF": "/etc/slurm.conf", "SLURM_JOB_END_TIME": "99999999999"}
    seen = home.cli("loop", "--", "sh", "-c", "env | grep ^SLURM_ | sort", "%(n)", env=env).lines
    assert seen == sorted("%s=%s" % pair for pair in env.items())


@pytest.mark.parametrize("text", ["cat > /dev/null; echo no such partition >&2; exit 3", "echo no such partition >&2; exit 3"])
def test_what_sbatch_refuses_it_says_itself(home, text):
    result = home.cli("sbatch", "-p", "nope", *TRAIN, check=False, env=fake_sbatch(home, text))
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.splitlines()[-1] == "no such partition"


def test_the_id_is_printed_at_once_also_where_sbatch_waits_for_the_job(home):
    text = "cat > /dev/null; echo 17; until test -e gate; do sleep 0.05; done; exit 4"
    waiting = home.start_cli("sbatch", "--wait", *TRAIN, env=fake_sbatch(home, text))
    wait_until(lambda: "\n17\n" in waiting.log_path.read_text(), "the id is printed", never=lambda _: waiting.poll())
    assert waiting.poll() is None
    (home.cwd / "gate").write_text("")
    assert waiting.wait(20) == 4


def test_a_host_without_sbatch_still_prints_the_script(home):
    nowhere = home.cwd / "nowhere"
    nowhere.mkdir()
    result = home.cli("sbatch", *TRAIN, check=False, env={"PATH": str(nowhere)})
    assert result.returncode == 1 and "no sbatch on this host's PATH" in result.stderr and "--dry-run" in result.stderr
    assert dry_run(home, *TRAIN, env={"PATH": str(nowhere)})[0][0] == "#!/bin/bash"


def test_the_configuration_is_that_of_the_folder_it_is_typed_in(home):
    inner = home.cwd / "a b" / "c"
    inner.mkdir(parents=True)
    (home.cwd / ".labtasker").mkdir()
    result = harness.run_cli(["sbatch", "--dry-run"] + TRAIN, inner)
    assert "export LABTASKER_ROOT=%s/.labtasker" % home.cwd in result.lines
    assert "#SBATCH --chdir='%s'" % inner in result.lines
    lines, _ = dry_run(home, *TRAIN, env={"LABTASKER_ROOT": "/else where"})
    assert "export LABTASKER_ROOT='/else where'" in lines


def test_a_folder_in_which_slurm_can_keep_no_log_is_refused(home):
    odd = home.cwd / "a\\b"
    odd.mkdir()
    result = harness.run_cli(["sbatch", "--dry-run"] + TRAIN, odd, check=False)
    assert result.returncode == 2 and "say where with --output=FILE" in result.stderr
    assert "#SBATCH --output=/x/%j.log" in harness.run_cli(["sbatch", "--dry-run", "--output=/x/%j.log"] + TRAIN, odd).lines


def test_no_password_is_in_the_script(home):
    env = {"LABTASKER_URL": "http://head:9321", "LABTASKER_QUEUE": "sweep", "LABTASKER_PASSWORD": "s3cret"}
    lines, said = dry_run(home, *TRAIN, env=env)
    assert [line for line in lines if line.startswith("export ")] == [
        "export LABTASKER_ROOT=%s/.labtasker" % home.cwd, "export LABTASKER_URL=http://head:9321",
        "export LABTASKER_QUEUE=sweep"]
    assert "s3cret" not in "\n".join(lines) + said
    refused = home.cli("sbatch", "--dry-run", *TRAIN, env=dict(env, LABTASKER_URL="http://me:s3cret@head:9321"), check=False)
    assert refused.returncode == 1 and "s3cret" not in refused.stdout + refused.stderr


def test_a_store_without_a_server_is_for_one_host(home):
    assert "add --server" in dry_run(home, *TRAIN)[1]
    assert "add --server" not in dry_run(home, "--server", *TRAIN)[1]
    assert dry_run(home, *TRAIN, env={"LABTASKER_URL": "http://head:9321", "LABTASKER_PASSWORD": "x"})[1] == ""


def test_a_server_is_for_a_store_in_a_folder(home):
    result = home.cli("sbatch", "--server", *TRAIN, check=False, env={"LABTASKER_URL": "http://head:9321"})
    assert result.returncode == 2 and "http://head:9321 is configured" in result.stderr


@pytest.mark.parametrize("words", [[], ["--array=0-3"], ["-n2", "--array=0-3", "--listen", "[::]:9321", "--server-wait", "90 s"]])
def test_the_script_with_a_server_is_good_bash(home, words):
    lines, _ = dry_run(home, "--server", *(words + TRAIN))
    harness.run(["bash", "-n"], home.cwd, stdin="\n".join(lines))
    text = "\n".join(lines)
    assert ("serve --host :: --port 9321" if "-n2" in words else "serve --host 0.0.0.0 --port 0") in text
    assert ("server wait --timeout '90 s'" if "-n2" in words else "server wait --timeout 2m") in text
    assert ("scancel" in text) == bool(words)


BROKEN = """
import os, sys, time
if os.environ["SLURM_ARRAY_TASK_ID"] == "0":
    with open("failed", "a") as file:
        file.write(sys.argv[1] + "\\n")
    sys.exit("no GPU")


def failed():
    if not os.path.exists("failed"):
        return 0
    with open("failed") as file:
        return len(file.readlines())


while failed() < 3:
    time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--server"]])
def test_a_broken_machine_ends_its_own_task_of_an_array_with_4(home, words):
    """Slurm is faked: each script is started here, with what Slurm says of an array. The broken one runs the server too,
    which stays for the others."""
    home.write("job.py", BROKEN)
    home.cli("task", "submit", "--max-retries=9", "--grid", "--", "--n=0:11:1")
    text = "\n".join(dry_run(home, "--array=0-3", "--max-consecutive-failures=3", *(words + [
        "--", sys.executable, "job.py", "%(n)"]))[0])
    env = fake_sbatch(home, "false")
    for name, does in (("squeue", "ls running"), ("scancel", 'echo "$@" >> cancelled')):
        path = home.write("fake/" + name, "#!/bin/sh\n%s\n" % does)
        path.chmod(0o755)
    script = home.write("script.sh", text)
    (home.cwd / "running").mkdir()
    def begin(number):
        array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": "0", "SLURM_JOB_ID": "2%d" % number}
        return home.start("bash", "-c", 'touch running/$0; bash "$1"; code=$?; rm running/$0; exit $code', str(number), str(script),
                          env=dict(env, **array))
    jobs = [begin(number) for number in range(4)]
    wait_until(lambda: all(job.poll() is not None for job in jobs), "all are over", timeout_s=90)
    said = [job.log_path.read_text() for job in jobs]
    assert [job.returncode for job in jobs] == [4, 0, 0, 0], said
    assert "3 tasks in a row failed" in said[0] and "all with: no GPU" in said[0]
    tasks = home.tasks()
    assert [task["status"] for task in tasks] == ["success"] * 12 and sum(task["retries"] for task in tasks) == 3


@pytest.mark.slow
def test_server_wait_says_which_server_there_is(server_home):
    assert server_home.cli("server", "wait").stdout == server_home.server.url + "\n"


@pytest.mark.slow
def test_server_wait_finds_the_server_of_the_folder_as_soon_as_it_is_there(home):
    waiting = home.start_cli("server", "wait", "--timeout", "60")
    with harness.Server(home.folder, queue=None) as server:
        assert waiting.wait(60) == 0
        assert waiting.log_path.read_text() == server.url + "\n"


def test_server_wait_gives_up_and_leaves_the_store_alone(home):
    home.submit("--", "--x=1")
    home.write(".labtasker/server.json", '{"server": "gone", "key": "k", "addresses": ["http://127.0.0.1:9"]}')
    before = {path: path.read_bytes() for path in home.folder.iterdir()}
    result = home.cli("server", "wait", "--timeout", "0", check=False)
    assert result.returncode == 1 and result.stdout == "" and "no server of %s" % home.folder in result.stderr
    assert {path: path.read_bytes() for path in home.folder.iterdir()} == before


def test_only_a_server_that_is_away_is_waited_for(home, monkeypatch):
    def answers(error):
        raise error
    monkeypatch.setenv("LABTASKER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LABTASKER_PASSWORD", "p")
    monkeypatch.setattr(labtasker_cli, "health_check", lambda: answers(labtasker.LabtaskerConnectError("no answer")))
    assert labtasker_cli.living_server() is None
    monkeypatch.setattr(labtasker_cli, "health_check", lambda: answers(labtasker.NotFound("no such queue")))
    with pytest.raises(labtasker.NotFound):
        labtasker_cli.living_server()


def test_an_sbatch_that_ends_without_reading_has_its_code_returned(home, monkeypatch):
    home.write("bin/sbatch", "#!/bin/sh\nexec <&-\necho 77\nexit 3\n").chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (home.cwd / "bin", os.environ["PATH"]))
    shown = []
    monkeypatch.setattr(labtasker_cli, "say", shown.append)
    assert labtasker_cli.submit_script("#" * 10 ** 6, []) == 3 and shown == ["77"]


# ---- PBS and Kubernetes, as far as they can be checked without them


def documented(word):
    """Return the one block of the README and docs/ that has this word."""
    found = [text for _, _, text in blocks() if word in text]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.slow
def test_the_pbs_script_of_the_docs_runs_a_loop(home):
    """PBS starts it in the home folder, with its variables."""
    text = documented("#PBS")
    assert text.startswith("#!/bin/bash\n#PBS ")
    for path in (MODULE, MODULE.with_name("labtasker_cli.py")):
        shutil.copy(str(path), str(home.cwd))
    home.write("train.py", "import os, sys; print(sys.argv[1:], os.environ['PBS_JOBID'])")
    one = home.submit("--", "--lr=0.1", "--model=vit")
    result = harness.run(["bash", "-c", text], "/", env={
        "PATH": home.path(), "PYTHONPATH": "", "PBS_O_WORKDIR": str(home.cwd), "PBS_JOBID": "17[0].head", "PBS_ARRAY_INDEX": "0",
        "PBS_WALLTIME": "3600", "PBS_ENVIRONMENT": "PBS_BATCH"})
    assert "['--lr', '0.1', '--model', 'vit'] 17[0].head" in result.stdout
    assert home.task(one)["status"] == "success"


@pytest.mark.slow
def test_the_kubernetes_job_of_the_docs_runs_a_loop(server_home):
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(documented("kind: Job"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    container, = pod["containers"]
    program, words = container["command"][:4], container["command"][4:]
    assert program == ["python3", "-m", "labtasker", "loop"]
    options = labtasker.parse("loop", words)
    assert options.rest[:2] == ["python3", "train.py"]
    assert options.grace_s < pod["terminationGracePeriodSeconds"]
    env = {row["name"]: row for row in container["env"]}
    assert set(env) == {"LABTASKER_URL", "LABTASKER_QUEUE", "LABTASKER_PASSWORD"} and "value" not in env["LABTASKER_PASSWORD"]
    assert all(isinstance(word, str) for word in container["command"]) and "$(" not in " ".join(container["command"])
    server_home.write("train.py", "import sys; print(sys.argv[1:])")
    one = server_home.submit("--", "--lr=0.1", "--model=vit")
    server_home.cli("loop", *words)  # with the variables of its environment, but those of this test's server
    assert server_home.task(one)["status"] == "success"


# ---- a real Slurm

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
GPUS = 2
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=5
OverTimeLimit=0
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 Gres=gpu:{gpus}
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2
"""


def why_no_slurm():
    """Return why there can be no Slurm here, or nothing."""
    if not os.environ.get("LT_TEST_SLURM"):
        return "LT_TEST_SLURM is not set: tox -e slurm installs Slurm and sets it"
    missing = [name for name in PROGRAMS if not find_program(name)]
    if missing:
        return "there is no %s here: apt-get install slurm-wlm munge" % ", ".join(missing)
    return "" if os.getuid() == 0 else "a Slurm of the test's own has to be started by root"


def find_program(name):
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


class Slurm:
    """A Slurm with one node, this machine: `folder`, `env`."""

    def __init__(self, folder):
        self.folder = folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool"):
            (folder / name).mkdir()
        sockets = [socket.socket() for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=ports, gpus=GPUS))
        for number in range(GPUS):  # what counts as a GPU's device for Slurm; nobody opens it
            os.mknod(str(folder / ("gpu%d" % number)), stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (folder / "gres.conf").write_text("NodeName=%s Name=gpu File=%s/gpu[0-%d]\n" % (host, folder, GPUS - 1))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)

    def start(self):
        """Start its daemons; return when a job could run."""
        self.run("munged", "--force", *("--%s=%s/munge.%s" % (option, self.folder, end) for option, end in (
            ("key-file", "key"), ("log-file", "log"), ("pid-file", "pid"), ("seed-file", "seed"), ("socket", "socket"))))
        self.run("slurmctld")
        self.run("slurmd")
        wait_until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t", check=False).stdout, "the node is idle", 60)

    def stop(self):
        """End its jobs and daemons, with which nothing of it is left."""
        self.run("scancel", "--user=root", check=False)
        wait_until(lambda: not self.jobs(), "the jobs are over", 60)
        for name in ("slurmd", "slurmctld", "munge"):
            path = self.folder / (name + ".pid")
            pid = int(path.read_text()) if path.exists() else None
            if pid:
                os.kill(pid, signal.SIGTERM)
                wait_until(lambda: not pathlib.Path("/proc/%d" % pid).exists() or is_zombie(pid), name + " ends", 60)

    def run(self, name, *words, check=True, cwd="/", **options):
        """Return the Result of one of its programs."""
        return harness.run([find_program(name)] + list(words), cwd, check=check, env=self.env, **options)

    def jobs(self, *words):
        """Return {job id, 7_3 in an array: state} of what is in its queue."""
        rows = self.run("squeue", "-h", "-r", "-o", "%i %T", *words).lines
        return dict(row.split() for row in rows)

    def wait_for(self, job, state):
        """Return when the job is in this state; it may not have ended."""
        wait_until(lambda: self.jobs().get(job) == state, "job %s is %s" % (job, state), 120,
                   never=lambda _: job not in self.jobs())

    def wait_for_end(self, job, timeout_s=120):
        """Return when nothing of the job, an array too, is in the queue."""
        wait_until(lambda: not [one for one in self.jobs() if one.split("_")[0] == job], "job %s is over" % job, timeout_s)


def is_zombie(pid):
    try:
        return pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of the tests' own."""
    reason = why_no_slurm()
    if reason:
        pytest.skip(reason)
    found = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    except BaseException:
        for path in sorted(found.folder.glob("*.log")):
            print("--- %s\n%s" % (path, path.read_text()[-4000:]))
        raise
    finally:
        found.stop()


JOB = """
import os, sys, time
n = sys.argv[1]
def tell(name):
    with open(name, "a") as file:
        file.write(n + "\\n")
tell("runs")
{body}
tell("done")
"""
GATED = "while not os.path.exists('gate'): time.sleep(0.05)"


class Sweep:
    """Tasks n=0.. in the store of a working folder on a Slurm; `runs` and `done` say what their jobs did."""

    def __init__(self, place, slurm):
        self.place, self.slurm, self.cwd = place, slurm, place.cwd
        place.env.update(slurm.env)

    def submit(self, count, body="", **options):
        """Queue `count` tasks, whose job does what `body` says between its two lines."""
        self.place.write("job.py", JOB.format(body=body))
        self.place.cli("task", "submit", "--grid", *(
            ["--%s=%s" % (name.replace("_", "-"), value) for name, value in options.items()] + ["--", "--n=0:%d:1" % (count - 1)]))

    def sbatch(self, *words):
        """Return the id of the job of loops that `labtasker sbatch` submits."""
        return self.place.cli("sbatch", *(words + ("--", sys.executable, "job.py", "%(n)"))).stdout.strip()

    def serve(self):
        """Return the id of a job that is the server of the store, once it answers."""
        text = "exec %s %s serve --host 0.0.0.0 --port 0" % (shlex.quote(sys.executable), shlex.quote(str(MODULE)))
        job = self.slurm.run("sbatch", "--parsable", "--output=server-%j.log", "--wrap", text, cwd=self.cwd).stdout.strip()
        self.place.cli("server", "wait", "--timeout", "60")
        return job

    def told(self, name):
        """Return the numbers in `runs` or `done`, in order."""
        path = self.cwd / name
        return list(map(int, path.read_text().split())) if path.exists() else []

    def wait_for_runs(self, count):
        wait_until(lambda: len(self.told("runs")) >= count, "%d runs have begun" % count, 120)

    def open_gate(self):
        (self.cwd / "gate").write_text("")

    def tasks(self):
        """Return the tasks by their numbers."""
        return sorted(self.place.tasks(), key=lambda task: task["args"]["n"])

    def logs(self):
        """Return what all jobs wrote."""
        return "\n".join("--- %s\n%s" % (path.name, path.read_text()) for path in sorted(self.cwd.glob("*.log")))

    def check_done_once(self, count, interrupted=0):
        """All succeeded, each did its work once, runs that were handed back were not charged, and nothing is left."""
        tasks = self.tasks()
        assert [task["status"] for task in tasks] == ["success"] * count, self.logs()
        assert sorted(self.told("done")) == list(range(count)), self.logs()
        assert len(self.told("runs")) == count + interrupted, self.logs()
        assert sum(task["interruptions"] for task in tasks) == interrupted, self.logs()
        assert [task["retries"] for task in tasks] == [0] * count, self.logs()
        self.check_nothing_runs()

    def check_nothing_runs(self):
        """No process is left that was started in the working folder."""
        wait_until(lambda: not self.processes(), "no process is left", 30)

    def processes(self):
        """Return the command lines of the processes whose working folder is this test's, but for the test itself."""
        found = []
        for pid in (name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()):
            try:
                if os.path.realpath("/proc/%s/cwd" % pid) == os.path.realpath(str(self.cwd)):
                    found.append(pathlib.Path("/proc/%s/cmdline" % pid).read_bytes().replace(b"\0", b" "))
            except OSError:  # it ended meanwhile
                pass
        return [one for one in found if one]  # a zombie has none


@pytest.fixture
def sweep(home, cluster):
    """A Sweep whose jobs are gone when the test is over."""
    found = Sweep(home, cluster)
    yield found
    print("%s\n%s" % (cluster.jobs(), found.logs()))  # seen where a test failed
    cluster.run("scancel", "--user=root")
    wait_until(lambda: not cluster.jobs(), "the jobs are over", 60)


MEETING = "while len(open('runs').readlines()) < 3: time.sleep(0.05)"  # at least three at a time


def test_an_array_drains_a_sweep_over_a_server_that_runs_in_a_job(sweep):
    server = sweep.serve()
    sweep.submit(30, MEETING)
    job = sweep.sbatch("--array=0-3", "-t", "10")
    assert re.fullmatch(r"\d+", job)
    sweep.slurm.wait_for_end(job)
    assert sorted(path.name for path in sweep.cwd.glob("labtasker-*.log")) == ["labtasker-%s_%d.log" % (job, i) for i in range(4)]
    assert len({task["worker_id"] or task["attempts"][-1]["worker_id"] for task in sweep.tasks()}) >= 3
    sweep.slurm.run("scancel", server)
    sweep.slurm.wait_for_end(server)
    assert not (sweep.place.folder / "server.json").exists()
    sweep.check_done_once(30)


def test_the_server_s_job_ends_and_another_one_on_the_same_store_goes_on(sweep):
    first = sweep.serve()
    sweep.submit(12, GATED)
    job = sweep.sbatch("--array=0-3", "-t", "10")
    sweep.wait_for_runs(4)
    sweep.slurm.run("scancel", first)
    sweep.slurm.wait_for_end(first)
    sweep.open_gate()  # their runs end while there is no server
    wait_until(lambda: len(sweep.told("done")) == 4, "the runs are over", 60)
    assert len(sweep.slurm.jobs()) == 4, sweep.logs()
    second = sweep.serve()
    assert second != first
    sweep.slurm.wait_for_end(job)
    sweep.slurm.run("scancel", second)
    sweep.slurm.wait_for_end(second)
    sweep.check_done_once(12)


def test_scancel_hands_the_task_back_and_the_next_job_finishes_it(sweep):
    sweep.submit(2, GATED)
    job = sweep.sbatch("--array=0-1", "-t", "10")
    sweep.wait_for_runs(2)
    sweep.slurm.run("scancel", job)
    sweep.slurm.wait_for_end(job)
    back = sweep.tasks()
    assert [(task["status"], task["retries"], task["interruptions"]) for task in back] == [("pending", 0, 1)] * 2, sweep.logs()
    assert "SIGTERM" in back[0]["reason"]
    sweep.check_nothing_runs()
    sweep.open_gate()
    sweep.slurm.wait_for_end(sweep.sbatch("-t", "10"))
    sweep.check_done_once(2, interrupted=2)


def test_a_job_at_its_time_limit_hands_its_task_back_and_the_next_job_finishes_it(sweep):
    sweep.submit(1, GATED)
    job = sweep.sbatch("-t", "1")
    sweep.wait_for_runs(1)
    sweep.slurm.wait_for_end(job, 180)
    assert "DUE TO TIME LIMIT" not in sweep.logs(), "the loop is done before"
    back, = sweep.tasks()
    assert (back["status"], back["retries"], back["interruptions"]) == ("pending", 0, 1), sweep.logs()
    assert "time" in back["reason"]
    sweep.check_nothing_runs()
    sweep.open_gate()
    sweep.slurm.wait_for_end(sweep.sbatch("-t", "10"))
    sweep.check_done_once(1, interrupted=1)


def test_a_loop_that_does_not_know_its_time_limit_hands_its_task_back_all_the_same(sweep):
    """By the SIGTERM at the end: squeue can't be found on the node."""
    sweep.submit(1, GATED)
    text = sweep.place.cli("sbatch", "--dry-run", "-t", "1", "--", sys.executable, "job.py", "%(n)").stdout
    kept = sweep.place.write("kept.sh", text.replace("\nexec ", "\nexport PATH=/nowhere\nexec "))
    job = sweep.slurm.run("sbatch", "--parsable", str(kept)).stdout.strip()
    sweep.wait_for_runs(1)
    sweep.slurm.wait_for_end(job, 180)
    assert "DUE TO TIME LIMIT" in sweep.logs()
    back, = sweep.tasks()
    assert (back["status"], back["retries"], back["interruptions"]) == ("pending", 0, 1), sweep.logs()
    assert "SIGTERM" in back["reason"]
    sweep.check_nothing_runs()
    sweep.open_gate()
    sweep.slurm.wait_for_end(sweep.sbatch("-t", "10"))
    sweep.check_done_once(1, interrupted=1)


def test_what_can_not_finish_in_what_is_left_is_not_started(sweep):
    sweep.submit(1)
    job = sweep.sbatch("-t", "1", "--eta-max", "2h")
    sweep.slurm.wait_for_end(job)
    assert sweep.told("runs") == [] and sweep.tasks()[0]["status"] == "pending", sweep.logs()
    sweep.slurm.wait_for_end(sweep.sbatch("-t", "10", "--eta-max", "1m"))
    sweep.check_done_once(1)


CHECKPOINT = """
import labtasker
begun = os.path.exists("checkpoint")
print("time left:", labtasker.time_left(), flush=True)
while not begun and not labtasker.preempted():
    time.sleep(0.05)
if not begun:
    open("checkpoint", "w").write(n)
    sys.exit(75)
"""


def test_the_signal_before_the_time_limit_reaches_the_job_which_writes_a_checkpoint(sweep):
    sweep.submit(1, CHECKPOINT)
    job = sweep.sbatch("-t", "2", "--signal=B:USR1@60")
    sweep.wait_for_runs(1)
    wait_until((sweep.cwd / "checkpoint").exists, "the job was told", 120)
    sweep.slurm.wait_for_end(job, 60)
    log = sweep.logs()
    left_s = float(re.search(r"time left: ([\d.]+)", log).group(1))
    assert 0 < left_s <= 120 and "TIME LIMIT" not in log and "USR1" in log
    back, = sweep.tasks()
    assert (back["status"], back["retries"], back["interruptions"]) == ("pending", 0, 1), log
    sweep.slurm.wait_for_end(sweep.sbatch("-t", "10"))
    sweep.check_done_once(1, interrupted=1)


def test_a_job_that_is_requeued_goes_on_in_the_same_log(sweep):
    sweep.submit(1, GATED)
    job = sweep.sbatch("--array=3", "-t", "10")
    sweep.wait_for_runs(1)
    sweep.slurm.run("scontrol", "requeue", job + "_3")
    wait_until(lambda: sweep.tasks()[0]["status"] == "pending", "the task is handed back", 60)
    sweep.wait_for_runs(2)
    sweep.open_gate()
    sweep.slurm.wait_for_end(job)
    log = (sweep.cwd / ("labtasker-%s_3.log" % job)).read_text()
    assert "stopped by SIGTERM" in log and "done: 1 task: 1 success" in log
    sweep.check_done_once(1, interrupted=1)


def test_a_job_that_is_preempted_by_another_goes_on_when_that_is_over(sweep):
    sweep.submit(1, GATED)
    job = sweep.sbatch("--exclusive", "-t", "10")
    sweep.wait_for_runs(1)
    urgent = sweep.slurm.run("sbatch", "--parsable", "--exclusive", "-p", "urgent", "-o", "/dev/null", "--wrap", "sleep 3").stdout.strip()
    wait_until(lambda: sweep.tasks()[0]["status"] == "pending", "the task is handed back", 60)
    sweep.slurm.wait_for_end(urgent)
    sweep.wait_for_runs(2)
    sweep.open_gate()
    sweep.slurm.wait_for_end(job)
    sweep.check_done_once(1, interrupted=1)


def test_the_first_task_of_an_array_runs_the_server(sweep):
    """More of an array than fits at once: when the sweep is done, what has not begun is cancelled, and all is over."""
    sweep.submit(30, MEETING)
    job = sweep.sbatch("--array=5-25%4", "-t", "10", "--server")
    sweep.slurm.wait_for_end(job)
    log = (sweep.cwd / ("labtasker-%s_5.log" % job)).read_text()
    assert "listening on http://" in log and NO_MORE.search(log)
    found = {task["attempts"][-1]["worker_id"] for task in sweep.tasks()}
    assert len(found) >= 3
    assert not (sweep.place.folder / "server.json").exists()
    sweep.check_done_once(30)


def test_the_server_stays_as_long_as_others_of_its_array_run(sweep):
    """The first task's loop is done, as its filter lets it have one task only; the others are at work."""
    sweep.submit(3, "if n != '0':\n    " + GATED)
    text = "\n".join(dry_run(sweep.place, "--array=0-2", "-t", "10", "--server", "--", sys.executable, "job.py", "%(n)")[0])
    only = ' loop -f "args.n $([ $SLURM_ARRAY_TASK_ID = 0 ] && echo == || echo \'>\') 0" '
    assert text.count(" loop \\\n") == 1
    text = text.replace(" loop \\\n", only + "\\\n")
    job = sweep.slurm.run("sbatch", "--parsable", str(sweep.place.write("kept.sh", text))).stdout.strip()
    sweep.wait_for_runs(3)
    log = sweep.cwd / ("labtasker-%s_0.log" % job)
    wait_until(lambda: NO_MORE.search(log.read_text()), "the loop of the first task is done", 60)
    wait_until(lambda: any(b" task wait " in one for one in sweep.processes()), "the first task waits for the others", 60,
               never=lambda _: job + "_0" not in sweep.slurm.jobs())
    sweep.place.cli("server", "wait", "--timeout", "0")
    assert sweep.slurm.jobs()[job + "_0"] == "RUNNING"
    sweep.open_gate()
    sweep.slurm.wait_for_end(job)
    assert "the server is away" not in sweep.logs()
    sweep.check_done_once(3)


def test_another_task_of_the_array_runs_the_server_where_the_first_does_not(sweep):
    """The first is cancelled before it begins; a requeued one would be late in the same way."""
    sweep.submit(6)
    job = sweep.sbatch("--array=0-3", "-t", "10", "--server", "--server-wait", "1s", "--begin=now+6")
    sweep.slurm.run("scancel", job + "_0")
    sweep.slurm.wait_for_end(job)
    assert "listening on http://" in sweep.logs() and "is in use by" in sweep.logs(), sweep.logs()
    sweep.check_done_once(6)


def test_scancel_of_an_array_with_its_server_loses_nothing(sweep):
    """Server and loops get SIGTERM at once: what the loops have to say is delivered by the next command there."""
    sweep.submit(4, GATED)
    job = sweep.sbatch("--array=0-3", "-t", "10", "--server")
    sweep.wait_for_runs(4)
    sweep.slurm.run("scancel", job)
    sweep.slurm.wait_for_end(job)
    back = sweep.tasks()
    assert [(task["status"], task["retries"], task["interruptions"]) for task in back] == [("pending", 0, 1)] * 4, sweep.logs()
    sweep.check_nothing_runs()
    sweep.open_gate()
    sweep.slurm.wait_for_end(sweep.sbatch("--array=0-3", "-t", "10", "--server"))
    sweep.check_done_once(4, interrupted=4)


def test_the_signal_before_the_time_limit_reaches_the_loop_beside_the_server(sweep):
    sweep.submit(1, CHECKPOINT)
    job = sweep.sbatch("-t", "2", "--signal=USR1@60", "--server")
    wait_until((sweep.cwd / "checkpoint").exists, "the job was told", 120)
    sweep.slurm.wait_for_end(job, 60)
    assert "TIME LIMIT" not in sweep.logs()
    back, = sweep.tasks()
    assert (back["status"], back["retries"], back["interruptions"]) == ("pending", 0, 1), sweep.logs()
    sweep.slurm.wait_for_end(sweep.sbatch("-t", "10", "--server"))
    sweep.check_done_once(1, interrupted=1)


def test_a_broken_machine_ends_its_own_task_of_an_array_alone(sweep):
    server = sweep.serve()
    sweep.place.write("job.py", BROKEN)
    sweep.place.cli("task", "submit", "--max-retries=9", "--grid", "--", "--n=0:11:1")
    job = sweep.sbatch("--array=0-3", "-t", "10", "--max-consecutive-failures=3")
    sweep.slurm.wait_for_end(job)
    codes = [re.search(r"ExitCode=(\d+):", sweep.slurm.run("scontrol", "show", "job", "%s_%d" % (job, number)).stdout).group(1)
             for number in range(4)]
    assert codes == ["4", "0", "0", "0"], sweep.logs()
    tasks = sweep.tasks()
    assert [task["status"] for task in tasks] == ["success"] * 12 and sum(task["retries"] for task in tasks) == 3
    sweep.slurm.run("scancel", server)
    sweep.slurm.wait_for_end(server)


def test_each_task_of_a_job_is_a_loop(sweep):
    sweep.submit(10, MEETING)
    job = sweep.sbatch("-n", "4", "-c", "2", "-t", "10")
    sweep.slurm.wait_for_end(job)
    assert len(NO_MORE.findall(sweep.logs())) == 4
    sweep.check_done_once(10)


def test_each_slot_has_one_of_the_gpus_that_slurm_gave(sweep):
    sweep.submit(6, "open('gpus', 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')\n" + MEETING.replace("3", "4"))
    job = sweep.sbatch("--gpus-per-task=2", "--gpus", "all", "--per-gpu", "2", "-t", "10")
    sweep.slurm.wait_for_end(job)
    found = (sweep.cwd / "gpus").read_text().split()
    assert len(found) == 6 and set(found) == {"0", "1"}, sweep.logs()
    sweep.check_done_once(6)


def test_names_with_blanks_and_quotes_come_through_slurm(sweep):
    folder = sweep.cwd / "it's a \"b\" %x #1"  # but no backslash: with one in a path Slurm leaves %j as it is
    folder.mkdir()
    sweep.submit(1)
    words = ["sbatch", "-J", "it's \\ #1", "-t", "10", "--", sys.executable, "../job.py", "%(n)"]
    job = harness.run_cli(words, folder, env=sweep.slurm.env).stdout.strip()
    name = sweep.slurm.run("squeue", "-h", "-j", job, "-o", "%j").stdout.strip()
    sweep.slurm.wait_for_end(job)
    assert name == "it's \\ #1"
    assert "done: 1 task: 1 success" in (folder / ("labtasker-%s.log" % job)).read_text()
    assert (folder / "done").read_text() == "0\n"


def test_what_slurm_refuses_is_said_with_its_code(sweep):
    result = sweep.place.cli("sbatch", "-p", "nope", "--", "true", check=False)
    assert result.returncode == 1 and result.stdout == "" and "invalid partition specified: nope" in result.stderr
    result = sweep.place.cli("sbatch", "--bogus", "--", "true", check=False)
    assert result.returncode not in (0, 2) and "--bogus" in result.stderr
