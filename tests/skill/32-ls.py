import labtasker

# List by status
response = labtasker.ls_tasks(status="failed")
tasks = response.content  # List[Task]

# With filter (Python query string)
response = labtasker.ls_tasks(
    extra_filter='args.lr > 0.01 and "v1" in list(metadata.tags)',
    limit=100,
)

# Filter by summary field (same dot-notation)
response = labtasker.ls_tasks(
    status="success",
    extra_filter='summary.acc > 0.9',
    limit=1000,
)

# ls_tasks() has NO sort parameter — sort results manually in Python
tasks_sorted = sorted(
    response.content,
    key=lambda t: t.summary.get("acc") or 0,
    reverse=True,
)

# Access task fields
for task in response.content:
    print(task.task_id, task.status, task.args, task.metadata, task.summary)
    print(task.created_at, task.worker_id, task.retries)
