#!/usr/bin/env python3
"""Softmax regression on Fisher's iris measurements, in plain Python: the job of the sweep."""
import argparse
import csv
import math
import os
import random

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "iris.csv")


def load():
    """Return a list of (features, class number); each feature has mean 0 and deviation 1, and a 1 for the bias."""
    with open(DATA, newline="") as file:
        rows = list(csv.reader(file))[1:]
    columns = [[float(x) for x in column] for column in list(zip(*rows))[:4]]
    scaled = []
    for column in columns:
        mean = sum(column) / len(column)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in column) / len(column))
        scaled.append([(x - mean) / deviation for x in column])
    species = sorted({row[4] for row in rows})
    return [(list(x) + [1.0], species.index(row[4])) for x, row in zip(zip(*scaled), rows)]


def probabilities(weights, features):
    """Return the probability of each class."""
    scores = [sum(w * x for w, x in zip(row, features)) for row in weights]
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    total = sum(powers)
    return [p / total for p in powers]


def step(weights, batch, lr, l2):
    """Change the weights by one step down the gradient of the mean loss of the batch."""
    gradient = [[l2 * w for w in row] for row in weights]
    for features, label in batch:
        for k, p in enumerate(probabilities(weights, features)):
            error = (p - (k == label)) / len(batch)
            for j, x in enumerate(features):
                gradient[k][j] += error * x
    for row, change in zip(weights, gradient):
        for j, g in enumerate(change):
            row[j] -= lr * g


def train(lr, epochs, seed, l2):
    """Return (accuracy, loss) on the 50 flowers held out by `seed`, after `epochs` passes over the others."""
    data = load()
    random.Random(seed).shuffle(data)
    held_out, rest = data[:50], data[50:]
    weights = [[0.0] * 5 for _ in range(3)]
    for _ in range(epochs):
        for begin in range(0, len(rest), 20):
            step(weights, rest[begin:begin + 20], lr, l2)
    guesses = [probabilities(weights, features) for features, _ in held_out]
    hits = sum(guess.index(max(guess)) == label for guess, (_, label) in zip(guesses, held_out))
    loss = -sum(math.log(max(guess[label], 1e-12)) for guess, (_, label) in zip(guesses, held_out)) / len(held_out)
    return hits / len(held_out), round(loss, 6)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--l2", type=float, default=0.0)
    args = parser.parse_args()
    acc, loss = train(args.lr, args.epochs, args.seed, args.l2)
    if "LABTASKER_TASK_ID" not in os.environ:
        print("acc=%s loss=%s" % (acc, loss))
        return
    import labtasker
    labtasker.report_task_status(
        task_id=labtasker.task_info().task_id,
        status="running",  # the loop marks success when this script ends well
        summary={"acc": acc, "loss": loss},
    )


if __name__ == "__main__":
    main()
