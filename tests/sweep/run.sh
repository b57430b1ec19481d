#!/bin/sh
# Run the sweep: start it as often, and on as many machines, as there is room.
exec labtasker loop -f '"sweep" in list(metadata.tags)' -- \
    python3 "$(dirname "$0")/train.py" --lr '%(lr)' --l2 '%(l2)' --epochs '%(epochs)' --seed '%(seed)'
