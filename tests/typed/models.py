"""The module that has no file; a type checker knows it where it finds the stubs."""
from typing import List

from labtasker.api_models import Task, TaskLsResponse, TaskUpdateRequest


def newest(found: TaskLsResponse) -> Task:
    return max(found, key=lambda task: task.created_at)


def updates(found: TaskLsResponse) -> List[TaskUpdateRequest]:
    return [TaskUpdateRequest(task_id=task.task_id, metadata={"newest": task == newest(found)}) for task in found]
