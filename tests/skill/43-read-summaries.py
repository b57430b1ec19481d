import labtasker

# Fetch all successful tasks and print their summaries
response = labtasker.ls_tasks(status="success", limit=1000)
for task in response.content:
    print(
        f"task_id={task.task_id} "
        f"args={task.args} "
        f"summary={task.summary}"
    )

# Aggregate: collect metric from summary and rank
results = [
    {"lr": t.args["lr"], "model": t.args["model"], "acc": t.summary.get("acc")}
    for t in response.content
]
results.sort(key=lambda x: x["acc"] or 0, reverse=True)
for r in results:
    print(r)
