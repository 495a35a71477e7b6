"""``tfmot.clustering.keras`` for torch: clusters the weights of a model, which then trains on and is stripped."""

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
MAX_CLUSTERS = 65_536


class CentroidInitialization(str, Enum):  # noqa: UP042  (as in TFMOT, a member equals its name)
    """Where the centroids start. RANDOM exists as a name only: it is refused."""

    LINEAR = "LINEAR"
    RANDOM = "RANDOM"
    DENSITY_BASED = "DENSITY_BASED"
    KMEANS_PLUS_PLUS = "KMEANS_PLUS_PLUS"


# The corresponding options of the learnt scheme. Each is where k-means starts here, whereas TFMOT trains from the start
# itself; k-means++ approximates the optimum, and the dynamic program comes closer to it.
INITS = {
    CentroidInitialization.LINEAR: "linear",
    CentroidInitialization.DENSITY_BASED: "density",
    CentroidInitialization.KMEANS_PLUS_PLUS: "optimal",
}


@dataclass(frozen=True)
class ClusteringConfig:
    """How the weights matched by a pattern of ``cluster_weights_`` are clustered.

    Args:
        number_of_clusters: as in ``cluster_weights``.
        cluster_centroids_init: as in ``cluster_weights``.
        preserve_sparsity: as in ``cluster_weights``.
        cluster_per_channel: as in ``cluster_weights``.

    Raises:
        UsageError: the number of clusters or the initialisation is not a valid one.
    """

    number_of_clusters: int = 16
    cluster_centroids_init: CentroidInitialization | str = CentroidInitialization.KMEANS_PLUS_PLUS
    preserve_sparsity: bool = False
    cluster_per_channel: bool = False

    def __post_init__(self) -> None:
        number, start = self.number_of_clusters, self.cluster_centroids_init
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MAX_CLUSTERS:
            raise UsageError(f"number_of_clusters must be a whole number from 1 to {MAX_CLUSTERS:,}, got {number!r}")
        if start == CentroidInitialization.RANDOM:
            raise UsageError(
                "cluster_centroids_init=RANDOM is not offered: take KMEANS_PLUS_PLUS, LINEAR or DENSITY_BASED"
            )
        if start not in list(INITS):
            near = did_you_mean(str(start), [init.value for init in INITS])
            raise UsageError(f"cluster_centroids_init must be a CentroidInitialization, got {start!r}.{near}")

    def rule(self, match: str) -> Rule:
        """Returns the rule that clusters the tensors matched by ``match`` in this way."""
        return Rule(
            match,
            # As in TFMOT, assignments follow the weights by straight-through gradients; in Deep Compression they are
            # fixed.
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
    """Returns a copy of a trained model or layer that trains on with each weight tensor limited to a few values.

    Any optimiser over its ``parameters()`` trains weights, centroids and assignments; no callback is needed.

    Args:
        to_cluster: a model or layer; each of its Linear, convolution, embedding and attention weights is clustered
            separately.
        number_of_clusters: the most values of a tensor, including 0.0 if sparsity is preserved; 1 to 65,536.
        cluster_centroids_init: the start of the k-means that finds the first centroids.
        preserve_sparsity: whether weights that are zero now stay zero.
        cluster_per_channel: whether each output channel, a slice of axis 0, has values of its own.

    Raises:
        UsageError: an argument is not valid.
        PolicyError: nothing in the model can be clustered.

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
    """Clusters in place those weights of a model that match a pattern.

    Args:
        model: the model.
        config: how to cluster, by regular expression. The first expression that matches the whole name of a tensor, or
            of a module above it, applies.

    Raises:
        UsageError: ``config`` is not what is asked for, or some configs preserve sparsity and others do not.
        PolicyError: a pattern is no regular expression or matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> cluster_weights_(model, {"2": ClusteringConfig(number_of_clusters=4)})
        >>> len(model[2].weight.unique()), len(model[0].weight.unique()) > 400
        (4, True)

    Reference: the names of "RFC: Weight Clustering for torchao", github.com/pytorch/ao/issues/4557, 2026.
    """
    _check_configs(config)
    if len({one.preserve_sparsity for one in config.values()}) > 1:
        raise UsageError("preserve_sparsity must be the same in all configs of a model")
    rules = [one.rule(f"re:{pattern}") for pattern, one in config.items()]
    preserve = any(one.preserve_sparsity for one in config.values())
    wrap(VERB, model, Policy(rules), inplace=True, preserve_sparsity=preserve)


def strip_clustering(to_strip: nn.Module) -> nn.Module:
    """Returns a copy of a clustered model that is an ordinary module again, with the clustered values as weights.

    Raises:
        UsageError: the model has no clustered weights.
    """
    return strip(VERB, to_strip)


def _check_configs(config: object) -> None:
    """Raises UsageError unless an argument of ``cluster_weights_`` maps patterns to configurations."""
    example = "such as {'.*': ClusteringConfig(number_of_clusters=16)}"
    if not isinstance(config, Mapping):
        raise UsageError(
            f"cluster_weights_ takes a dict of ClusteringConfig by regular expression, {example}; "
            f"got {type(config).__name__}"
        )
    for pattern, one in config.items():
        if not isinstance(pattern, str) or not isinstance(one, ClusteringConfig):
            raise UsageError(
                f"cluster_weights_ takes ClusteringConfig by regular expression, {example}; got {one!r:.80} of "
                f"{type(one).__name__} for {pattern!r:.80}"
            )
