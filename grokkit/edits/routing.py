"""Edits of the router's choice, each with a stated policy for the experts' weights."""

import abc
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grokkit.config import GrokConfig
from grokkit.edits.selection import Selector, Where
from grokkit.edits.values import Edit, aligned, as_array, check_value
from grokkit.errors import SiteError
from grokkit.taps import At

GatePolicy = Literal["keep", "renormalise"]


class _RoutingEdit(Edit):
    """A change of the chosen experts, with a policy for their weights.

    `gates="keep"` multiplies each expert used by the router's own probability of it;
    `"renormalise"` divides those by their sum; an array [..., choice] gives the weights.
    """

    gates: eqx.AbstractVar[Any]
    policy: eqx.AbstractVar[str]

    @property
    def acts_on(self) -> tuple[str, ...]:
        return ("expert_indices", "expert_weights")

    @abc.abstractmethod
    def choose(self, experts: Array, at: At) -> tuple[Array, Array | None]:
        """The experts to use, and where this holds."""

    def change(self, name: str, value: Array, at: At) -> tuple[Array, Array | None]:
        if name == "expert_indices":
            return self.choose(value, at)
        if self.policy == "renormalise":
            return value / jnp.sum(value, axis=-1, keepdims=True), None
        if self.policy == "given":
            return aligned(self.gates, name, value, at)
        # The layer itself looks up the router's probabilities of whatever experts are used.
        return value, None

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        if self.where.experts is not None:
            raise SiteError(f"{type(self).__name__}: `experts` does not apply to the selection")
        if self.policy == "given":
            check_value("expert_weights", self.gates, config, lengths, type(self).__name__)


def _gates(gates: GatePolicy | Any) -> tuple[str, Any]:
    if isinstance(gates, str):
        if gates not in ("keep", "renormalise"):
            raise SiteError(f"gates must be 'keep', 'renormalise' or an array of weights, found "
                            f"{gates!r}")  # fmt: skip
        return gates, None
    return "given", jnp.asarray(gates, jnp.float32)


def _check_experts(experts: Any, config: GrokConfig, what: str) -> None:
    array = np.asarray(experts)
    if array.size == 0 or array.dtype.kind not in "iu":
        raise SiteError(f"{what}: expected expert numbers, found {experts!r}")
    if array.min() < 0 or array.max() >= config.n_experts:
        raise SiteError(f"{what}: experts go from 0 to {config.n_experts - 1}, found "
                        f"{np.unique(array).tolist()}")  # fmt: skip


class ForceExperts(_RoutingEdit):
    """Send tokens to the experts given, [choice] or any shape that `Replace` takes."""

    site: str = eqx.field(static=True)
    experts: Int[Array, "..."]
    gates: Float[Array, "..."] | None
    policy: str = eqx.field(static=True)
    where: Where

    def __init__(self, experts: Any, gates: GatePolicy | Any = "keep", **where: Selector) -> None:
        self.site, self.experts = "expert_indices", jnp.asarray(experts)
        self.policy, self.gates = _gates(gates)
        self.where = Where(**where)

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        super().check(config, lengths)
        _check_experts(self.experts, config, "ForceExperts")
        check_value("expert_indices", self.experts, config, lengths, "ForceExperts")
        k = config.n_experts_per_token
        ranked = np.sort(np.asarray(self.experts), axis=-1)
        if ranked.shape[-1:] != (k,) or (ranked[..., 1:] == ranked[..., :-1]).any():
            raise SiteError(f"ForceExperts: expected {k} different experts for each token, found "
                            f"{np.asarray(self.experts).tolist()}")  # fmt: skip

    def choose(self, experts: Array, at: At) -> tuple[Array, Array | None]:
        return aligned(self.experts, "expert_indices", experts, at)


class ForbidExperts(_RoutingEdit):
    """Choose among the other experts only: the most probable of those."""

    site: str = eqx.field(static=True)
    forbidden: Int[Array, " n"]
    gates: Float[Array, "..."] | None
    policy: str = eqx.field(static=True)
    where: Where

    def __init__(
        self, forbidden: int | Sequence[int], gates: GatePolicy | Any = "keep", **where: Selector
    ) -> None:
        self.site, self.forbidden = "expert_indices", jnp.atleast_1d(jnp.asarray(forbidden))
        self.policy, self.gates = _gates(gates)
        self.where = Where(**where)

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        super().check(config, lengths)
        _check_experts(self.forbidden, config, "ForbidExperts")
        left = config.n_experts - len(np.unique(np.asarray(self.forbidden)))
        if left < config.n_experts_per_token:
            raise SiteError(f"ForbidExperts: {left} experts are left, and each token needs "
                            f"{config.n_experts_per_token}")  # fmt: skip

    def choose(self, experts: Array, at: At) -> tuple[Array, Array | None]:
        probs = jax.reshard(at.seen["router_probs"], P())
        allowed = jnp.ones(probs.shape[-1], bool).at[self.forbidden].set(False)
        return jax.lax.top_k(jnp.where(allowed, probs, -1.0), experts.shape[-1])[1], None


class RequireExperts(_RoutingEdit):
    """Choose these experts, at most as many as each token uses.

    They take the place of the least probable of those chosen otherwise. Edits before it hold for
    the rest: after `ForbidExperts` no forbidden expert fills up.
    """

    site: str = eqx.field(static=True)
    required: Int[Array, " n"]
    gates: Float[Array, "..."] | None
    policy: str = eqx.field(static=True)
    where: Where

    def __init__(
        self, required: int | Sequence[int], gates: GatePolicy | Any = "keep", **where: Selector
    ) -> None:
        self.site, self.required = "expert_indices", jnp.atleast_1d(jnp.asarray(required))
        self.policy, self.gates = _gates(gates)
        self.where = Where(**where)

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        super().check(config, lengths)
        _check_experts(self.required, config, "RequireExperts")
        required, k = np.asarray(self.required).tolist(), config.n_experts_per_token
        if len(set(required)) < len(required) or len(required) > k:
            raise SiteError(f"RequireExperts: expected at most {k} different experts, as each token "
                            f"uses {k}, found {required}")  # fmt: skip

    def choose(self, experts: Array, at: At) -> tuple[Array, Array | None]:
        n, k = self.required.shape[0], experts.shape[-1]
        experts = jax.reshard(experts, P())
        required = jnp.broadcast_to(self.required, (*experts.shape[:-1], n)).astype(experts.dtype)
        already = (experts[..., None] == self.required.astype(experts.dtype)).any(axis=-1)
        # A stable sort keeps the others in their order, the most probable first.
        others = jnp.take_along_axis(experts, jnp.argsort(already, axis=-1, stable=True), axis=-1)
        return jnp.concatenate([required, others[..., : k - n]], axis=-1), None


class SwapExperts(_RoutingEdit):
    """Where expert `a` was chosen use `b`, and the other way round."""

    site: str = eqx.field(static=True)
    pair: Int[Array, "2"]
    gates: Float[Array, "..."] | None
    policy: str = eqx.field(static=True)
    where: Where

    def __init__(self, a: int, b: int, gates: GatePolicy | Any = "keep", **where: Selector) -> None:
        self.site, self.pair = "expert_indices", jnp.asarray([a, b])
        self.policy, self.gates = _gates(gates)
        self.where = Where(**where)

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        super().check(config, lengths)
        _check_experts(self.pair, config, "SwapExperts")

    def choose(self, experts: Array, at: At) -> tuple[Array, Array | None]:
        a, b = self.pair
        return jnp.where(experts == a, b, jnp.where(experts == b, a, experts)), None


class RouterTemperature(Edit):
    """Divide the router's logits by a temperature.

    The choice stays, for the order does; the probabilities, which weigh the experts' outputs,
    grow more equal above 1 and more extreme below. `gates="renormalise"` divides them by their
    sum.
    """

    site: str = eqx.field(static=True)
    temperature: Float[Array, ""]
    policy: str = eqx.field(static=True)
    where: Where

    def __init__(self, temperature: float, gates: GatePolicy = "keep", **where: Selector) -> None:
        self.site, self.temperature = "router_logits", as_array(temperature)
        self.policy, _ = _gates(gates)
        self.where = Where(**where)

    @property
    def acts_on(self) -> tuple[str, ...]:
        return ("router_logits", "expert_weights")

    def check(self, config: GrokConfig, lengths: np.ndarray) -> None:
        if not float(self.temperature) > 0:
            raise SiteError(f"RouterTemperature: expected more than 0, found {self.temperature}")
        if self.policy == "given" or self.where.experts is not None:
            raise SiteError("RouterTemperature: `gates` must be 'keep' or 'renormalise', and "
                            "`experts` does not apply")  # fmt: skip

    def change(self, name: str, value: Array, at: At) -> tuple[Array, Array | None]:
        if name == "router_logits":
            return value / self.temperature, None
        if self.policy == "renormalise":
            return value / jnp.sum(value, axis=-1, keepdims=True), None
        return value, None
