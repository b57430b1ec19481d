@labtasker.loop()
def main(lr: float = Required(), model: str = Required()):
    task = labtasker.task_info()
    if task.retries == 0:
        data = expensive_preprocess()  # only on first attempt
    else:
        data = load_cached_data()      # skip on retries

    loss = train_step(data)
    if math.isnan(loss):
        labtasker.report_task_status(
            task_id=task.task_id,
            status="cancelled",  # preserves cancelled — loop will not overwrite
        )
        return  # stop this task; loop moves to next pending task
