"""What each optimizer should do, from elsewhere: a few lines of NumPy after the publication, or a library.

Each takes options, parameters (arrays by name), gradients and rates by step, and gives the parameters after the last.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from optim import problem
from paceline.optim.matrices import is_block_matrix, is_matrix

Array = NDArray[np.float64]
Arrays = dict[str, Array]
Reference = Callable[..., Arrays]


def each(update):
    """A reference of all parameters from that of one: (options, name, w, gradients, rates, decay) -> w."""

    def reference(options, start, gradients, rates):
        return {
            name: update(options, name, w.copy(), [g[name] for g in gradients], rates, _decay(options, w))
            for name, w in start.items()
        }

    return reference


def _decay(options, w):
    return options.weight_decay if w.ndim >= 2 else 0.0


@each
def sgd(o, name, w, gradients, rates, decay):
    buffer = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        g = g + decay * w
        buffer = o.momentum * buffer + g
        w = w - lr * (g + o.momentum * buffer if o.nesterov else buffer)
    return w


def adam(betas, eps, w, gradients, rates, decay):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        w = w - lr * decay * w
        w = w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return w


@each
def adamw(o, name, w, gradients, rates, decay):
    return adam(o.betas, o.eps, w, gradients, rates, decay)


@each
def onebit_adam(o, name, w, gradients, rates, decay):
    return adam(o.betas, o.eps, w, gradients, rates, decay)  # its other part is in tests/sync/test_onebit_adam.py


@each
def adagrad(o, name, w, gradients, rates, decay):
    total = np.full_like(w, o.initial)
    for g, lr in zip(gradients, rates, strict=True):
        g = g + decay * w
        total = total + g**2
        w = w - lr * g / (np.sqrt(total) + o.eps)
    return w


@each
def ftrl(o, name, w, gradients, rates, decay):
    """As published, but that z starts from weights, and that a rate may change."""
    l1, l2 = (o.l1 if w.ndim >= 2 else 0.0), decay
    n, before = np.zeros_like(w), np.full_like(w, o.beta / rates[0])
    z = -before * w
    for g, lr in zip(gradients, rates, strict=True):
        n = n + g**2
        inverse = (o.beta + np.sqrt(n)) / lr
        z = z + g - (inverse - before) * w
        w = np.where(np.abs(z) <= l1, 0.0, -(z - np.sign(z) * l1) / (inverse + l2))
        before = inverse
    return w


@each
def lamb(o, name, w, gradients, rates, decay):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = o.betas[0] * m + (1 - o.betas[0]) * g, o.betas[1] * v + (1 - o.betas[1]) * g**2
        r = (m / (1 - o.betas[0] ** t)) / (np.sqrt(v / (1 - o.betas[1] ** t)) + o.eps) + decay * w
        w = w - lr * np.linalg.norm(w) / np.linalg.norm(r) * r
    return w


@each
def muon(o, name, w, gradients, rates, decay):
    if not is_block_matrix(name, w.shape):
        return adam(o.betas, o.eps, w, gradients, rates, decay)
    buffer = np.zeros_like(w)
    for g, lr in zip(gradients, rates, strict=True):
        buffer = o.momentum * buffer + (1 - o.momentum) * g
        x = (1 - o.momentum) * g + o.momentum * buffer
        x = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)
        for _ in range(o.iterations):
            square = x @ np.swapaxes(x, -1, -2)
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        w = w - lr * decay * w - lr * 0.2 * np.sqrt(max(w.shape[-2:])) * x
    return w


def power(matrix, exponent, ridge):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag((values + ridge * values.max()) ** exponent) @ vectors.T


@each
def shampoo(o, name, w, gradients, rates, decay):
    if not is_matrix(name, w.shape):
        return adam(o.betas, o.eps, w, gradients, rates, decay)
    if w.ndim == 3:
        return np.stack([shampoo_matrix(o, w[i], [g[i] for g in gradients], rates, decay) for i in range(len(w))])
    return shampoo_matrix(o, w, gradients, rates, decay)


def shampoo_matrix(o, w, gradients, rates, decay):
    m, v = np.zeros_like(w), np.zeros_like(w)
    sides = [side for side in (0, 1) if w.shape[side] <= o.max_side]
    covariance = {side: np.zeros((w.shape[side],) * 2) for side in sides}
    add = 1.0 if o.decay == 1 else 1 - o.decay
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = o.betas[0] * m + (1 - o.betas[0]) * g, o.betas[1] * v + (1 - o.betas[1]) * g**2
        for side in sides:
            covariance[side] = o.decay * covariance[side] + add * (g @ g.T if side == 0 else g.T @ g)
        if (t - 1) % o.every == 0:
            bias = 1.0 if o.decay == 1 else 1 - o.decay**t
            roots = {side: power(covariance[side] / bias, -1 / (2 * len(sides)), o.ridge) for side in sides}
        mean = m / (1 - o.betas[0] ** t)
        made = roots[0] @ mean if 0 in sides else mean
        made = made @ roots[1] if 1 in sides else made
        if o.grafted:
            length = np.linalg.norm(mean / (np.sqrt(v / (1 - o.betas[1] ** t)) + o.eps))
            made = made * length / np.linalg.norm(made)
        w = w * (1 - lr * decay) - lr * made
    return w


@each
def soap(o, name, w, gradients, rates, decay):
    if not is_matrix(name, w.shape):
        return adam(o.betas, o.eps, w, gradients, rates, decay)
    if w.ndim == 3:
        return np.stack([soap_matrix(o, w[i], [g[i] for g in gradients], rates, decay) for i in range(len(w))])
    return soap_matrix(o, w, gradients, rates, decay)


def soap_matrix(o, w, gradients, rates, decay):
    m, v = np.zeros_like(w), np.zeros_like(w)
    (left, right), (b1, b2) = ((1 - o.decay) * gradients[0] @ gradients[0].T for _ in (0, 1)), o.betas
    right = (1 - o.decay) * gradients[0].T @ gradients[0]
    bases = [basis(side) for side in (left, right)]
    for t, (g, lr) in enumerate(zip(gradients[1:], rates[1:], strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (bases[0].T @ g @ bases[1]) ** 2
        made = bases[0] @ ((bases[0].T @ m @ bases[1]) / (np.sqrt(v) + o.eps)) @ bases[1].T
        w = (w - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * made) * (1 - lr * decay)
        left = o.decay * left + (1 - o.decay) * g @ g.T
        right = o.decay * right + (1 - o.decay) * g.T @ g
        if t % o.every == 0:
            for side, covariance in enumerate((left, right)):
                image = covariance @ bases[side]
                values = np.sum(bases[side] * image, axis=0)
                image = image + np.sqrt(np.finfo(float).eps) * values.max() * bases[side]
                order = np.argsort(-values, kind="stable")
                v = np.take(v, order, axis=side)
                bases[side] = np.linalg.qr(image[:, order])[0]
    return w


def basis(covariance):
    """Eigenvectors, those of the greatest values first; where values are rounding alone, by a fixed matrix."""
    values, vectors = np.linalg.eigh(covariance)
    n = len(values)
    empty = vectors[:, values <= n * np.finfo(float).eps * values[-1]]
    if empty.shape[1]:
        vectors[:, : empty.shape[1]] = empty @ np.linalg.eigh(empty.T @ np.diag(np.arange(n, 0, -1.0) / n) @ empty)[1]
    return vectors[:, ::-1]


@each
def adamw_8bit(o, name, w, gradients, rates, decay):
    if w.ndim < 2 or w.size < 4096:
        return adam(o.betas, o.eps, w, gradients, rates, decay)
    signed, unsigned = np.array(codes(0) + [-c for c in codes(0)] + [0, 1]), np.array([*codes(1), 1])
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = o.betas[0] * m + (1 - o.betas[0]) * g, o.betas[1] * v + (1 - o.betas[1]) * g**2
        w = w - lr * decay * w
        w = w - lr * (m / (1 - o.betas[0] ** t)) / (np.sqrt(v / (1 - o.betas[1] ** t)) + o.eps)
        m, v = rounded(m, signed), rounded(v, unsigned)
    return w


def codes(more_bits):
    """Magnitudes of the dynamic map: seven powers of ten, each with twice as many values as the one below."""
    found = []
    for power_of_ten in range(-6, 1):
        edges = np.linspace(0.1, 1, 2 ** (power_of_ten + 6 + more_bits) + 1)
        found += list(10.0**power_of_ten * (edges[1:] + edges[:-1]) / 2)
    return found


def rounded(values, known):
    """To the nearest of the known values, times the greatest magnitude of each 256 neighbours of a row."""
    result = np.empty_like(values)
    for begin in range(0, values.shape[-1], 256):
        block = values[..., begin : begin + 256]
        scale = np.abs(block).max(-1, keepdims=True)
        result[..., begin : begin + 256] = known[np.abs((block / scale)[..., None] - known).argmin(-1)] * scale
    return result


def sophia(options, start, gradients, rates):
    drawn = {step: problem.gradients(500 + step) for step in range(0, len(rates), options.every)}
    after = {}
    for name, w in start.items():
        m, h = np.zeros_like(w), np.zeros_like(w)
        for step, lr in enumerate(rates):
            if step in drawn:
                h = options.betas[1] * h + (1 - options.betas[1]) * problem.TARGETS * drawn[step][name].numpy() ** 2
            m = options.betas[0] * m + (1 - options.betas[0]) * gradients[step][name]
            w = w - lr * _decay(options, w) * w
            w = w - lr * np.clip(m / np.maximum(options.gamma * h, options.eps), -1, 1)
        after[name] = w
    return after


def newton_cg(options, start, gradients, rates):
    """All parameters as one vector, of the bowls of ``problem``."""

    def join(arrays):
        return np.concatenate([a.ravel() for a in arrays])

    w = join(start.values())
    c = 0.5 + np.abs(join(problem.gradients(1000)[name].numpy() for name in start))
    for step, lr in enumerate(rates):
        t = join(problem.gradients(step)[name].numpy() for name in start)

        def loss(w, t=t):
            return np.sum(c * (w - t) ** 2 / 2 + w**4 / 40)

        g = c * (w - t) + w**3 / 10
        d, r = np.zeros_like(w), g
        p = -r
        for _ in range(options.iterations):
            image = (c + 0.3 * w**2 + options.damping) * p
            alpha = r @ r / (p @ image)
            d, new = d + alpha * p, r + alpha * image
            if np.linalg.norm(new) <= min(0.5, np.linalg.norm(g) ** 0.5) * np.linalg.norm(g):
                break
            p, r = -new + new @ new / (r @ r) * p, new
        while loss(w + lr * d) > loss(w) + 1e-4 * lr * (g @ d):
            lr = lr / 2
        w = w + lr * d
    sizes = np.cumsum([a.size for a in start.values()])[:-1]
    return {name: part.reshape(start[name].shape) for name, part in zip(start, np.split(w, sizes), strict=True)}


def lbfgs(options, start, gradients, rates):
    held = {name: nn.Parameter(torch.from_numpy(w.copy())) for name, w in start.items()}
    optimizer = torch.optim.LBFGS(
        list(held.values()),
        max_iter=options.iterations,
        max_eval=options.evaluations,
        history_size=options.history,
        line_search_fn="strong_wolfe",
    )
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(problem.Bowl(held, step).gradient)
    return {name: p.detach().numpy() for name, p in held.items()}


def library(make):
    """A reference from an optimizer of another library: (options, groups) -> optimizer."""

    def reference(options, start, gradients, rates, finish=lambda optimizer: None):
        held = {name: nn.Parameter(torch.from_numpy(w.copy())) for name, w in start.items()}
        groups = [{"params": [p], "weight_decay": _decay(options, p)} for p in held.values()]
        optimizer = make(options, groups)
        for step, lr in enumerate(rates):
            for name, p in held.items():
                p.grad = torch.from_numpy(gradients[step][name].copy())
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        finish(optimizer)
        return {name: p.detach().numpy() for name, p in held.items()}

    return reference


@library
def adabelief(o, groups):
    from pytorch_optimizer import AdaBelief

    return AdaBelief(groups, lr=o.lr, betas=o.betas, eps=o.eps, weight_decouple=True)


@library
def lion(o, groups):
    from pytorch_optimizer import Lion

    return Lion(groups, lr=o.lr, betas=o.betas, weight_decouple=True)


@library
def adafactor(o, groups):
    return torch.optim.Adafactor(groups, lr=o.lr, beta2_decay=-o.decay_power, eps=o.eps, d=o.clip)


@library
def schedule_free_adamw(o, groups):
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    optimizer.train()
    return optimizer


REFERENCES: dict[str, Reference] = {
    "adabelief": adabelief,
    "adafactor": adafactor,
    "adagrad": adagrad,
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "ftrl": ftrl,
    "lamb": lamb,
    "lbfgs": lbfgs,
    "lion": lion,
    "muon": muon,
    "newton_cg": newton_cg,
    "onebit_adam": onebit_adam,
    "schedule_free_adamw": schedule_free_adamw,
    "sgd": sgd,
    "shampoo": shampoo,
    "soap": soap,
    "sophia": sophia,
}
