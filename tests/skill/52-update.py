import labtasker
from labtasker.api_models import TaskUpdateRequest

# Update a single task — only specified keys are merged/updated
labtasker.update_tasks([
    TaskUpdateRequest(**{"_id": task_id, "args": {"lr": 0.005}})
])

# Batch: fix lr and reset to pending (also resets retries=0)
response = labtasker.ls_tasks(status="failed")
updates = [
    TaskUpdateRequest(**{
        "_id": task.task_id,
        "args": {"lr": 0.005},   # merges into existing args; other keys preserved
    })
    for task in response.content
]
if updates:
    labtasker.update_tasks(updates, reset_pending=True)

# Cancel pending tasks matching a filter
response = labtasker.ls_tasks(
    status="pending",
    extra_filter='args.lr > 0.05',
)
updates = [
    TaskUpdateRequest(**{"_id": task.task_id, "status": "cancelled"})
    for task in response.content
]
if updates:
    labtasker.update_tasks(updates)

# Update metadata from inside a loop (merges new field without losing existing ones)
@labtasker.loop()
def main(lr: float = Required(), model: str = Required()):
    train(lr=lr, model=model)
    task = labtasker.task_info()
    labtasker.update_tasks([
        TaskUpdateRequest(**{"_id": task.task_id, "metadata": {"run_note": "done"}})
    ])  # merges "run_note" into existing metadata; other metadata keys preserved
