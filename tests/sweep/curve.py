#!/usr/bin/env python3
"""The job of the sweep as one that reports every epoch, and ends where it is told so."""
import argparse
import itertools
import math
import os
import random

from train import load, probabilities, step


def epochs(lr, seed, l2):
    """Yield (accuracy, loss) on the 50 flowers held out by `seed` after each epoch, for ever."""
    data = load()
    random.Random(seed).shuffle(data)
    held_out, rest = data[:50], data[50:]
    weights = [[0.0] * 5 for _ in range(3)]
    while True:
        for begin in range(0, len(rest), 20):
            step(weights, rest[begin:begin + 20], lr, l2)
        guesses = [probabilities(weights, features) for features, _ in held_out]
        hits = sum(guess.index(max(guess)) == label for guess, (_, label) in zip(guesses, held_out))
        loss = -sum(math.log(max(guess[label], 1e-12)) for guess, (_, label) in zip(guesses, held_out)) / len(held_out)
        yield hits / len(held_out), round(loss, 6)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--l2", type=float, default=0.0)
    args = parser.parse_args()
    is_task = "LABTASKER_TASK_ID" in os.environ
    if is_task:
        import labtasker
    for number, (acc, loss) in enumerate(itertools.islice(epochs(args.lr, args.seed, args.l2), args.epochs), 1):
        print("epoch %d: acc=%s loss=%s" % (number, acc, loss), flush=True)
        if is_task and not labtasker.report(step=number, acc=acc, loss=loss):
            break


if __name__ == "__main__":
    main()
