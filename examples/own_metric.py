"""A new measure: a pure function, with an interval, beside its floors.

    python examples/own_metric.py RUN [--images 1000]

The measure asks how far apart two classes lie in the pooled features: d' of the best single latent
(the distance of the class means in units of the spread within the classes). What makes a number
worth reading is what stands beside it: the same encoder untrained, and the labels shuffled.
"""

import argparse

import numpy as np

import sparsejepa as sj
from sparsejepa.evaluation.stats import Estimate, bootstrap_weights, from_draws


def best_d_prime(x, y, resamples=200):
    """Return the largest d' over the latents of x [n, D] for labels y [n] of two classes.

    The latent is chosen once, on all points; the interval resamples points for that latent.
    """
    x, y = np.asarray(x, float), np.asarray(y)
    first, second = np.unique(y)
    scores = np.abs(_d_prime(x, np.ones(len(y)), y == first, y == second))
    best = x[:, [int(np.argmax(scores))]]
    draws = [
        abs(_d_prime(best, weights, y == first, y == second)[0])
        for weights in bootstrap_weights(len(y), resamples)
    ]
    return from_draws(float(scores.max()), draws)


def _d_prime(x, weights, first, second):
    means, variances = [], []
    for part in (first, second):
        w = weights[part, None] / weights[part].sum()
        means.append((w * x[part]).sum(0))
        variances.append((w * (x[part] - means[-1]) ** 2).sum(0))
    return (means[0] - means[1]) / np.sqrt(0.5 * (variances[0] + variances[1]) + 1e-12)


def show(name: str, found: Estimate) -> None:
    """Print a value with its interval."""
    print(f"{name:10} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="run directory or timm:NAME")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    images = sj.load_dataset("scenes", "test").subset(args.images)
    many = images.targets["count"].values >= 4  # 7 objects or more
    encoder = sj.load(args.run)
    x = sj.embed(encoder, images).x
    show("encoder", best_d_prime(x, many))
    show("untrained", best_d_prime(sj.embed(encoder.untrained(seed=1), images).x, many))
    show("shuffled", best_d_prime(x, np.random.default_rng(0).permutation(many)))
