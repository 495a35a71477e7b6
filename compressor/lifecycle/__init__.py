"""The stages of a compression: the plan of a policy, groups, plain weights, the packed model."""
