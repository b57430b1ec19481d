#!/bin/sh
# Submit the sweep, one task a setting.
for lr in 0.01 0.1 1.0 10.0; do
    for l2 in 0.0 0.001 0.01; do
        labtasker task submit --name iris --metadata '{"tags": ["sweep"]}' -- \
            --lr=$lr --l2=$l2 --epochs=100 --seed=1 || exit
    done
done
