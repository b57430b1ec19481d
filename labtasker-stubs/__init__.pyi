# Made from labtasker.py by tests/stubs.py.
import datetime
import pathlib
from typing import Any, Callable, ClassVar, Iterable, Iterator, Mapping, SupportsFloat, Union, overload
from typing_extensions import Annotated as Annotated, Literal, TypedDict, Unpack

from . import api_models as api_models

__version__: str
__all__ = [
    "loop",
    "Required",
    "Annotated",
    "finish",
    "task_info",
    "current_task_id",
    "current_worker_id",
    "is_enabled",
    "get_labtasker_log_dir",
    "time_left",
    "preempted",
    "set_prompt_on_task_failure",
    "set_loop_internal_error_handler",
    "health_check",
    "create_queue",
    "get_queue",
    "update_queue",
    "delete_queue",
    "submit_task",
    "submit_tasks",
    "submit_grid",
    "submit_sample",
    "as_completed",
    "fetch_task",
    "get_task",
    "get_history",
    "table",
    "report",
    "should_stop",
    "task_dir",
    "report_task_status",
    "refresh_task_heartbeat",
    "ls_tasks",
    "update_tasks",
    "delete_task",
    "create_worker",
    "ls_workers",
    "report_worker_status",
    "delete_worker",
    "connect_events",
    "EventListener",
    "Task",
    "Worker",
    "Queue",
    "TaskUpdateRequest",
    "LabtaskerError",
    "LabtaskerRuntimeError",
    "LabtaskerValueError",
    "LabtaskerTypeError",
    "LabtaskerNetworkError",
    "LabtaskerHTTPStatusError",
    "LabtaskerConnectError",
    "WorkerSuspended",
    "TaskCancelled",
    "TransientError",
    "TaskError",
    "FatalWorkerError",
    "api_models",
]

class LabtaskerError(Exception):
    status: int

class LabtaskerRuntimeError(LabtaskerError, RuntimeError): ...

class LabtaskerValueError(LabtaskerError, ValueError):
    status: int

class LabtaskerTypeError(LabtaskerError, TypeError):
    status: int

class LabtaskerNetworkError(LabtaskerError): ...

class LabtaskerHTTPStatusError(LabtaskerNetworkError):
    status_code: int
    detail: Any
    def __init__(self, status_code: int, detail: Any, url: str | None = None) -> None: ...

class LabtaskerConnectError(LabtaskerNetworkError):
    is_sent: bool

class WorkerSuspended(LabtaskerRuntimeError): ...

class TaskCancelled(LabtaskerError): ...

class TransientError(LabtaskerError):
    delay_s: float
    def __init__(self, text: str = '', delay_s: float | str = 0) -> None: ...

class TaskError(LabtaskerError): ...

class FatalWorkerError(LabtaskerError): ...

_Status = Literal['pending', 'running', 'success', 'failed', 'cancelled']

_Duration = Union[float, str]

_Command = Union[str, list[str]]

_Keys = Union[list[str], tuple[str, ...], set[str]]

_Filter = Union[str, dict[str, Any]]

_Sort = Iterable[tuple[str, int] | list[Any]]

_TaskOrId = Union[str, Task, TaskSubmitResponse]

class _Further(TypedDict, total=False):
    retry_delay: float | None
    stop: str | None
    after: _TaskOrId | Iterable[_TaskOrId] | None
    after_any: _TaskOrId | Iterable[_TaskOrId] | None

class _Submission(_Further, total=False):
    task_name: str | None
    args: dict[str, Any] | None
    metadata: dict[str, Any] | None
    cmd: _Command | None
    heartbeat_timeout: float | None
    task_timeout: float | None
    max_retries: int
    priority: int

class _Update(TypedDict, total=False):
    _id: Any
    task_id: Any
    status: Any
    task_name: Any
    args: Any
    metadata: Any
    summary: Any
    cmd: Any
    heartbeat_timeout: Any
    task_timeout: Any
    max_retries: Any
    retries: Any
    priority: Any
    retry_delay: Any
    stop: Any
    after: Any
    after_any: Any
    replace_fields: Any

class _Response:
    def __init__(self, **values: Any) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...

class _Answer(_Response):
    def __init__(self, values: dict[str, Any]) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]

class Task(_Answer):
    task_id: str
    queue_id: str
    status: _Status
    task_name: str | None
    created_at: datetime.datetime
    start_time: datetime.datetime | None
    last_heartbeat: datetime.datetime | None
    last_modified: datetime.datetime
    heartbeat_timeout: float | None
    task_timeout: float | None
    max_retries: int
    retries: int
    priority: int
    retry_delay: float | None
    stop: str | None
    after: list[str] | None
    after_any: list[str] | None
    metadata: dict[str, Any]
    args: dict[str, Any]
    cmd: _Command | None
    summary: dict[str, Any]
    worker_id: str | None
    run_id: str | None
    run_end: str | None
    interruptions: int | None
    reason: str | None
    failure: str | None
    not_before: datetime.datetime | None
    attempts: list[dict[str, Any]] | None
    git: str | None

class Worker(_Answer):
    worker_id: str
    queue_id: str
    status: Literal['active', 'suspended', 'crashed']
    worker_name: str | None
    metadata: dict[str, Any]
    retries: int
    max_retries: int
    created_at: datetime.datetime
    last_modified: datetime.datetime
    ended_at: datetime.datetime | None

class Queue(_Answer):
    queue_id: str
    queue_name: str
    created_at: datetime.datetime
    last_modified: datetime.datetime
    metadata: dict[str, Any]
    paused_at: datetime.datetime | None

class StateTransitionEvent(_Answer):
    type: str
    queue_id: str
    timestamp: datetime.datetime
    metadata: dict[str, Any]
    entity_type: Literal['task', 'worker']
    entity_id: str
    old_state: str
    new_state: str
    entity_data: dict[str, Any]

class EventResponse(_Answer):
    event: StateTransitionEvent
    sequence: int
    timestamp: datetime.datetime
    id: str | None
    def __init__(self, values: dict[str, Any]) -> None: ...

class QueueCreateResponse(_Response):
    queue_id: str

class TaskSubmitResponse(_Response):
    task_id: str

class TaskFetchResponse(_Response):
    found: bool
    task: Task | None
    retry_in_s: float | None
    left: int | None
    paused: bool | None
    report: dict[str, Any] | None

class HealthCheckResponse(_Response):
    status: Literal['healthy', 'unhealthy']
    database: str

class _Listing(_Response):
    found: bool
    def __bool__(self) -> bool: ...
    def __len__(self) -> int: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def to_records(self) -> list[dict[str, Any]]: ...

class TaskLsResponse(_Listing):
    content: list[Task]
    def __iter__(self) -> Iterator[Task]: ...
    @overload
    def __getitem__(self, place: int) -> Task: ...
    @overload
    def __getitem__(self, place: slice) -> TaskLsResponse: ...

class WorkerLsResponse(_Listing):
    content: list[Worker]
    def __iter__(self) -> Iterator[Worker]: ...
    @overload
    def __getitem__(self, place: int) -> Worker: ...
    @overload
    def __getitem__(self, place: slice) -> WorkerLsResponse: ...

class TaskUpdateRequest(_Response):
    task_id: str
    def __init__(self, **given: Unpack[_Update]) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...

def health_check() -> HealthCheckResponse: ...

def create_queue(queue_name: str, password: str, metadata: dict[str, Any] | None = None) -> QueueCreateResponse: ...

def get_queue() -> Queue: ...

def update_queue(
    new_queue_name: str | None = None,
    new_password: str | None = None,
    metadata_update: dict[str, Any] | None = None,
) -> Queue: ...

def delete_queue(cascade_delete: bool = True) -> None: ...

def submit_task(
    task_name: str | None = None,
    args: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    cmd: _Command | None = None,
    heartbeat_timeout: float | None = None,
    task_timeout: float | None = None,
    max_retries: int = 3,
    priority: int = 0,
    **ours: Unpack[_Further],
) -> TaskSubmitResponse: ...

def submit_tasks(tasks: Iterable[Mapping[str, Any]], unique: bool = False) -> list[str]: ...

def submit_grid(grid: Mapping[str, Any], unique: bool = False, **fields: Unpack[_Submission]) -> list[str]: ...

def fetch_task(
    worker_id: str | None = None,
    eta_max: _Duration | None = None,
    heartbeat_timeout: float | None = None,
    start_heartbeat: bool = True,
    required_fields: _Keys | None = None,
    extra_filter: _Filter | None = None,
    cmd: _Command | None = None,
    fetch_id: str | None = None,
    wait_s: float | None = None,
    attempt: dict[str, Any] | None = None,
    heartbeat_default: float | None = None,
    left: bool | None = None,
    report: dict[str, Any] | None = None,
) -> TaskFetchResponse: ...

def refresh_task_heartbeat(task_id: str, worker_id: str | None = None) -> None: ...

def get_task(task_id: str) -> Task: ...

def ls_tasks(
    task_id: str | None = None,
    task_name: str | None = None,
    status: str | None = None,
    extra_filter: _Filter | None = None,
    limit: int | None = ...,
    offset: int = 0,
    sort: _Sort | None = None,
) -> TaskLsResponse: ...

def table(
    by: str | Iterable[str],
    of: str,
    mode: str = 'max',
    status: str | list[str] | None = 'success',
    extra_filter: _Filter | None = None,
    task_name: str | None = None,
) -> list[dict[str, Any]]: ...

def update_tasks(
    task_updates: Iterable[TaskUpdateRequest | dict[str, Any]],
    reset_pending: bool = False,
) -> TaskLsResponse: ...

def delete_task(task_id: str) -> None: ...

def create_worker(
    worker_name: str | None = None,
    metadata: dict[str, Any] | None = None,
    max_retries: int = 3,
) -> str: ...

def ls_workers(
    worker_id: str | None = None,
    worker_name: str | None = None,
    status: str | None = None,
    extra_filter: _Filter | None = None,
    limit: int | None = ...,
    offset: int = 0,
    sort: _Sort | None = None,
) -> WorkerLsResponse: ...

def report_worker_status(worker_id: str, status: str) -> None: ...

def delete_worker(worker_id: str, cascade_update: bool = True) -> None: ...

class EventListener:
    def __init__(self, after: str | None = None) -> None: ...
    def __enter__(self) -> EventListener: ...
    def __exit__(self, *_: object) -> None: ...
    def start(self, timeout: float = 10) -> EventListener: ...
    def stop(self) -> None: ...
    def is_connected(self) -> bool: ...
    def get_client_id(self) -> str | None: ...
    def get_event(self, timeout: float | None = None) -> EventResponse | None: ...
    def iter_events(self) -> Iterator[EventResponse]: ...

def connect_events(timeout: float = 10, after: str | None = None) -> EventListener: ...

def Required(*, alias: str | None = None, resolver: Callable[[Any], Any] | None = None) -> Any: ...

def is_enabled() -> bool: ...

def current_task_id() -> str: ...

def current_worker_id() -> str | None: ...

def task_info() -> Task: ...

def get_labtasker_log_dir() -> pathlib.Path: ...

def report_task_status(
    task_id: str,
    status: str,
    summary: dict[str, Any] | None = None,
    worker_id: str | None = None,
) -> None: ...

def report(step: SupportsFloat | None = None, **values: Any) -> bool: ...

def should_stop() -> bool: ...

def get_history(task_id: str) -> list[dict[str, Any]]: ...

def task_dir() -> pathlib.Path: ...

def finish(status: str, summary: dict[str, Any] | None = None, skip_if_no_labtasker: bool = True) -> None: ...

def time_left() -> float | None: ...

def preempted() -> bool: ...

def as_completed(tasks: Iterable[_TaskOrId], timeout: _Duration | None = None) -> Iterator[Task]: ...

def set_loop_internal_error_handler(handler: Callable[[Exception, int], object] | None) -> None: ...

def set_prompt_on_task_failure(enabled: bool) -> None: ...

def loop(
    required_fields: _Keys | None = None,
    extra_filter: _Filter | None = None,
    cmd: _Command | None = None,
    worker_id: str | None = None,
    create_worker_kwargs: dict[str, Any] | None = None,
    eta_max: _Duration | None = None,
    heartbeat_timeout: float | None = None,
    pass_args_dict: bool = False,
    grace: _Duration | None = None,
    time_limit: _Duration | None = None,
    drain_before: _Duration | None = None,
    task_name: str | None = None,
    fail: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    max_consecutive_failures: int = ...,
) -> Callable[[Callable[..., Any]], Callable[..., None]]: ...

def submit_sample(
    space: Mapping[str, Any],
    n: int,
    seed: int | None = None,
    unique: bool = False,
    **fields: Unpack[_Submission],
) -> list[str]: ...
