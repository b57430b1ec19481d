"""Slots, GPUs, and the end of a loop's time: several jobs at once, each on its GPU, and none that is lost at a time limit."""
import collections
import json
import os
import pathlib
import re
import signal
import sys
import time

import pytest

import labtasker
from conftest import close_place, open_place
from harness import wait_until
from test_worker import (
    beat_fast, cancel, children, is_alive, output, start_script, submit, task, wait_for_end, wait_for_line,
    wait_for_task)

pytestmark = pytest.mark.slow  # they run on one Python, the others have the quick part of the rest

SHOW = "echo is $LABTASKER_SLOT/$CUDA_VISIBLE_DEVICES/$LABTASKER_RUN_ID"
GATED = "echo begins $LABTASKER_SLOT $$; until test -e gate; do sleep 0.05; done"


@pytest.fixture(autouse=True)
def no_gpu_is_given(monkeypatch):
    """No test sees the GPUs, or the job, of the machine that it runs on."""
    for name in list(os.environ):
        if name in labtasker.GPU_VARIABLES or name.startswith(("SLURM_", "SQUEUE_", "PBS_")):
            monkeypatch.delenv(name)


def program(place, name, text):
    """Return the environment in which a program of this name is found first, which does what the shell's text says."""
    place.write("bin/" + name, "#!/bin/sh\n" + text + "\n").chmod(0o755)
    return {"PATH": "%s:%s" % (place.cwd / "bin", os.environ["PATH"])}


def begun(loop, count):
    """Return {slot: pid} of the gated jobs of a loop, once so many have begun."""
    def find():
        found = dict(re.findall(r"begins (\d+) (\d+)", output(loop)))
        return found if len(found) == count else None
    return wait_until(find, "%d jobs run" % count, never=lambda _: loop.poll() is not None)


def open_gate(place):
    (place.cwd / "gate").write_text("")


def statuses():
    return collections.Counter(t.status for t in labtasker.ls_tasks(limit=10 ** 6).content)


# Slots


def test_slots_drain_a_sweep_each_on_its_gpu(both):
    ids = submit(12)
    run = both.cli("loop", "--gpus", "all", "--", "sh", "-c", SHOW + "; sleep 0.1", "%(n)", env={"CUDA_VISIBLE_DEVICES": "4,5,6"})
    told = {run_id: (slot, gpu) for slot, gpu, run_id in re.findall(r"is (\d)/(\d)/(\S+)", run.stdout)}
    assert len(told) == 12 and set(told.values()) == {("0", "4"), ("1", "5"), ("2", "6")}
    for one in map(task, ids):
        assert (one.status, one.retries, len(one.attempts)) == ("success", 0, 1)
        attempt = one.attempts[0]
        assert (str(attempt["slot"]), attempt["gpus"]) == told[attempt["run_id"]] and attempt["exit_code"] == 0
    assert len(labtasker.ls_workers().content) == 1


def test_all_slots_run_at_once(both):
    submit(4)
    loop = both.start_cli("loop", "-j", "4", "--", "sh", "-c", GATED, "%(n)")
    assert set(begun(loop, 4)) == set("0123") and statuses() == {"running": 4}
    open_gate(both)
    assert wait_for_end(loop) == 0 and statuses() == {"success": 4}


def test_a_loop_without_slots_says_nothing_of_them(home):
    one, = submit()
    run = home.cli("loop", "--", "sh", "-c", "echo slot $LABTASKER_SLOT gpu ${CUDA_VISIBLE_DEVICES-none}", "%(n)")
    assert run.lines == ["slot 0 gpu none"] and "slot" not in run.stderr
    assert not {"slot", "gpus"} & set(task(one).attempts[0])


def test_output_of_slots_is_told_apart_by_line_and_logs_are_as_ever(home):
    ids = submit(4)
    text = "printf 'par'; sleep 0.1; printf 'ts %(n)\\nold\\rnew\\n'; echo error %(n) >&2; printf 'no end'"
    loop = home.start_cli("loop", "-j", "2", "--cmd", text)
    assert wait_for_end(loop) == 0
    lines = [line for line in output(loop).splitlines() if not re.match(r"labtasker: |\[slot \d\] \[\d/4\] ", line)]
    assert lines and all(re.match(r"\[slot [01]\] (parts \d|old|new|error \d|no end)$", line) for line in lines), lines
    assert collections.Counter(line[9:] for line in lines)["no end"] == 4
    assert {"parts 0", "parts 1", "parts 2", "parts 3"} < {line[9:] for line in lines}
    assert re.search(r"\[slot [01]\] \[1/4\] %s n=0: success in [\d.]+ s" % ids[0][:8], output(loop))
    for one in ids:
        log = home.cli("task", "logs", one).stdout
        assert "slot" not in log and "parts" in log


def test_a_line_without_end_is_not_kept_for_ever():
    line = labtasker.Labelled("[slot 3] ")
    assert line(b"a") == b"" and line(b"b\nc") == b"[slot 3] ab\n" and line(b"") == b"[slot 3] c\n"
    assert line(b"x" * 70000) == b"[slot 3] " + b"x" * 70000 + b"\n" and line(b"") == b""


def test_a_job_that_is_killed_ends_no_other(both):
    submit(2, max_retries=1)
    loop = both.start_cli("loop", "-j", "2", "--", "sh", "-c", GATED, "%(n)")
    pids = begun(loop, 2)
    os.kill(int(pids["0"]), signal.SIGKILL)
    wait_until(lambda: statuses() == {"failed": 1, "running": 1}, "one failed, one runs")
    open_gate(both)
    assert wait_for_end(loop) == 0, output(loop)
    assert statuses() == {"failed": 1, "success": 1} and "killed by signal 9" in output(loop)


def test_a_slot_that_is_free_takes_what_comes_while_another_works(both):
    submit()
    loop = both.start_cli("loop", "-j", "2", "--", "sh", "-c", "test $0 = 7 || { %s; }" % GATED, "%(n)")
    begun(loop, 1)
    late = labtasker.submit_task(args={"n": 7}).task_id
    assert wait_for_task(late, "success").attempts[0]["slot"] in (0, 1) and statuses()["running"] == 1
    open_gate(both)
    assert wait_for_end(loop) == 0


def test_max_tasks_holds_for_all_slots_together(home):
    submit(8)
    home.cli("loop", "-j", "4", "--max-tasks", "5", "--", "sleep", "0.1", "%(n)")
    assert statuses() == {"success": 5, "pending": 3}


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_signal_hands_back_what_all_slots_run(both, jobs):
    ids = submit(jobs + 1)
    loop = both.start_cli("loop", "-j", str(jobs), "--", "sh", "-c", GATED, "%(n)")
    pids, others = begun(loop, jobs), children(loop.pid)
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop) == 143, output(loop)
    assert [(t.status, t.retries) for t in map(task, ids)] == [("pending", 0)] * (jobs + 1)
    assert sum(t.interruptions for t in map(task, ids)) == jobs and "%d requeued" % jobs in output(loop)
    wait_until(lambda: not [pid for pid in list(pids.values()) + others if is_alive(int(pid))], "nothing is left running")


def test_a_second_signal_kills_all_jobs_at_once(both):
    submit(3)
    loop = both.start_cli("loop", "-j", "3", "--grace", "10 min", "--", "sh", "-c", "trap '' TERM INT; " + GATED, "%(n)")
    pids = begun(loop, 3)
    loop.send_signal(signal.SIGINT)
    wait_until(lambda: output(loop).count("again kills it") == 3, "all are asked to end")
    assert all(is_alive(int(pid)) for pid in pids.values())
    loop.send_signal(signal.SIGINT)
    assert wait_for_end(loop) == 130 and statuses() == {"pending": 3}


def test_kill_9_of_a_loop_ends_all_its_jobs_and_their_tasks_are_tried_again(both):
    beat_fast(both)
    ids = submit(4)
    loop = both.start_cli("loop", "-j", "4", "--", "sh", "-c", "trap '' TERM; " + GATED, "%(n)")
    pids = [int(pid) for pid in begun(loop, 4).values()] + children(loop.pid)
    os.kill(loop.pid, signal.SIGKILL)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "nothing is left running")
    again = both.start_cli("loop", "-j", "2", "--idle-timeout", "600", "--", "true", "%(n)")
    assert [wait_for_task(one, "success").retries for one in ids] == [1] * 4
    again.terminate()
    assert wait_for_end(again) == 143


def test_a_task_that_is_cancelled_is_ended_in_its_slot_alone(both):
    ids = submit(2)
    loop = both.start_cli("loop", "-j", "2", "--", "sh", "-c", GATED, "%(n)")
    pids = begun(loop, 2)
    slot = str(task(ids[0]).attempts[0]["slot"])
    cancel(ids[0])
    wait_until(lambda: not is_alive(int(pids[slot])), "its job is gone")
    assert is_alive(int(pids["1" if slot == "0" else "0"]))
    open_gate(both)
    assert wait_for_end(loop) == 0 and statuses() == {"cancelled": 1, "success": 1}


def test_a_worker_whose_runs_fail_is_suspended_and_the_loop_says_so(both):
    submit(9)
    run = both.cli("loop", "-j", "2", "--worker-max-retries", "3", "--", "false", "%(n)", check=False)
    assert run.returncode == 1 and "crashed and gets no tasks" in run.stderr and "no more tasks are run on" in run.stderr
    worker, = labtasker.ls_workers().content
    assert (worker.status, worker.max_retries) == ("crashed", 3) and 3 <= worker.retries <= 4
    assert statuses() == {"pending": 9}


def test_what_other_slots_run_when_the_worker_is_suspended_is_finished(home):
    submit(2)
    worker = labtasker.create_worker("node", max_retries=1)
    loop = home.start_cli("loop", "-j", "2", "--worker-id", worker, "--", "sh", "-c",
                          "test %(n) = 1 && exit 1; " + GATED, "%(n)")
    wait_until(lambda: labtasker.ls_workers().content[0].status == "crashed", "the worker is crashed")
    open_gate(home)
    assert wait_for_end(loop) == 1, output(loop)
    assert statuses() == {"success": 1, "pending": 1}


def test_a_command_that_cannot_be_started_ends_the_loop_once_the_others_are_done(home):
    submit(1)
    home.write("job", "#!/bin/sh\n%s\n" % GATED).chmod(0o755)
    loop = home.start_cli("loop", "-j", "2", "--", "./job", "%(n)")
    begun(loop, 1)
    (home.cwd / "job").unlink()
    submit(1)
    wait_until(lambda: "can't start the command" in output(loop), "the other slot can't")
    open_gate(home)
    assert wait_for_end(loop) == 1 and statuses() == {"success": 1, "pending": 1}


@pytest.mark.parametrize("words, shown", [
    (["-j", "0"], "--jobs"), (["-j", "1000"], "--jobs"), (["--per-gpu", "2"], "--gpus"), (["-j", "x"], "-j"),
    (["--gpus", "0,0"], "each once"), (["--gpus", ""], None), (["--gpus", "0,,1"], "each once"),
    (["--gpus", "0;rm"], "--gpus 0;rm"), (["--gpus", "0,1,2", "-j", "2"], "evenly"), (["--gpus", "0", "--per-gpu", "0"], "0 jobs"),
    (["--gpus", "0", "--per-gpu", "2", "-j", "2"], "without --jobs"), (["--time-limit", "soon"], "soon"),
    (["--drain-before", "-1"], "-1"), (["--worker-max-retries", "2", "--worker-id", "x"], None)])
def test_options_that_can_not_be_meant_are_refused(home, words, shown):
    submit()
    run = home.cli("loop", *(words + ["--", "true", "%(n)"]), check=False)
    if words == ["--gpus", ""]:  # as an empty variable of a script gives it
        assert run.returncode == 0
    else:
        assert run.returncode == (1 if shown is None else 2) and (shown is None or shown in run.stderr), run
        assert statuses() == {"pending": 1}


# Which GPUs

LONG = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-1111f937-d72c-4106-c12f-20bd9faed9f6"
MIG = "MIG-GPU-8932f937/1/0,MIG-7d2f1a2c-0000-5c1e-9bd4-000000000001"
A, B = LONG.split(",")


@pytest.mark.parametrize("environment, options, seen", [
    ({}, {"gpus": "0,1"}, ["0", "1"]),
    ({}, {"gpus": LONG}, [A, B]),
    ({}, {"gpus": "3", "per_gpu": 2}, ["3", "3"]),
    ({"CUDA_VISIBLE_DEVICES": "4,5"}, {"gpus": "all"}, ["4", "5"]),
    ({"CUDA_VISIBLE_DEVICES": "4,5"}, {"gpus": "0,1"}, ["4", "5"]),
    ({"CUDA_VISIBLE_DEVICES": "4,5"}, {"gpus": "5"}, ["5"]),
    ({"CUDA_VISIBLE_DEVICES": "1,0"}, {"gpus": "0"}, ["0"]),
    ({"CUDA_VISIBLE_DEVICES": "4,5"}, {"gpus": "1,0", "per_gpu": 2}, ["5", "4", "5", "4"]),
    ({"CUDA_VISIBLE_DEVICES": LONG}, {"gpus": "all"}, [A, B]),
    ({"CUDA_VISIBLE_DEVICES": LONG}, {"gpus": "1"}, [B]),
    ({"CUDA_VISIBLE_DEVICES": LONG}, {"gpus": "GPU-11"}, [B]),
    ({"CUDA_VISIBLE_DEVICES": MIG}, {"gpus": "all"}, MIG.split(",")),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {"gpus": "all", "jobs": 2}, ["0,1", "2,3"]),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"gpus": "all", "jobs": 4}, ["0", "1", "0", "1"]),
    ({"CUDA_VISIBLE_DEVICES": "2, 3,-1,5"}, {"gpus": "all"}, ["2", "3"]),
    ({"SLURM_JOB_GPUS": "6,7"}, {"gpus": "all"}, ["6", "7"]),
    ({"SLURM_STEP_GPUS": "7", "SLURM_JOB_GPUS": "6,7"}, {"gpus": "0"}, ["7"]),
])
def test_which_gpu_each_slot_has(monkeypatch, environment, options, seen):
    monkeypatch.setattr(labtasker, "listed_gpus", lambda: [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = labtasker.make_slots(**options)
    assert [place.environment for place in found] == [{"CUDA_VISIBLE_DEVICES": gpus} for gpus in seen]
    assert [place.facts for place in found] == [{"slot": i, "gpus": gpus} for i, gpus in enumerate(seen)]


@pytest.mark.parametrize("environment, gpus, shown", [
    ({}, "all", "shows one"), ({"CUDA_VISIBLE_DEVICES": ""}, "all", "shows one"), ({"CUDA_VISIBLE_DEVICES": ""}, "0", "none"),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "0", "none"), ({"CUDA_VISIBLE_DEVICES": "4,5"}, "2", "4,5"),
    ({"CUDA_VISIBLE_DEVICES": "4,5"}, "4,0", "4,5"), ({"CUDA_VISIBLE_DEVICES": LONG}, "GPU-", A)])
def test_a_gpu_that_was_not_given_is_an_error(monkeypatch, environment, gpus, shown):
    monkeypatch.setattr(labtasker, "listed_gpus", lambda: [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(labtasker.UsageError, match=shown):
        labtasker.make_slots(gpus=gpus)


def test_indices_of_the_machine_are_not_those_of_a_slurm_job_that_sees_only_its_own(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_GPUS", "6,7")
    monkeypatch.setattr(labtasker, "listed_gpus", lambda: ["0", "1"])
    assert [place.facts["gpus"] for place in labtasker.make_slots(gpus="all")] == ["0", "1"]


@pytest.mark.parametrize("environment, is_amd, variable, unset", [
    ({}, False, "CUDA_VISIBLE_DEVICES", []), ({}, True, "HIP_VISIBLE_DEVICES", ["CUDA_VISIBLE_DEVICES"]),
    ({"ROCR_VISIBLE_DEVICES": "1"}, False, "ROCR_VISIBLE_DEVICES", ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]),
    ({"HIP_VISIBLE_DEVICES": "1"}, False, "HIP_VISIBLE_DEVICES", ["CUDA_VISIBLE_DEVICES"]),
    ({"ROCR_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "1"}, False, "CUDA_VISIBLE_DEVICES", []),
    ({"ROCR_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "1"}, True, "ROCR_VISIBLE_DEVICES",
     ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]),
    ({"ROCR_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "1"}, True, "HIP_VISIBLE_DEVICES", ["CUDA_VISIBLE_DEVICES"])])
def test_the_variable_of_the_makers_runtime_is_set_and_those_that_would_count_within_it_are_not(
        monkeypatch, environment, is_amd, variable, unset):
    there = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: is_amd if path == "/dev/kfd" else there(path))
    monkeypatch.setattr(labtasker, "_gpu_files", lambda: [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    place, = labtasker.make_slots(gpus="1")
    assert place.environment == dict(dict.fromkeys(unset), **{variable: "1"})


def test_a_variable_that_is_unset_does_not_reach_the_job(home):
    submit()
    names = "${HIP_VISIBLE_DEVICES-unset} ${CUDA_VISIBLE_DEVICES-unset} ${ROCR_VISIBLE_DEVICES-unset}"
    run = home.cli("loop", "--gpus", "1", "--", "sh", "-c", "echo " + names, "%(n)", env={"ROCR_VISIBLE_DEVICES": "4,5"})
    assert run.lines == ["unset unset 5"]


SMI = """
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)
  MIG 1g.5gb      Device  0: (UUID: MIG-1111)
  MIG 1g.5gb      Device  1: (UUID: MIG-2222)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-cccc)
"""


@pytest.mark.parametrize("name, text, seen", [
    ("nvidia-smi", "cat <<END%sEND" % SMI, ["0", "MIG-1111", "MIG-2222", "2"]),
    ("rocm-smi", "printf 'GPU[0]\\t\\t: Device Name: x\\nGPU[0]\\t: GUID: 1\\nGPU[1]\\t: Device Name: x\\n'", ["0", "1"]),
    ("nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", []),
    ("nvidia-smi", "printf '\\377\\376 GPU 0'", [])])
def test_what_the_system_lists(home, monkeypatch, name, text, seen):
    monkeypatch.setenv("PATH", program(home, name, text)["PATH"])
    monkeypatch.setattr(labtasker, "_gpu_files", lambda: [])
    assert labtasker.listed_gpus() == seen


def test_a_program_that_hangs_is_not_waited_for(home, monkeypatch):
    monkeypatch.setenv("PATH", program(home, "squeue", "echo 1:00 & sleep 600")["PATH"])
    monkeypatch.setattr(labtasker, "PROGRAM_TIMEOUT_S", 0.5)
    assert labtasker.ask_program(["squeue"]) == "" and labtasker.ask_program(["no-such-program"]) == ""


# When the time is up


@pytest.mark.parametrize("said, seconds", [
    ("1-02:03:04", 93784), ("2:03:04", 7384), ("3:04", 184), ("0:09", 9), ("10-00:00:00", 864000), ("00:00:30", 30),
    ("UNLIMITED", None), ("NOT_SET", None), ("INVALID", None), ("", None), ("soon", None), ("1:00 2:00", None), ("-1:00", None)])
def test_what_squeue_says_of_the_time_that_is_left(home, monkeypatch, capsys, said, seconds):
    monkeypatch.setenv("PATH", program(home, "squeue", 'echo "$*" > asked; echo "%s"' % said)["PATH"])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    assert labtasker.seconds_left() == (seconds or float("inf"))
    assert (home.cwd / "asked").read_text() == "-h -j 77 -o %L\n"
    assert ("give --time-limit" in capsys.readouterr().err) == (seconds is None and said != "UNLIMITED")


@pytest.mark.parametrize("text", ["exit 1", "echo slurm_load_jobs error >&2; exit 1", "kill -9 $$"])
def test_a_squeue_that_fails_is_no_limit(home, monkeypatch, text):
    monkeypatch.setenv("PATH", program(home, "squeue", text)["PATH"])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert labtasker.seconds_left() == float("inf") and labtasker.seconds_left(5) == 5


def test_squeue_is_asked_for_the_task_of_an_array(home, monkeypatch):
    monkeypatch.setenv("PATH", program(home, "squeue", 'echo "$*" > asked; echo 5:00')["PATH"])
    for name, value in {"SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert labtasker.seconds_left() == 300 and "-j 77_3 " in (home.cwd / "asked").read_text()


@pytest.mark.parametrize("environment, given, least, most", [
    ({"SLURM_JOB_END_TIME": "+100", "SLURM_JOB_ID": "77"}, None, 90, 100),
    ({"SLURM_JOB_END_TIME": "+100"}, 50, 50, 50), ({"SLURM_JOB_END_TIME": "+100"}, 5000, 90, 100),
    ({"SLURM_JOB_END_TIME": "-100"}, 50, 50, 50), ({"SLURM_JOB_END_TIME": "never"}, 50, 50, 50),
    ({"PBS_WALLTIME": "3600"}, None, 3600, 3600), ({"PBS_WALLTIME": "01:00:00"}, 7, 7, 7),
    ({"PBS_WALLTIME": "3600", "PBS_NODEFILE": "600"}, None, 2990, 3000),
    ({"PBS_WALLTIME": "300", "PBS_NODEFILE": "600"}, None, 300, 300),  # a list of another job
    ({"LABTASKER_END_TIME": "+30"}, 50, 20, 30)])
def test_the_least_of_what_is_known_is_the_limit(home, monkeypatch, environment, given, least, most):
    monkeypatch.setenv("PATH", program(home, "squeue", "echo 0:01")["PATH"])
    for name, value in environment.items():
        if value[0] in "+-":
            value = str(int(time.time() + int(value)))
        if name == "PBS_NODEFILE":
            path = home.write("nodes", "here\n")
            os.utime(str(path), (time.time() - int(value),) * 2)
            value = str(path)
        monkeypatch.setenv(name, value)
    assert least <= labtasker.seconds_left(given) <= most


def test_until_when_tasks_are_started_and_jobs_are_left_alone():
    limit = labtasker.Limit(1000, 10, 0, 0)
    left = {name: round(limit.end_at - getattr(limit, name)) for name in ("start_until", "stop_at", "kill_at")}
    assert left == {"start_until": 15, "stop_at": 15, "kill_at": 5}
    assert round(limit.end_at - labtasker.Limit(1000, 10, 300, 0).start_until) == 300
    assert round(limit.end_at - labtasker.Limit(1000, 10, 300, 600).start_until) == 615
    short = labtasker.Limit(4, 10, 0, 0)
    assert [round(short.end_at - at) for at in (short.stop_at, short.kill_at)] == [2, 1]
    none = labtasker.Limit(float("inf"), 10, 300, 600)
    assert none.start_until == none.stop_at == none.end_time == float("inf")


def test_what_runs_when_the_time_is_up_is_handed_back_and_another_loop_finishes_it(both):
    ids = submit(3)
    text = "trap 'echo told; exit 0' TERM; %s & wait $!" % GATED
    env = program(both, "squeue", "echo 0:08")
    loop = both.start_cli("loop", "-j", "2", "--grace", "2s", "--", "bash", "-c", text, "%(n)", env=dict(env, SLURM_JOB_ID="77"))
    begun(loop, 2)
    assert wait_for_end(loop) == 0, output(loop)
    assert "the time is up in 0:00:08 (SLURM_JOB_ID)" in output(loop) and output(loop).count("told") == 2
    assert re.search(r"labtasker: the time is up in 0:00:0\d: 2 tasks: 2 requeued", output(loop))
    back = [task(one) for one in ids]
    assert [(t.status, t.retries) for t in back] == [("pending", 0)] * 3 and sum(t.interruptions for t in back) == 2
    assert [t.reason for t in back if t.interruptions] == ["the time of the loop was up"] * 2
    open_gate(both)
    assert both.cli("loop", "--", "sh", "-c", GATED, "%(n)").returncode == 0 and statuses() == {"success": 3}


def test_a_job_that_does_not_hear_is_killed_before_the_time_is_up(home):
    submit()
    loop = home.start_cli("loop", "--time-limit", "6s", "--grace", "1s", "--", "sh", "-c", "trap '' TERM; " + GATED, "%(n)")
    pid = int(begun(loop, 1)["0"])
    assert wait_for_end(loop) == 0 and not is_alive(pid) and statuses() == {"pending": 1}


def test_before_the_end_nothing_is_started_and_what_runs_is_waited_for(both):
    submit(2)
    loop = both.start_cli("loop", "--time-limit", "1h", "--drain-before", "59 min 57s", "--", "sh", "-c", GATED, "%(n)")
    begun(loop, 1)
    until = time.monotonic() + 4
    wait_until(lambda: time.monotonic() > until, "it is time")
    open_gate(both)
    assert wait_for_end(loop) == 0 and statuses() == {"success": 1, "pending": 1}
    assert "no more tasks are started, as the time is up in 0:59:5" in output(loop)


def test_a_loop_that_waits_for_tasks_leaves_when_none_could_be_started(both):
    loop = both.start_cli("loop", "--idle-timeout", "1h", "--time-limit", "1h", "--drain-before", "59 min 57s", "--", "true", "%(n)")
    assert wait_for_end(loop) == 0 and "no more tasks are started" in output(loop)


def test_no_task_is_started_that_may_take_longer_than_is_left(both):
    submit(2)
    run = both.cli("loop", "--eta-max", "1h", "--time-limit", "30 min", "--", "true", "%(n)")
    assert "no more tasks are started, as the time is up in 0:" in run.stderr and statuses() == {"pending": 2}
    both.cli("loop", "--eta-max", "20 min", "--time-limit", "30 min", "--", "true", "%(n)")
    assert statuses() == {"success": 2}


def test_a_task_with_a_time_out_is_left_to_a_loop_that_has_as_much_time(both):
    short = labtasker.submit_task(args={"n": 1}, task_timeout=600).task_id
    long = labtasker.submit_task(args={"n": 2}, task_timeout=3600).task_id
    free = labtasker.submit_task(args={"n": 3}).task_id
    other = labtasker.submit_task(args={"n": 4}).task_id
    labtasker.submit_task(args={"m": 1}, task_timeout=3600)  # no field of this loop
    run = both.cli("loop", "--time-limit", "30 min", "-f", "args.n < 4 or args.m == 1", "--", "true", "%(n)")
    assert re.search(r"done, but 1 pending may take longer than the 0:(29:\d\d|30:00) left: 2 tasks: 2 success", run.stderr), run
    assert [task(i).status for i in (short, long, free, other)] == ["success", "pending", "success", "pending"]
    run = both.cli("loop", "--time-limit", "2h", "--", "true", "%(n)")
    assert "done: 2 tasks: 2 success" in run.stderr and statuses() == {"success": 4, "pending": 1}


def test_the_filter_of_a_limit_changes_seldom():
    limit = labtasker.Limit(36000, 10, 0, 0)
    asked = [limit.filtered({}, limit.start_until - left)["$or"][1]["task_timeout"]["$lte"] for left in range(36000, 0, -1)]
    assert all(0 <= left - bound <= max(left / 8, 1) for left, bound in zip(range(36000, 0, -1), asked))
    assert len(set(asked)) < 150
    assert limit.filtered({"eta_max": "1h", "extra_filter": {"args.a": 1}}, 0) == {"args.a": 1}
    assert labtasker.Limit(float("inf"), 10, 0, 0).filtered({}, 0) is None


# What a job knows of it

CHILD = """
import labtasker, os, sys, time
left = labtasker.time_left()
print("left", left if left is None else int(left), labtasker.preempted(), flush=True)
while not labtasker.preempted():
    time.sleep(0.05)
print("saved", flush=True)
"""


@pytest.mark.parametrize("options, seen", [((), "None"), (("--time-limit", "1h"), "35[5-9][0-9]")])
def test_a_job_knows_how_much_time_is_left(both, options, seen):
    submit()
    script = both.write("child.py", CHILD.split("while")[0])
    run = both.cli("loop", *(options + ("--", sys.executable, script, "%(n)")))
    assert re.match("left %s False$" % seen, run.lines[0]), run


def test_outside_of_a_loop_no_end_is_known(home):
    run = home.python("import labtasker\nprint(labtasker.time_left(), labtasker.preempted())")
    assert run.lines == ["None False"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"])
def test_a_job_that_asks_saves_and_is_handed_back(both, name):
    one, = submit()
    script = both.write("child.py", CHILD)
    loop = both.start_cli("loop", "--", "sh", "-c", '"$0" "$1"; exit $?', sys.executable, script, "%(n)")
    wait_for_line(loop, "left None")
    loop.send_signal(getattr(signal, name))
    assert wait_for_end(loop) == 128 + getattr(signal, name), output(loop)
    assert (task(one).status, task(one).retries, task(one).interruptions) == ("pending", 0, 1)
    wait_until(lambda: "saved" in output(loop) or name == "SIGTERM", "it has saved")


def test_a_job_hears_of_the_signal_of_a_scheduler_itself(home):
    script = home.write("child.py", CHILD)
    process = home.start(sys.executable, script)
    wait_for_line(process, "left None")
    process.send_signal(signal.SIGUSR1)
    assert wait_for_end(process) == 0 and "saved" in output(process)


def test_a_job_that_asks_is_told_in_all_its_processes_and_threads(home):
    submit()
    script = home.write("child.py", """
import labtasker, multiprocessing, threading, time
def wait(name):
    while not labtasker.preempted():
        time.sleep(0.05)
    print(name + " knows\\n", end="", flush=True)
labtasker.preempted()
fork = multiprocessing.get_context("fork")
gone = fork.Process(target=time.sleep, args=(600,))
gone.start()
gone.terminate()
gone.join()
print("ended by", gone.exitcode, flush=True)
others = [threading.Thread(target=wait, args=("thread",)), threading.Thread(target=wait, args=("other",))]
[other.start() for other in others]
print("waits", flush=True)
wait("main")
[other.join() for other in others]
""")
    loop = home.start_cli("loop", "--time-limit", "8s", "--grace", "2s", "--", sys.executable, script, "%(n)")
    wait_for_line(loop, "waits")
    assert wait_for_end(loop) == 0, output(loop)
    for line in ("ended by -15", "thread knows", "other knows", "main knows"):
        assert line in output(loop), output(loop)


FUNCTION = """
@labtasker.loop(%s)
def main(n=Required()):
    left = labtasker.time_left()
    print("left", left if left is None else int(left), os.environ.get("LABTASKER_SLOT"), labtasker.preempted(), flush=True)
    %s
try:
    main()
finally:
    print("main is over", flush=True)
"""
ASKS = "while not labtasker.preempted(): time.sleep(0.05)\n    print('saved', flush=True)"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_function_that_asks_is_not_interrupted(both, name):
    one, = submit()
    loop = start_script(both, FUNCTION % ("", ASKS))
    wait_for_line(loop, "left None 0 False")
    loop.send_signal(getattr(signal, name))
    assert wait_for_end(loop) == 128 + getattr(signal, name), output(loop)
    assert "saved" in output(loop) and "main is over" in output(loop)
    assert (task(one).status, task(one).retries, task(one).interruptions) == ("pending", 0, 1)


def test_a_function_is_told_when_the_time_of_its_slurm_job_is_up(both):
    one, two = submit(2)
    env = program(both, "squeue", "echo 0:09")
    loop = start_script(both, FUNCTION % ("grace='2s'", ASKS), env=dict(env, SLURM_JOB_ID="77"))
    wait_for_line(loop, "left 8 0 False")
    assert wait_for_end(loop) == 0, output(loop)
    assert "saved" in output(loop) and [(task(i).status, task(i).retries) for i in (one, two)] == [("pending", 0)] * 2


def test_a_function_that_does_not_ask_gets_an_exception_when_the_time_is_up(home):
    one, = submit()
    loop = start_script(home, FUNCTION % ("time_limit='4s', grace=1", "time.sleep(600)"))
    assert wait_for_end(loop) == 0, output(loop)
    assert (task(one).status, task(one).retries, task(one).interruptions) == ("pending", 0, 1)


@pytest.mark.parametrize("function", [
    "while True:\n        try: time.sleep(600)\n        except KeyboardInterrupt: print('deaf', flush=True)",
    "labtasker.preempted()\n    import ctypes; ctypes.CDLL(None).sleep(30)",
    "import ctypes; [ctypes.CDLL(None).sleep(1) for _ in range(600)]"])
def test_a_function_that_does_not_end_is_ended_after_its_grace_and_its_task_is_handed_back(both, function):
    one, = submit()
    loop = start_script(both, FUNCTION % ("grace='1 second'", function))
    wait_for_line(loop, "left None")
    helpers = children(loop.pid)
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop) == 143, output(loop)
    assert (task(one).status, task(one).retries, task(one).interruptions) == ("pending", 0, 1)
    wait_until(lambda: not [pid for pid in helpers if is_alive(pid)], "nothing is left running")


# While there is nothing to do


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_loop_that_waits_gets_a_task_soon_and_leaves_soon(both, jobs):
    loop = both.start_cli("loop", "-j", jobs, "--idle-timeout", "1h", "--", "echo", "had", "%(n)")
    wait_until(lambda: labtasker.ls_workers().content, "it has begun")
    one, = submit()
    wait_for_task(one, "success")
    loop.terminate()
    assert wait_for_end(loop, timeout_s=10) == 143, output(loop)
    assert "1 success" in output(loop)


def test_an_idle_loop_has_the_server_wait_and_does_not_ask_again(server_home, monkeypatch):
    """Four slots share one fetch, which the server answers when there is something, or when the loop's time is over."""
    asked, fetch_task = [], labtasker.fetch_task
    monkeypatch.setattr(labtasker, "fetch_task", lambda **fields: (asked.append(fields["wait_s"]), fetch_task(**fields))[1])
    assert labtasker.command_loop(["true", "%(n)"], jobs=4, idle_timeout_s=4) == 0
    assert asked[0] > 3 and len(asked) <= 2, asked


def unread_bytes(place):
    """Return how many bytes the server's connections hold that it has not read."""
    port = int(place.server.url.rpartition(":")[2])
    lines = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(line[4].rpartition(":")[2], 16) for line in lines if line[1].endswith(":%04X" % port) and line[3] == "01")


@pytest.mark.parametrize("is_function", [False, True])
def test_a_signal_is_heard_while_a_server_that_was_stopped_is_asked(server_home, is_function):
    if is_function:
        submit()
        loop = start_script(server_home, FUNCTION % (
            "", "labtasker.LEAVING_S = 2; os.kill(%d, signal.SIGSTOP)" % server_home.server.process.pid))  # not ten seconds
        wait_for_line(loop, "left")
    else:
        loop = server_home.start_cli("loop", "--idle-timeout", "1h", "--", "true", "%(n)")
        wait_until(lambda: labtasker.ls_workers().content, "it has begun")
        server_home.server.process.send_signal(signal.SIGSTOP)
    pid = server_home.server.process.pid
    wait_until(lambda: labtasker.process_stat(pid)[0] == "T" and (not is_function or unread_bytes(server_home)),
               "it was stopped, and has a report to read")
    loop.terminate()
    try:
        assert wait_for_end(loop, timeout_s=25) == 143, output(loop)  # a request is given up after a minute
    finally:
        server_home.server.process.send_signal(signal.SIGCONT)


def test_no_task_is_lost_to_a_loop_that_leaves_as_it_comes(server_home):
    """Each is either handed out and handed back, or not handed out at all."""
    loops = [server_home.start_cli("loop", "--idle-timeout", "1h", "--", "sleep", "600", "%(n)") for _ in range(4)]
    wait_until(lambda: len(labtasker.ls_workers().content) == 4, "they have begun")
    for loop in loops:
        submit()
        loop.terminate()
    assert [wait_for_end(loop) for loop in loops] == [143] * 4
    assert statuses() == {"pending": 4} and {t.retries for t in labtasker.ls_tasks().content} == {0}


# A fetch that was sent is never forgotten: its answer is read, or what it was given is handed back


@pytest.fixture
def held_home(tmp_path, monkeypatch, server):
    """A Place whose server's answers can be held back: `proxy`."""
    place = open_place(tmp_path / "home", monkeypatch, server, delay_ms=5)
    yield place
    close_place(place)


def direct(place, method, path, body=None):
    """Return the server's answer, not held back."""
    return place.server.http(method, "/api/v1/queues/me" + path, body)[1]


def give_while_answers_are_held(place, loop):
    """Return the id of a task that a waiting loop was given but has not heard of."""
    wait_until(lambda: any(b"/tasks/next?wait_s=" in asked for asked in place.proxy.asked), "it waits for a task", never=lambda _: loop.poll() is not None)
    place.proxy.hold()
    one = direct(place, "POST", "/tasks", {"args": {"n": 2}, "max_retries": 1})["task_id"]
    wait_until(lambda: direct(place, "GET", "/tasks/" + one)["status"] == "running", "it was given")
    return one


def test_no_task_is_left_behind_by_slots_of_a_far_server(server_home):
    """A slot stops waiting when the others have ended: just then it may be given a task."""
    submit(40, max_retries=1)
    loop = server_home.start_cli("loop", "-j", "3", "--", "true", "%(n)")
    assert wait_for_end(loop, timeout_s=90) == 0, output(loop)
    assert statuses() == {"success": 40} and {len(t.attempts) for t in labtasker.ls_tasks(limit=100).content} == {1}


@pytest.mark.parametrize("options, code", [(["--idle-timeout", "1h"], 143), (["--idle-timeout", "1h", "-j", "3"], 143)])
def test_a_task_given_to_a_loop_that_is_stopped_meanwhile_is_handed_back(held_home, options, code):
    loop = held_home.start_cli("loop", *(options + ["--", "true", "%(n)"]))
    one = give_while_answers_are_held(held_home, loop)
    loop.terminate()
    wait_until(lambda: any(asked.startswith(b"DELETE") for asked in held_home.proxy.asked), "it waits no longer")
    held_home.proxy.let_go()
    assert wait_for_end(loop) == code, output(loop)
    back = direct(held_home, "GET", "/tasks/" + one)
    assert (back["status"], back["retries"]) == ("pending", 0), output(loop)


def test_a_task_given_as_the_time_is_up_is_handed_back(held_home):
    loop = held_home.start_cli("loop", "--idle-timeout", "1h", "--time-limit", "20s", "--drain-before", "12s", "--", "true", "%(n)")
    one = give_while_answers_are_held(held_home, loop)
    until = time.monotonic() + 8
    wait_until(lambda: time.monotonic() > until, "it is too late to start it")
    held_home.proxy.let_go()
    assert wait_for_end(loop) == 0, output(loop)
    assert direct(held_home, "GET", "/tasks/" + one)["status"] == "pending" and "requeued" in output(loop)


def test_a_task_given_as_the_idle_time_is_up_is_run(held_home):
    loop = held_home.start_cli("loop", "--idle-timeout", "4s", "--", "true", "%(n)")
    one = give_while_answers_are_held(held_home, loop)
    until = time.monotonic() + 5
    wait_until(lambda: time.monotonic() > until, "it has been idle for too long")
    held_home.proxy.let_go()
    assert wait_for_end(loop) == 0, output(loop)
    assert direct(held_home, "GET", "/tasks/" + one)["status"] == "success"


def test_a_task_given_by_a_server_that_was_killed_before_it_could_say_so_is_handed_back_by_a_loop_that_is_stopped(held_home):
    patient = ("import labtasker as L; L.FETCH_CUT_S, L.LEAVING_S = 0, 600  # however long the server takes to be back\n"
               "raise SystemExit(L.main())")
    loop = held_home.start(sys.executable, "-c", patient, "loop", "--idle-timeout", "1h", "--", "true", "%(n)")
    one, server = give_while_answers_are_held(held_home, loop), held_home.server
    port = int(server.url.rpartition(":")[2])
    server.kill()
    held_home.proxy.lose()
    loop.terminate()
    before = held_home.proxy.refused
    wait_until(lambda: held_home.proxy.refused > before + 2, "the loop leaves, and finds no server",
               never=lambda _: loop.poll() is not None)
    server.start(port)
    assert wait_for_end(loop, timeout_s=60) == 143, output(loop)
    back = direct(held_home, "GET", "/tasks/" + one)
    assert (back["status"], back["retries"]) == ("pending", 0), output(loop)


def test_a_fetch_whose_server_was_started_anew_is_asked_again_and_its_task_run_once(held_home):
    loop = held_home.start_cli("loop", "--idle-timeout", "1h", "--", "true", "%(n)")
    one, server = give_while_answers_are_held(held_home, loop), held_home.server
    server.kill()
    server.start(int(server.url.rpartition(":")[2]))
    held_home.proxy.lose()
    done = wait_until(lambda: [t for t in [direct(held_home, "GET", "/tasks/" + one)] if t["status"] == "success"], "it is run")
    loop.terminate()
    assert wait_for_end(loop) == 143 and done[0]["retries"] == 0


# A server that is away


def test_results_of_all_slots_wait_for_a_server_that_is_away(server_home):
    submit(3, max_retries=1)
    server = server_home.server
    loop = server_home.start_cli("loop", "-j", "3", "--", "sh", "-c", GATED, "%(n)")
    begun(loop, 3)
    port = int(server.url.rpartition(":")[2])
    server.kill()
    open_gate(server_home)
    wait_for_line(loop, "waiting for it to come back")
    server.start(port)
    assert wait_for_end(loop, timeout_s=60) == 0, output(loop)
    assert statuses() == {"success": 3} and {t.retries for t in labtasker.ls_tasks().content} == {0}


def test_four_jobs_are_handed_back_though_the_server_was_stopped(server_home):
    submit(4, max_retries=1)
    server = server_home.server
    loop = server_home.start_cli("loop", "-j", "4", "--", "sh", "-c", GATED, "%(n)")
    begun(loop, 4)
    server.process.send_signal(signal.SIGSTOP)
    loop.terminate()
    wait_until(lambda: len(list((server_home.cwd / ".labtasker" / "outbox").glob("*.json"))) == 4, "all four are kept")
    assert wait_for_end(loop, timeout_s=45) == 143, output(loop)
    server.process.send_signal(signal.SIGCONT)
    assert server_home.cli("task", "ls", "-s", "pending", "-q").stdout.count("\n") == 4
    assert [(t.retries, t.interruptions) for t in labtasker.ls_tasks().content] == [(0, 1)] * 4


def test_a_mistake_of_the_loop_itself_in_one_slot_ends_it_and_is_shown(home, monkeypatch):
    submit(4)
    monkeypatch.setitem(labtasker.LOOP_SETTINGS, "on_internal_error", None)
    loop = labtasker.Loop(lambda slot, run: 1 / 0, {"required_fields": ["n"]}, slots=[labtasker.SlotSpec()] * 2)
    with pytest.raises(ZeroDivisionError):
        loop.run()


def test_the_facts_of_a_slot_are_what_a_server_takes(server_home):
    one, = submit()
    many = ",".join("MIG-%032d" % i for i in range(8))
    server_home.cli("loop", "-j", "1", "--gpus", many, "--", "true", "%(n)")
    assert json.dumps(task(one).attempts[0]["gpus"]) == json.dumps(many)
