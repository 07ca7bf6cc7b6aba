"""Token weights on a policy whose tokens are known exactly, and when they help: python -m benchmarks.credit.simulate

G responses of independent softmax tokens that share their parameters; one token earns the reward. Batch gradients are
drawn and compared with the closed form of docs/credit.md, then the policy is trained with SGD and with Adam. numpy, no
model, half a minute. Results: benchmarks/results/credit-simulation.json.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness

Array = NDArray[np.float64]
WORDS, PARAMETERS, ANSWERS = 12, 48, 4
GROUP, BATCH = 8, 16
ONLY_TOLD = math.inf
WEIGHTS = (1.0, 1.7, 2.7, 5.0, ONLY_TOLD)


class Policy:
    """Token t has the logits P_t theta + b_t; all share theta through random P_t (WORDS, PARAMETERS).

    irrelevant: tokens beside the one that earns the reward, which has ANSWERS words. entropy: 1: their words are about
    equally likely; 0: one word takes almost all.
    """

    def __init__(self, irrelevant: int, rng: np.random.Generator, entropy: float = 1.0) -> None:
        self.projections: Array = rng.normal(size=(irrelevant + 1, WORDS, PARAMETERS)) / np.sqrt(PARAMETERS)
        self.biases: Array = np.zeros((irrelevant + 1, WORDS))
        self.biases[0, ANSWERS:] = -30.0
        self.biases[1:, 0] = 8.0 * (1 - entropy)
        self.theta: Array = np.zeros(PARAMETERS)

    def probabilities(self) -> Array:
        """(tokens, WORDS)."""
        logits = self.projections @ self.theta + self.biases
        likelihood = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities: Array = likelihood / likelihood.sum(-1, keepdims=True)
        return probabilities

    def sample(self, size: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Score functions (size, tokens, PARAMETERS) of sampled words, and rewards (size,)."""
        p = self.probabilities()
        words = (rng.random((size, len(p), 1)) > p.cumsum(-1)).sum(-1).clip(max=WORDS - 1)
        return np.einsum("gtv,tvd->gtd", np.eye(WORDS)[words] - p, self.projections), (words[:, 0] == 0).astype(float)

    def gradient(self) -> Array:
        """(PARAMETERS,) of the expected reward, exact."""
        p = self.probabilities()[0]
        exact: Array = p[0] * ((np.arange(WORDS) == 0) - p) @ self.projections[0]
        return exact


def group_gradients(policy: Policy, groups: int, rng: np.random.Generator) -> Array:
    """(groups, tokens, PARAMETERS): for each token the mean of A s over a group of GROUP responses."""
    scores, rewards = policy.sample(groups * GROUP, rng)
    rewards = rewards.reshape(groups, GROUP)
    deviation = rewards.std(1, ddof=1, keepdims=True)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (deviation + 1e-4)
    means: Array = (advantages[..., None, None] * scores.reshape(groups, GROUP, *scores.shape[1:])).mean(1)
    return means


def predicted_cosine(signal: float, told_noise: float, other_noise: float, weight: float, batch: float) -> float:
    """Of the gradient of ``batch`` groups with the exact one, under ``weight`` on the token that counts.

    signal: |mu|^2. told_noise, other_noise: trace of a group's covariance, of that token and of all others.
    """
    noise = told_noise + (0.0 if math.isinf(weight) else other_noise / weight**2)
    snr2 = batch * signal / noise
    return math.sqrt(snr2 / (1 + snr2))


def wiener(means: Array, noise: Array, batch: float) -> Array:
    """The weights (tokens,) whose batch gradient is nearest to the exact one: (M + D / B)^-1 M 1.

    means: (tokens, PARAMETERS) mean gradient of each token. noise: (tokens, tokens) expected products of their noise.
    """
    gram = means @ means.T
    weights: Array = np.linalg.solve(gram + noise / batch, gram.sum(1))
    return weights


def combined(gradients: Array, weight: float) -> Array:
    """(..., PARAMETERS) with ``weight`` on the first token and 1 on the others; ONLY_TOLD: the first alone."""
    told = gradients[..., 0, :]
    return told if math.isinf(weight) else weight * told + gradients[..., 1:, :].sum(-2)


def noise_rows(seeds: int) -> list[dict[str, Any]]:
    """Cosine of batch gradients with the exact one, drawn and predicted, and the gain as a factor of samples."""
    rows = []
    for irrelevant, entropy in ((0, 1.0), (8, 1.0), (24, 1.0), (48, 1.0), (96, 1.0), (384, 1.0), (48, 0.0)):
        found = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            policy = Policy(irrelevant, rng, entropy)
            each = np.concatenate([group_gradients(policy, BATCH, rng) for _ in range(40)])
            exact = policy.gradient()
            told, rest = each[:, 0], each[:, 1:].sum(1)
            signal = float((told.mean(0) @ exact) ** 2 / (exact @ exact))
            v, u = float(told.var(0).sum()), float(rest.var(0).sum())
            values = {"samples 2.7": (v + u) / (v + u / 2.7**2), "samples only told": (v + u) / v}
            for weight in WEIGHTS:
                batches = combined(each, weight).reshape(-1, BATCH, PARAMETERS).mean(1)
                lengths = np.linalg.norm(batches, axis=1) * np.linalg.norm(exact)
                values[f"drawn {weight}"] = float((batches @ exact / lengths).mean())
                values[f"predicted {weight}"] = predicted_cosine(signal, v, u, weight, BATCH)
            found.append(values)
        means = {name: float(np.mean([values[name] for values in found])) for name in found[0]}
        rows.append({"table": "noise", "irrelevant": irrelevant, "entropy": entropy} | means)
    return rows


def learning_rows(seeds: int, steps: int = 40, groups: int = 4) -> list[dict[str, Any]]:
    """Probability of the right word (0.25 at first) after ``steps`` steps: mean and half width of its 95 % interval."""
    rows = []
    for irrelevant in (0, 48, 384):
        for optimizer in ("sgd", "adam"):
            row: dict[str, Any] = {"table": "learning", "irrelevant": irrelevant, "optimizer": optimizer}
            for name, weight, factor in (
                ("W 1", 1.0, 1.0), ("W 2.7", 2.7, 1.0), ("all 2.7", 1.0, 2.7), ("only told", ONLY_TOLD, 1.0),
            ):  # fmt: skip
                ends = [train(irrelevant, optimizer, weight, factor, seed, steps, groups) for seed in range(seeds)]
                row[name] = [float(np.mean(ends)), float(1.96 * np.std(ends, ddof=1) / np.sqrt(seeds))]
            rows.append(row)
    return rows


def train(irrelevant: int, optimizer: str, weight: float, factor: float, seed: int, steps: int, groups: int) -> float:
    """The right word's probability at the end, of gradients under ``weight`` times ``factor``."""
    rng = np.random.default_rng(seed)
    policy, first, second = Policy(irrelevant, rng), np.zeros(PARAMETERS), np.zeros(PARAMETERS)
    for step in range(1, steps + 1):
        update = factor * combined(group_gradients(policy, groups, rng).mean(0), weight)
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * update, 0.99 * second + 0.01 * update**2
            policy.theta = policy.theta + 0.03 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
        else:
            policy.theta = policy.theta + 0.1 * update
    return float(policy.probabilities()[0, 0])


def wiener_rows(batches: Sequence[int] = (1, 4, 16, 64, 256)) -> list[dict[str, Any]]:
    """The best weights with 48 irrelevant tokens, by the number of groups of a batch."""
    rng = np.random.default_rng(0)
    policy = Policy(48, rng)
    each = np.concatenate([group_gradients(policy, 64, rng) for _ in range(64)])
    exact = policy.gradient()
    means = np.zeros((49, PARAMETERS))
    means[0] = exact * (each[:, 0].mean(0) @ exact) / (exact @ exact)  # the others' mean gradient is 0
    noise = np.diag(each.var(0).sum(-1))
    rows = []
    for batch in batches:
        weights = wiener(means, noise, batch)
        rows.append({"table": "wiener", "batch": batch, "told": float(weights[0]), "other": float(weights[1:].mean())})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    rows = [*noise_rows(seeds), *wiener_rows(), *learning_rows(seeds)]
    for row in rows:
        print(
            "  ".join(f"{name} {round(value, 3) if isinstance(value, float) else value}" for name, value in row.items())
        )
    print(harness.save("credit-simulation", rows, device="cpu", seeds=seeds))


if __name__ == "__main__":
    main()
