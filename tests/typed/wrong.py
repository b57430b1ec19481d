"""What type checkers find: the lines that end with `# wrong`, and no others."""
import labtasker
from labtasker import Required, TaskUpdateRequest

labtasker.submit_task(argz={"lr": 1})  # wrong
labtasker.submit_grid({"lr": [1]}, argz={"lr": 1})  # wrong
labtasker.submit_sample({"lr": [1]}, 1, argz={"lr": 1})  # wrong
labtasker.submit_task(args={"lr": 1}, priority="high")  # wrong
labtasker.submit_task(args={"lr": 1}, priority=3)
labtasker.fetch_task(argz=1)  # wrong
labtasker.ls_tasks(statuz="failed")  # wrong
labtasker.ls_tasks(limit="3")  # wrong
TaskUpdateRequest(task_id="a", argz={"lr": 1})  # wrong
TaskUpdateRequest(task_id="a", args={"lr": 1})


@labtasker.loop(argz=1)  # wrong
def first(lr: float = Required()) -> None:
    print(lr + 1)
    print(lr.learning_rate)  # wrong


@labtasker.loop()
def second(lr: float = Required(aliaz="args.lr")) -> None:  # wrong
    print(lr)


for task in labtasker.ls_tasks():
    print(task.arg)  # wrong
    print(task.start_time.year)  # wrong
    print(task.created_at.year, task.status == "failed")
    print(task.status == "sucess")  # wrong
