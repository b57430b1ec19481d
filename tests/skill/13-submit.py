import labtasker

for lr in [0.001, 0.01, 0.1]:
    for model in ["resnet", "vit"]:
        labtasker.submit_task(
            task_name="grid_search",           # optional
            args={"arg1": lr, "arg2": model},
            metadata={                          # optional — use for filtering/tagging
                "tags": ["v1", "experimental"],
                "note": "baseline run",
            },
            max_retries=3,                      # optional, default 3
            priority=0,                         # optional, default 0 (medium)
        )

# Nested args as dict (use Python loop to access nested values)
labtasker.submit_task(
    args={
        "args_a": {"a": 1, "b": "boy"},
        "args_b": {"foo": 2, "bar": "baz"},
    },
    metadata={"tags": ["sweep-v2"]},
)
