"""Explorers for a notebook: a model's inside to look at, click and change.

Each takes any `grokkit.LanguageModel`, computes in the background while the page stays alive,
says in place what is wrong with a request, and saves itself as a page that needs no kernel:

```python
import grokkit
from grokkit.widgets import RoutingExplorer

lm = grokkit.load("nano")
explorer = RoutingExplorer(lm, "Two and two make four")
explorer
```

Explorers and cells take turns with the devices: a cell that is run while one computes waits for it,
and the other way round.
"""

from grokkit.widgets.attention import AttentionExplorer
from grokkit.widgets.explorer import Explorer
from grokkit.widgets.lens import LensExplorer
from grokkit.widgets.patching import PatchingExplorer
from grokkit.widgets.routing import RoutingExplorer
from grokkit.widgets.sampling import SamplingPlayground

__all__ = [
    "AttentionExplorer",
    "Explorer",
    "LensExplorer",
    "PatchingExplorer",
    "RoutingExplorer",
    "SamplingPlayground",
]
