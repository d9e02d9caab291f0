"""Token embedding, tied with the unembedding."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grokkit.config import GrokConfig
from grokkit.float_matmul import matmul_transposed
from grokkit.sharding import Declaration, ParamSpec


class Embedding(eqx.Module):
    """The table that reads tokens in and writes logits out, cut along d_model."""

    weight: Float[Array, "vocab d_model"] | Declaration

    @staticmethod
    def specs(config: GrokConfig) -> "Embedding":
        """Declare the parameters."""
        return Embedding(
            ParamSpec(
                (config.vocab_size, config.d_model),
                jnp.float32,
                ("vocab", "d_model_split"),
                init_scale=config.d_model**-0.5,
            )
        )

    def embed(self, tokens: Int[Array, "batch position"]) -> Float[Array, "batch position d_model"]:
        """The rows of `tokens`, whole on every device, in float32."""

        part = jax.shard_map(
            lambda weight, tokens: weight[tokens],
            in_specs=(P(None, "model"), P("data", None)),
            out_specs=P("data", None, "model"),
        )(self.weight, tokens)
        return jax.reshard(part, P("data", None, None))

    def unembed(
        self, x: Float[Array, "batch position d_model"], dtype: Any
    ) -> Float[Array, "batch position vocab"]:
        """`x` against every token's row, in float32; the result is cut along vocab if it divides.

        Each device holds a slice of d_model, so that the products are partial sums; scattering
        them leaves each device a share of the vocabulary.
        """
        mesh = jax.sharding.get_abstract_mesh()
        scatter = self.weight.shape[0] % mesh.shape["model"] == 0

        def local(x, weight):
            partial = matmul_transposed(x, weight, dtype)
            if scatter:
                return jax.lax.psum_scatter(partial, "model", scatter_dimension=2, tiled=True)
            return jax.lax.psum(partial, "model")

        return jax.shard_map(
            local,
            in_specs=(P("data", None, "model"), P(None, "model")),
            out_specs=P("data", None, "model" if scatter else None),
        )(jax.reshard(x, P("data", None, "model")), self.weight)
