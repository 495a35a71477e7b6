"""Weight sharing for any torch model: a few learnt values per layer, one small safetensors file.

The public names are imported on first use, so that ``compress --help`` and ``compress inspect`` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressor.compressor import Compressor
    from compressor.deployment.export import export
    from compressor.formats.loader import load, load_state_dict
    from compressor.policy.policy import Policy, Rule
    from compressor.policy.recipe import Recipe, Stage
    from compressor.publishing.push import push_to_hub
    from compressor.sharing.registry import SCHEMES

__version__ = "0.1.0"
__all__ = [
    "SCHEMES",
    "Compressor",
    "Policy",
    "Recipe",
    "Rule",
    "Stage",
    "__version__",
    "export",
    "load",
    "load_state_dict",
    "push_to_hub",
]

_MODULE_OF = {
    "Compressor": "compressor.compressor",
    "Policy": "compressor.policy.policy",
    "Recipe": "compressor.policy.recipe",
    "Rule": "compressor.policy.policy",
    "SCHEMES": "compressor.sharing.registry",
    "Stage": "compressor.policy.recipe",
    "export": "compressor.deployment.export",
    "load": "compressor.formats.loader",
    "load_state_dict": "compressor.formats.loader",
    "push_to_hub": "compressor.publishing.push",
}


def __getattr__(name: str) -> object:
    """Returns a public name, importing its module on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """Returns the public names, imported or not."""
    return sorted(__all__)
