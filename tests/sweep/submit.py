#!/usr/bin/env python3
"""Submit the sweep, one task a setting."""
import labtasker

for lr in [0.01, 0.1, 1.0, 10.0]:
    for l2 in [0.0, 0.001, 0.01]:
        labtasker.submit_task(
            task_name="iris",
            args={"lr": lr, "l2": l2, "epochs": 100, "seed": 1},
            metadata={"tags": ["sweep"]},
        )
