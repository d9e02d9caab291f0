"""The names of array axes, explained once.

Shapes in docstrings and in jaxtyping annotations, the logical axes of parameters
(`grokkit.sharding.ParamSpec`) and the axes of captured activations all use these names.
"""

AXES: dict[str, str] = {
    "layer": "decoder layer, 0 nearest the embedding",
    "batch": "sequence in the batch",
    "position": "token position in the sequence, 0 first",
    "query": "position that attends",
    "key": "position attended to",
    "head": "attention (query) head; head h reads key/value head h // (n_heads / n_kv_heads)",
    "kv_head": "key/value head, shared by a contiguous group of query heads",
    "d_head": "component of one head's query, key, value or output vector",
    "heads": "all query heads' vectors side by side: head x d_head",
    "kv_heads": "all key/value heads' vectors side by side: kv_head x d_head",
    "d_model": "component of the residual stream",
    "d_ff": "hidden unit of one expert",
    "expert": "expert of a mixture-of-experts layer",
    "choice": "rank among a token's chosen experts, 0 the most probable",
    "group": "block of the contracting axis that shares one quantisation scale per output",
    "vocab": "token id",
}
"""Axis name -> what an index along it means."""
