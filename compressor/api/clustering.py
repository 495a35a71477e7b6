"""``tfmot.clustering.keras`` for torch: cluster the weights of a model, train on, strip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn

from compressor.api.wrapping import strip, wrap
from compressor.formats.errors import UsageError, did_you_mean
from compressor.policy.policy import Policy, Rule

__all__ = ["CentroidInitialization", "ClusteringConfig", "cluster_weights", "cluster_weights_", "strip_clustering"]

VERB = "cluster_weights"
MOST_CLUSTERS = 65_536


class CentroidInitialization(str, Enum):  # noqa: UP042  (as in TFMOT, a member equals its name)
    """Where the centroids start. RANDOM is a name that is understood, and refused."""

    LINEAR = "LINEAR"
    RANDOM = "RANDOM"
    DENSITY_BASED = "DENSITY_BASED"
    KMEANS_PLUS_PLUS = "KMEANS_PLUS_PLUS"


# What the engine has in their place. All of them are starts of k-means here, where TFMOT trains from the start itself;
# k-means++ is one approximation of the optimum, and the engine's dynamic programme a better one.
INITS = {
    CentroidInitialization.LINEAR: "linear",
    CentroidInitialization.DENSITY_BASED: "density",
    CentroidInitialization.KMEANS_PLUS_PLUS: "optimal",
}


@dataclass(frozen=True)
class ClusteringConfig:
    """How the weights that a pattern of ``cluster_weights_`` matches are clustered.

    Args:
        number_of_clusters, cluster_centroids_init, preserve_sparsity, cluster_per_channel: as in ``cluster_weights``.

    Raises UsageError for a number or start that cannot be.
    """

    number_of_clusters: int = 16
    cluster_centroids_init: CentroidInitialization | str = CentroidInitialization.KMEANS_PLUS_PLUS
    preserve_sparsity: bool = False
    cluster_per_channel: bool = False

    def __post_init__(self) -> None:
        number, start = self.number_of_clusters, self.cluster_centroids_init
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST_CLUSTERS:
            raise UsageError(f"number_of_clusters must be a whole number from 1 to {MOST_CLUSTERS:,}, got {number!r}")
        if start == CentroidInitialization.RANDOM:
            raise UsageError(
                "cluster_centroids_init=RANDOM is not offered: take KMEANS_PLUS_PLUS, LINEAR or DENSITY_BASED"
            )
        if start not in list(INITS):
            near = did_you_mean(str(start), [init.value for init in INITS])
            raise UsageError(f"cluster_centroids_init must be a CentroidInitialization, got {start!r}.{near}")

    def rule(self, match: str) -> Rule:
        """Give the rule that clusters what ``match`` matches so."""
        return Rule(
            match,
            # Assignments follow the weights, whose gradients pass straight through, as in TFMOT: not Deep Compression,
            # where they are fixed.
            scheme="learnt",
            codewords=self.number_of_clusters,
            init=INITS[CentroidInitialization(self.cluster_centroids_init)],
            group="channel" if self.cluster_per_channel else "site",
        )


def cluster_weights(
    to_cluster: nn.Module,
    number_of_clusters: int,
    cluster_centroids_init: CentroidInitialization | str = CentroidInitialization.KMEANS_PLUS_PLUS,
    preserve_sparsity: bool = False,
    cluster_per_channel: bool = False,
) -> nn.Module:
    """Give a copy of a trained model or layer whose weights take no more than so many values while it trains on.

    Any optimiser over its ``parameters()`` trains weights, centroids and assignments; nothing else is to be called.

    Args:
        to_cluster: Linear, convolution, embedding and attention weights in it are clustered, each for itself.
        number_of_clusters: how many values a tensor may have, 0.0 among them where sparsity is preserved.
        cluster_centroids_init: where the k-means starts that gives the first centroids.
        preserve_sparsity: whether weights that are zero now stay so.
        cluster_per_channel: so many values for each output channel, for each slice of axis 0, rather than each tensor.

    Raises UsageError for an argument that cannot be, PolicyError where nothing can be clustered.

    Example:
        >>> clustered = cluster_weights(nn.Linear(16, 8), number_of_clusters=4)
        >>> len(clustered.weight.unique())
        4
        >>> type(strip_clustering(clustered)).__name__, list(strip_clustering(clustered).state_dict())
        ('Linear', ['weight', 'bias'])
    """
    config = ClusteringConfig(number_of_clusters, cluster_centroids_init, preserve_sparsity, cluster_per_channel)
    return wrap(VERB, to_cluster, Policy([config.rule("*")]), preserve_sparsity=preserve_sparsity)


def cluster_weights_(model: nn.Module, config: Mapping[str, ClusteringConfig]) -> None:
    """Cluster the weights of a model in place, those alone that a pattern matches.

    Args:
        config: regular expressions, the first of which that matches all of a tensor's name, or that of a module above
            it, decides how it is clustered.

    Raises UsageError where some configs preserve sparsity and others do not, PolicyError where a pattern is no regular
    expression or matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> cluster_weights_(model, {"2": ClusteringConfig(number_of_clusters=4)})
        >>> len(model[2].weight.unique()), len(model[0].weight.unique()) > 400
        (4, True)

    Reference: the names of "RFC: Weight Clustering for torchao", github.com/pytorch/ao/issues/4557, 2026.
    """
    if len({one.preserve_sparsity for one in config.values()}) > 1:
        raise UsageError("preserve_sparsity must be the same in all configs of a model")
    rules = [one.rule(f"re:{pattern}") for pattern, one in config.items()]
    preserve = any(one.preserve_sparsity for one in config.values())
    wrap(VERB, model, Policy(rules), inplace=True, preserve_sparsity=preserve)


def strip_clustering(to_strip: nn.Module) -> nn.Module:
    """Give a copy of a clustered model that is an ordinary module again, its weights the values they were clustered to.

    Raises UsageError for a model without clustered weights.
    """
    return strip(VERB, to_strip)
