import labtasker
from labtasker import Required

# Required() fields are auto-filled from task args; types are cast automatically.
# Parameter name MUST match the args key exactly.
@labtasker.loop()
def main(arg1: int = Required(), arg2: int = Required()):
    result = arg1 + arg2
    print(f"The result is {result}")

if __name__ == "__main__":
    main()

# With extra_filter (Python query string)
@labtasker.loop(
    extra_filter='"v1" in list(metadata.tags)'
)
def main(lr: float = Required(), model: str = Required()):
    train(lr=lr, model=model)

# Access args as dict instead of keyword args
@labtasker.loop(required_fields=["lr", "model"], pass_args_dict=True)
def main(args):
    train(lr=args["lr"], model=args["model"])

# Nested args — param name must match the args key; resolver receives args[param_name]
from typing import Any, Dict
from typing_extensions import Annotated
from dataclasses import dataclass

@dataclass
class ArgsGroupA:
    a: int
    b: str

@dataclass
class ArgsGroupB:
    foo: int
    bar: str

@labtasker.loop()
def main(
    args_a: Annotated[Dict[str, Any], Required(resolver=lambda a: ArgsGroupA(**a))],
    args_b=Required(resolver=lambda b: ArgsGroupB(**b)),
):
    print(f"got args_a: {args_a}")
    print(f"got args_b: {args_b}")

# Simple nested dict access — use identity resolver to receive the raw dict
# (no dataclass needed; resolver receives args[param_name])
@labtasker.loop()
def main(optimizer=Required(resolver=lambda x: x)):
    # optimizer is the raw dict: {"lr": 0.001, "momentum": 0.9}
    lr = optimizer["lr"]
    momentum = optimizer.get("momentum", 0.9)
