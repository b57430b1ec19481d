# Made from labtasker.py by tests/stubs.py.
from . import (
    EventResponse as EventResponse,
    HealthCheckResponse as HealthCheckResponse,
    Queue as Queue,
    QueueCreateResponse as QueueCreateResponse,
    StateTransitionEvent as StateTransitionEvent,
    Task as Task,
    TaskFetchResponse as TaskFetchResponse,
    TaskLsResponse as TaskLsResponse,
    TaskSubmitResponse as TaskSubmitResponse,
    TaskUpdateRequest as TaskUpdateRequest,
    Worker as Worker,
    WorkerLsResponse as WorkerLsResponse,
)
