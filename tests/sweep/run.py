#!/usr/bin/env python3
"""Run the sweep: start it as often, and on as many machines, as there is room."""
import labtasker
from labtasker import Required

from train import train


@labtasker.loop(extra_filter='"sweep" in list(metadata.tags)')
def main(lr: float = Required(), l2: float = Required(), epochs: int = Required(), seed: int = Required()):
    acc, loss = train(lr=lr, epochs=epochs, seed=seed, l2=l2)
    labtasker.report_task_status(
        task_id=labtasker.task_info().task_id,
        status="running",
        summary={"acc": acc, "loss": loss},
    )


if __name__ == "__main__":
    main()
