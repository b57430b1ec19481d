"""What users write: type checkers have no complaint, in their strict modes."""
import datetime
import enum
from typing import Dict, List, Optional

import labtasker
from labtasker import Annotated, Required, TaskUpdateRequest, TransientError


class Colour(enum.Enum):
    RED = 1


@labtasker.loop()
def train(lr: float = Required(), colour: Colour = Required(), layers: List[int] = Required(alias="net.layers")) -> Dict[str, float]:
    labtasker.report(step=1, loss=0.3)
    if not labtasker.report(acc=0.4) or labtasker.should_stop():
        raise TransientError("no GPU", delay_s="10 min")
    return {"acc": lr * sum(layers)}


@labtasker.loop(required_fields=["lr"], pass_args_dict=True, extra_filter={"args.lr": 1}, eta_max="1h", grace=3)
def with_dict(args: Dict[str, float], data: str) -> None:
    print(args["lr"], data, labtasker.time_left(), labtasker.preempted())
    labtasker.finish("success", {"acc": labtasker.task_info().args["lr"]})


@labtasker.loop(task_name="annotated")
def annotated(lr: Annotated[float, Required(resolver=lambda text: float(text) * 2)], optimizer: Optional[str] = Required()) -> None:
    (labtasker.task_dir() / "out").write_text("%s %s" % (lr, optimizer))
    (labtasker.get_labtasker_log_dir() / labtasker.current_task_id()).touch()


train()
with_dict("imagenet")
annotated()


def submit() -> List[str]:
    first = labtasker.submit_task("first", {"lr": 0.1}, {"tags": ["a"]}, max_retries=2, priority=3)
    second = labtasker.submit_task(args={"lr": 1}, after=[first], retry_delay=3, stop="asha:loss:min")
    ids = labtasker.submit_tasks([{"args": {"lr": 0.1}}, {"args": {"lr": 1}, "after_any": [second.task_id]}], unique=True)
    grid = {"lr": [0.1, 0.2], "model": ["a", "b"], "seed": range(3)}
    ids += labtasker.submit_grid(grid, task_name="grid", args={"data": "cifar"})
    return ids + labtasker.submit_sample({"lr": "log:1e-4:1", "model": ["a", "b"]}, 20, seed=3, metadata={"by": "me"})


def names(ids: List[str]) -> List[Optional[str]]:
    ended: List[labtasker.Task] = list(labtasker.as_completed(ids, timeout="1h"))
    found = labtasker.ls_tasks(status="success", extra_filter="args.lr > 0", sort=[["priority", -1], ("created_at", 1)])
    dated = {task.task_id: task.start_time for task in found if task.status != "pending"}
    latest: Optional[datetime.datetime] = dated.get(found[0].task_id)
    print(len(found), found[0].args["lr"], latest and latest.year, [len(task.attempts or []) for task in found[1:]])
    rows: List[Dict[str, object]] = labtasker.ls_tasks().to_records() + labtasker.table(["args.lr"], "summary.acc", status=None)
    print(rows, labtasker.ls_workers(status="active")[0].worker_name, labtasker.get_history(ids[0])[0]["loss"])
    return [task.task_name for task in ended]


def update(task_id: str) -> None:
    changed = labtasker.update_tasks([
        TaskUpdateRequest(**{"_id": task_id, "args": {"lr": 1}}), TaskUpdateRequest(task_id=task_id, priority=3),
        {"task_id": task_id, "priority": 4}], reset_pending=True)
    print(changed.content[0].priority, changed.found)
    try:
        labtasker.get_task(task_id)
    except labtasker.LabtaskerHTTPStatusError as error:
        print(error.status_code == 404, error.detail)
    fetched = labtasker.fetch_task(required_fields=["lr"], heartbeat_timeout=30, cmd=["python3", "train.py"])
    if fetched.task:
        labtasker.refresh_task_heartbeat(fetched.task.task_id)
        labtasker.report_task_status(fetched.task.task_id, "success", {"acc": 1})


def listen() -> None:
    with labtasker.connect_events(timeout=3) as listener:
        for event in listener.iter_events():
            print(event.timestamp.hour, event.event.entity_data["_id"], event.event.new_state)
        last = listener.get_event(timeout=1)
        print(last.id if last else None)


def queues() -> None:
    print(labtasker.create_queue("a", "secret").queue_id, labtasker.get_queue().paused_at, labtasker.health_check().status)
    labtasker.set_loop_internal_error_handler(lambda error, count: print(error, count))
    labtasker.delete_worker(labtasker.create_worker("me", {"gpu": 1}))
    print(labtasker.api_models.TaskUpdateRequest(task_id="a").to_dict(), labtasker.__version__.split("."))
