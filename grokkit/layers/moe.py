"""Mixture of experts: each token goes through the few experts its router chooses."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from grokkit.config import GrokConfig
from grokkit.layers.experts import expert_outputs
from grokkit.layers.router import Routing, route
from grokkit.quant import QuantizedArray, Slot, declare, layout
from grokkit.sharding import Declaration, ParamSpec
from grokkit.taps import Tap

_ROWS = P("data", None, None)


class MoE(eqx.Module):
    """Router and experts of one layer; every expert is cut along its hidden units."""

    router: Float[Array, "*layer d_model expert"] | Declaration
    gate: QuantizedArray | Slot | Float[Array, "*layer expert d_model d_ff"]
    value: QuantizedArray | Slot | Float[Array, "*layer expert d_model d_ff"]
    out: QuantizedArray | Slot | Float[Array, "*layer expert d_ff d_model"]
    config: GrokConfig = eqx.field(static=True)

    @staticmethod
    def specs(config: GrokConfig) -> "MoE":
        """Declare the parameters."""
        e, d, f, g = config.n_experts, config.d_model, config.d_ff, config.out_groups
        into = declare((e, d, f), ("expert", "d_model", "d_ff"))
        return MoE(
            router=ParamSpec((d, e), jnp.float32, ("d_model", "expert"), d**-0.5),
            gate=into,
            value=into,
            out=declare((e, f, d), ("expert", "d_ff", "d_model"), (g, "group_split")),
            config=config,
        )

    def __call__(
        self, x: Float[Array, "batch position d_model"], dtype: Any, tap: Tap
    ) -> Float[Array, "batch position d_model"]:
        """Sum of the chosen experts' outputs, each times its router probability.

        The experts multiply in `dtype` (see `einsum32`), the router in float32.
        """
        routing = route(x, self.router, self.config.n_experts_per_token, tap)
        if tap.wants("expert_outputs"):
            outputs = tap("expert_outputs", self._run(x, routing, dtype, combine=False))
            weights = routing.weights[..., None]
            y = jnp.sum(outputs * weights, axis=2)
        else:
            y = self._run(x, routing, dtype, combine=True)
        return tap("moe_out_pre_norm", y)

    def _run(self, x: Array, routing: Routing, dtype: Any, combine: bool) -> Array:
        """The chosen experts' outputs: summed with their weights, or each [..., choice, d_model].

        Summing before the exchange between devices sends half as much.
        """

        def local(x, experts, weights, gate, value, out):
            rows = x.reshape(-1, x.shape[-1])
            chosen = experts.reshape(rows.shape[0], -1)
            y = expert_outputs(rows, chosen, gate, value, out, dtype)
            if combine:
                y = jnp.sum(y * weights.reshape(*chosen.shape, 1), axis=1)
            y = jax.lax.psum(y, "model")
            return y.reshape(*x.shape[:2], *y.shape[1:])

        into, back = layout(self.gate, "n"), layout(self.out, "k")
        return jax.shard_map(
            local,
            in_specs=(_ROWS, _ROWS, _ROWS, into, into, back),
            out_specs=_ROWS if combine else P("data", None, None, None),
        )(x, routing.experts, routing.weights, self.gate, self.value, self.out)
