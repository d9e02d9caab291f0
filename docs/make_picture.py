"""Draw docs/experts.png, the README's picture, with the shipped model: python docs/make_picture.py"""

from pathlib import Path

import grokkit
from grokkit.plots import chosen_experts

TEXT = "The duty of the Congress is clear. 27+58=85. def read(self): return self.value"

lm = grokkit.load("nano", progress=False)
_, cache = lm.run_with_cache(TEXT, ["expert_indices", "expert_weights"])
figure = chosen_experts(
    lm.to_str_tokens(TEXT), cache["expert_indices"][:, 0], cache["expert_weights"][:, 0]
)
figure.savefig(Path(__file__).parent / "experts.png", dpi=130)
