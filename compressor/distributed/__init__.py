"""Several processes that train one model: collectives, devices and replicas."""
