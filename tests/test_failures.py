"""How a run failed: its class and its reason, the errors that a job raises on purpose, and failures in a row that stop a loop."""
import json
import sys

import pytest

import harness
import labtasker as L
from harness import wait_until
from test_service import clock, door  # noqa: F401

TRACE = "Traceback (most recent call last):\n  File \"train.py\", line 3, in <module>\n    step()\n"
ELASTIC = ("E0101 12:00:00.000 7 api.py:898] failed (exitcode: 1) local_rank: 0 (pid: 9) of binary: python\n"
           "Traceback (most recent call last):\n  File \"/bin/torchrun\", line 8, in <module>\n    sys.exit(main())\n"
           "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n" + "=" * 60 + "\ntrain.py FAILED\n"
           + "-" * 60 + "\nFailures:\n  <NO_OTHER_FAILURES>\nRoot Cause (first observed failure):\n[0]:\n"
           "  time      : 2026-01-01\n  exitcode  : 1 (pid: 9)\n" + "=" * 60 + "\n")
OUT_OF_MEMORY = [  # as they write it, at the end of what a job prints
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.79 GiB total capacity)",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB",
    "RuntimeError: CUDA error: out of memory",
    "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB.",
    "RuntimeError: MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB)",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "tensorflow.python.framework.errors_impl.ResourceExhaustedError: {{function_node __wrapped__AddV2}} failed to "
    "allocate memory [Op:AddV2]",
    "ResourceExhaustedError: Graph execution error:\n\nDetected at node 'mul' defined at (most recent call last):\n"
    "    File \"train.py\", line 9\nNode: 'mul'\nOOM when allocating tensor with shape[64,1024] and type float on "
    "/job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc\n\t [[{{node mul}}]]\nHint: If you want to see "
    "a list of allocated tensors when OOM happens, add report_tensor_allocations_upon_oom to RunOptions.",
    "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 137438953472 "
    "bytes.\n--------------------\nFor simplicity, JAX has removed its internal frames from the traceback of the "
    "following exception. Set JAX_TRACEBACK_FILTERING=off to include these.",
    "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Attempting to reserve 10.00G at the bottom of memory.",
    "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 8,589,934,592 bytes (allocated so far: 0 bytes).",
    "cupy_backends.cuda.api.runtime.CUDARuntimeError: cudaErrorMemoryAllocation: out of memory",
]
OTHERWISE = [  # what is no memory of a GPU, and the line that names it
    ("ValueError: bad lr", "ValueError: bad lr"),
    ("grpc._channel._InactiveRpcError: RESOURCE_EXHAUSTED: message larger than max", None),
    ("mlflow.exceptions.MlflowException: Changing param values is not allowed.\n\nThe cause of this error is typically "
     "due to repeated calls\nto an individual run_id event logging.\n\nSee https://mlflow.org/docs/latest",
     "mlflow.exceptions.MlflowException: Changing param values is not allowed."),
    ("Diverged", "Diverged"),
    ("SystemError\nwandb: View run at https://wandb.ai/x\nwandb: Synced 5 files", "SystemError"),
]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
@pytest.mark.parametrize("around", ["{}", "[rank0]: {}", "(train pid=77) {}", "0: {}", "elastic"])
def test_a_gpu_out_of_memory_is_known_at_the_end_of_a_jobs_output(text, around):
    text = TRACE + text
    if around == "elastic":
        text = "".join("[rank1]: %s\n" % line for line in text.split("\n")) + ELASTIC
    else:
        text = "".join(around.format(line) + "\n" for line in text.split("\n"))
    assert L.failure_in("epoch 1\n" * 200 + text)[0]


@pytest.mark.parametrize("text, line", OTHERWISE)
def test_another_exception_is_known_by_the_line_that_names_it(text, line):
    found = L.failure_in("epoch 1\n" + TRACE + text + "\n")
    assert found[:2] == (False, line or text)
    colours = "\x1b[31m" + TRACE.replace("\n", "\x1b[0m\r\n") + text + "\n"
    assert L.failure_in(colours)[:2] == (False, line or text)


def test_the_exceptions_line_is_found_where_stdout_came_between():
    assert L.failure_in(TRACE + "See https://mlflow.org\nValueError: dup\n\nThe cause\n")[1] == "ValueError: dup"
    assert L.failure_in("  File \"x.py\", line 1\n    f(\n     ^\nSyntaxError: '(' was never closed\n")[1] == (
        "SyntaxError: '(' was never closed")


def test_memory_that_ran_out_and_was_caught_is_not_why_a_job_failed():
    caught = TRACE + OUT_OF_MEMORY[0] + "\n"
    assert L.failure_in(caught + "batch size 16 now\n" + TRACE + "ValueError: bad lr\n")[:2] == (False, "ValueError: bad lr")
    assert L.failure_in(caught + "epoch\n" * 200 + "bad config\n") == (False, None, "bad config")
    assert not L.failure_in(TRACE.replace("step()", "raise RuntimeError('CUDA out of memory')") + "ValueError: x\n")[0]
    chained = caught + "\nDuring handling of the above exception, another exception occurred:\n\n" + TRACE + "IOError: disk\n"
    assert L.failure_in(chained)[0]


def test_no_output_at_all_names_nothing():
    for text in ("", "\n\n", "\x00\ud800", "Traceback (most recent call last):", "ValueError: logged alone, long before"):
        assert L.failure_in(text)[:2] == (False, None)


@pytest.mark.parametrize("code, text, kernel, failure, reason", [
    (3, "", False, "exit", "exit code 3"), (1, "", False, "exit", "exit code 1"),
    (1, TRACE + "ValueError: x", False, "exception", "ValueError: x"),
    (3, TRACE + "ValueError: x", False, "exit", "exit code 3"),
    (3, TRACE + OUT_OF_MEMORY[0], False, "oom", OUT_OF_MEMORY[0]),
    (-9, "", False, "killed", "killed by signal 9 (SIGKILL)"), (137, "", False, "killed", "exit code 137 (SIGKILL)"),
    (-9, "", True, "oom", "out of memory: the kernel has killed it (killed by signal 9 (SIGKILL))"),
    (137, "", True, "oom", None), (1, "", True, "exit", "exit code 1"),
    (-11, "", True, "signal", "killed by signal 11 (SIGSEGV)"), (139, "", False, "signal", "exit code 139 (SIGSEGV)"),
    (130, "", False, "exit", "exit code 130")])
def test_a_job_that_ends_otherwise_is_classed_by_its_code_and_its_output(code, text, kernel, failure, reason):
    outcome, _ = L.classed(L.outcome_of_exit(code), code, text, kernel)
    assert (outcome.status, outcome.failure) == ("failed", failure)
    assert reason is None or outcome.reason == reason
    assert outcome.summary == {"labtasker_error": L.outcome_of_exit(code).summary["labtasker_error"]}


def test_the_kernels_counter_is_read_in_both_versions_of_cgroups(tmp_path, monkeypatch):
    for text in ("low 0\noom 3\noom_kill 2\noom_group_kill 0\n", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"):
        (tmp_path / "counter").write_text(text)
        monkeypatch.setattr(L, "_oom_counters", lambda: [str(tmp_path / "none"), str(tmp_path / "counter")])
        assert L.oom_kills() == 2
    (tmp_path / "counter").write_text("no such counter\n")
    assert L.oom_kills() is None


def test_a_failed_run_has_a_class_until_the_task_runs_again(door, clock):  # noqa: F811
    task_id = door.submit(max_retries=5)
    def known():
        task = door.task(task_id)
        return task["failure"], task["reason"]
    assert known() == (None, None)
    door.report(door.fetch(), "failed", failure="oom", reason="CUDA out of memory")
    assert known() == ("oom", "CUDA out of memory")
    found = door("POST", "tasks/search", {"extra_filter": "failure == \"oom\""})["content"]
    assert [task["task_id"] for task in found] == [task_id]
    task = door.fetch()
    assert known() == (None, None)
    door.report(task, "pending", reason="preempted")
    assert known() == (None, "preempted")
    door.fetch(heartbeat_timeout=5)
    door.later(10)
    assert known()[0] == "lost" and "heartbeat" in known()[1]
    door.fetch(eta_max="5", start_heartbeat=False)
    door.later(10)
    assert known()[0] == "timeout" and "task_timeout" in known()[1]
    door.update(task_id, reset=True)
    assert known() == (None, None)
    door.report(door.fetch(), "failed", summary={"labtasker_exception": {"type": "ValueError", "message": "x"}})
    assert known() == ("exception", "ValueError"), "a worker of 1.0.1 tells it in the summary alone"
    door.report(door.fetch(), "failed")
    assert known() == ("exit", None)
    door.report(task_id, "failed", failure="hunger", expect=422)


def test_a_late_success_takes_the_failure_back(door):  # noqa: F811
    task_id = door.submit()
    task = door.fetch(heartbeat_timeout=5)
    door.later(10)
    assert door.task(task_id)["failure"] == "lost"
    door.report(task, "success")
    assert (door.task(task_id)["failure"], door.task(task_id)["reason"]) == (None, None)


def test_a_filter_that_asks_for_no_failure_there_is_is_told():
    assert "oom" in L.doubts({"failure": "OOM"}, L.TASK_FIELDS, L.TASK_STATES)[0]
    assert not L.doubts({"failure": "oom"}, L.TASK_FIELDS, L.TASK_STATES)


# Errors that a job raises on purpose


def raising(make, **options):
    @L.loop(required_fields=["n"], pass_args_dict=True, **options)
    def job(args):
        raise make()
    return job


def submit(count=1, **options):
    return [L.submit_task(args={"n": n}, **options).task_id for n in range(count)]


class OutOfMemoryError(RuntimeError):
    __module__ = "torch"


def cause():
    try:
        raise OutOfMemoryError("CUDA out of memory")
    except OutOfMemoryError as error:
        made = ValueError("training failed")
        made.__cause__ = error
        return made


@pytest.mark.parametrize("make, failure, reason", [
    (lambda: ValueError("bad lr\n\nSee https://docs"), "exception", "ValueError: bad lr"),
    (lambda: OutOfMemoryError("CUDA out of memory"), "oom", "OutOfMemoryError: CUDA out of memory"),
    (cause, "oom", "ValueError: training failed"), (lambda: SystemExit(3), "exit", "exit code 3"),
    (lambda: L.TaskError("no such data set"), "exception", "TaskError: no such data set")])
def test_a_function_that_fails_has_a_class_and_a_reason(home, make, failure, reason):
    task_id, = submit(max_retries=1)
    raising(make)()
    task = L.get_task(task_id)
    assert (task.status, task.failure, task.reason) == ("failed", failure, reason)
    assert task.attempts[-1]["reason"] == reason


def test_a_task_error_is_final(home):
    task_id, = submit(max_retries=5)
    raising(lambda: L.TaskError("never"))()
    assert (L.get_task(task_id).status, L.get_task(task_id).retries) == ("failed", 1)


def test_a_transient_error_hands_the_task_back_with_its_pause(home):
    task_id, = submit()
    raising(lambda: L.TransientError("no licence", delay_s="10 min"), time_limit=1)()
    task = L.get_task(task_id)
    assert (task.status, task.retries, task.interruptions, task.failure) == ("pending", 0, 1, None)
    assert task.reason == "TransientError: no licence"
    assert 590 < task.not_before.timestamp() - L.now() <= 600


@pytest.mark.parametrize("delay", [-1, float("nan"), "soon", [1]])
def test_a_delay_that_is_none_is_refused_where_it_is_given(delay):
    with pytest.raises(L.LabtaskerError):
        L.TransientError("x", delay_s=delay)


def test_a_fatal_error_of_the_worker_ends_the_loop_and_hands_the_task_back(home, capfd):
    ids = submit(2)
    with pytest.raises(SystemExit) as ended:
        raising(lambda: L.FatalWorkerError("GPU has fallen off the bus"))()
    assert ended.value.code == 1
    first, second = map(L.get_task, ids)
    assert (first.status, first.retries, first.not_before, second.interruptions) == ("pending", 0, None, 0)
    assert "GPU has fallen off the bus" in capfd.readouterr().err


# Failures in a row


def test_a_row_is_of_different_tasks_that_fail_quickly_and_a_success_ends_it():
    row = L._FailureRow(3)
    for task_id, status, took_s in (("a", "failed", 1), ("a", "failed", 1), ("b", "failed", 1), ("c", "pending", 1),
                                    ("d", "cancelled", 1)):
        row.note(task_id, status, took_s, "x")
        assert not row.is_full()
    row.note("e", "failed", 31, "x")
    assert not row.tasks, "one that took long is the task's own, and ends the row"
    for task_id in "abc":
        row.note(task_id, "failed", 1, "no GPU" if task_id != "c" else "no CUDA")
    assert row.is_full() and "the last with: no CUDA" in row.told() and L.host_name() in row.told()
    row.note("d", "success", 1, None)
    assert row.is_full(), "another slot's success comes too late"
    never = L._FailureRow(0)
    for number in range(100):
        never.note(str(number), "failed", 1, "x")
    assert not never.is_full()


def test_a_decorated_loop_stops_with_4_after_so_many_quick_failures(home, capfd):
    ids = submit(5, max_retries=1)
    with pytest.raises(SystemExit) as ended:
        raising(lambda: ValueError("no GPU"), max_consecutive_failures=3)()
    assert ended.value.code == 4
    assert [L.get_task(task_id).status for task_id in ids] == ["failed"] * 3 + ["pending"] * 2
    said = capfd.readouterr().err
    assert "3 tasks in a row failed" in said and "all with: ValueError: no GPU" in said and L.host_name() in said


@pytest.mark.slow
def test_a_broken_machine_among_four_costs_a_sweep_ten_runs_at_the_most(server_home):
    """Its loop stops and says why, whatever its slots have under way; the others do the rest."""
    script = server_home.write("job.py", "import os, sys\nif os.environ.get('BROKEN'):\n    print('starting')\n"
                               "    sys.exit('nvidia-smi has failed')\n")
    count = 60
    L.submit_tasks([{"args": {"n": n}, "max_retries": 3} for n in range(count)])
    def start(broken):
        return server_home.start_cli("loop", "-j", "4" if broken else "1", "--idle-timeout", "3", "--", sys.executable, str(script),
                                     "%(n)", env={"BROKEN": "1" if broken else ""})
    broken = start(True)
    wait_until(lambda: broken.poll() is not None, "the broken one's loop ends", timeout_s=60)
    assert broken.returncode == 4
    output = broken.log_path.read_text()
    assert "all with: nvidia-smi has failed" in output and L.host_name() in output
    assert sum(task.retries for task in L.ls_tasks(limit=1000).content) <= 10
    for loop in [start(False) for _ in range(3)]:
        wait_until(lambda: loop.poll() is not None, "a loop ends", timeout_s=60)
        assert loop.returncode == 0
    assert all(task.status == "success" for task in L.ls_tasks(limit=1000).content)


@pytest.mark.slow
def test_a_job_that_the_kernel_kills_for_memory_and_one_that_raises(home, monkeypatch, tmp_path):
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 0\n")
    monkeypatch.setattr(L, "_oom_counters", lambda: [str(counter)])
    script = home.write("job.py", "import os, sys\nif sys.argv[1] == 'big':\n    open(%r, 'w').write('oom_kill 1')\n"
                        "    os.kill(os.getpid(), 9)\nraise ValueError('bad lr')\n" % str(counter))
    ids = [L.submit_task(args={"size": size}, max_retries=1).task_id for size in ("big", "small")]
    assert L.command_loop([sys.executable, str(script), "%(size)"], quiet=True) == 0
    big, small = map(L.get_task, ids)
    assert (big.failure, small.failure, small.reason) == ("oom", "exception", "ValueError: bad lr")
    assert json.loads(harness.run_cli(["task", "ls", "--json", "-f", "failure == 'oom'"], home.cwd).stdout)[0]["task_id"] == big.task_id
