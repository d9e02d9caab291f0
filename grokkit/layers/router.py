"""The choice of experts: softmax over all, then the most probable few."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grokkit.numerics import einsum32
from grokkit.taps import Tap


class Routing(eqx.Module):
    """Which experts each token goes to, and what their outputs are multiplied by."""

    experts: Int[Array, "batch position choice"]
    weights: Float[Array, "batch position choice"]


def route(
    x: Float[Array, "batch position d_model"],
    router: Float[Array, "d_model expert"],
    n_chosen: int,
    tap: Tap,
) -> Routing:
    """Send each token to its `n_chosen` most probable experts.

    The weights are the chosen experts' probabilities in a softmax over *all* experts, so that
    they do not sum to one. Computed in float32.
    """
    logits = einsum32("btd,de->bte", x, router, jnp.float32)
    logits = tap("router_logits", logits)
    probs = tap("router_probs", jax.nn.softmax(logits, axis=-1))
    experts = tap("expert_indices", jax.lax.top_k(probs, n_chosen)[1])
    # Looked up, not taken from top_k: experts that an edit forces get their true probability.
    weights = jnp.take_along_axis(probs, experts, axis=-1)
    return Routing(experts, tap("expert_weights", weights))
