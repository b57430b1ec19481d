import labtasker
from labtasker import Required

@labtasker.loop()
def main(lr: float = Required(), model: str = Required()):
    acc, loss = train(lr=lr, model=model)

    # Optional: write metrics into the task summary; status="running" keeps the task alive
    # Loop auto-marks "success" on normal return (after this call completes)
    labtasker.report_task_status(
        task_id=labtasker.task_info().task_id,
        status="running",      # loop marks success on normal return
        summary={"acc": acc, "loss": loss},
    )
