"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grokkit.config import GrokConfig
from grokkit.sharding import Declaration, ParamSpec


class RMSNorm(eqx.Module):
    """`x / sqrt(mean(x**2) + eps) * scale`, in float32."""

    scale: Float[Array, "*layer d_model"] | Declaration
    eps: float = eqx.field(static=True)

    @staticmethod
    def specs(config: GrokConfig) -> "RMSNorm":
        """Declare the parameters."""
        return RMSNorm(ParamSpec((config.d_model,), jnp.float32, ("d_model",)), config.norm_eps)

    def __call__(self, x: Float[Array, "*rows d_model"]) -> Float[Array, "*rows d_model"]:
        """Normalise each row; the result is float32."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return x32 * jax.lax.rsqrt(mean_square + self.eps) * self.scale
