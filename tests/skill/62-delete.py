import labtasker

# Delete a single task
labtasker.delete_task(task_id="<task_id>")

# Batch delete matching a filter
response = labtasker.ls_tasks(
    extra_filter='created_at < date("10 minutes ago")'
)
for task in response.content:
    labtasker.delete_task(task_id=task.task_id)
