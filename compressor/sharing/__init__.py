"""The core of weight sharing: sites, groups, the contract of schemes, and the parametrisation."""
