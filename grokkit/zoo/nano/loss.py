"""The training loss, its gradients made on the way, a chunk of tokens' logits at a time."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

LOSS_CHUNK = 1024  # tokens whose logits exist at the same time


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_loss(states, embedding, targets, weights, multiplier) -> Array:
    """Mean cross-entropy in nats, weighted, with the logits of a chunk of tokens at a time.

    Args:
        states: final states [n, d_model].
        embedding: the tied embedding [vocab, d_model].
        targets: next tokens [n].
        weights: weight of each [n].
        multiplier: factor on the logits.
    """
    return _loss_and_gradients(states, embedding, targets, weights, multiplier)[0]


def _loss_and_gradients(states, embedding, targets, weights, multiplier):
    n = states.shape[0]
    total = jnp.sum(weights)
    loss, state_grads, embedding_grad = jnp.zeros(()), [], jnp.zeros(embedding.T.shape)
    for start in range(0, n, LOSS_CHUNK):
        part = slice(start, start + LOSS_CHUNK)
        logits = (states[part] @ embedding.T) * multiplier
        top = jnp.max(logits, axis=-1, keepdims=True)
        exp = jnp.exp(logits - top)
        norm = jnp.sum(exp, axis=-1, keepdims=True)
        hit = jnp.arange(embedding.shape[0]) == targets[part][:, None]
        target_logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        weight = weights[part] / total
        loss += jnp.sum(weight * (top[:, 0] + jnp.log(norm[:, 0]) - target_logit))
        grad = (exp / norm - hit.astype(exp.dtype)) * (weight * multiplier)[:, None]
        state_grads.append(grad @ embedding)
        embedding_grad += states[part].T @ grad
    return loss, jnp.concatenate(state_grads), embedding_grad.T


def _weighted_loss_forward(states, embedding, targets, weights, multiplier):
    loss, states_grad, embedding_grad = _loss_and_gradients(
        states, embedding, targets, weights, multiplier
    )
    return loss, (states_grad, embedding_grad)


def _weighted_loss_backward(multiplier, residuals, grad):
    states_grad, embedding_grad = residuals
    return states_grad * grad, embedding_grad * grad, None, None


weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)
