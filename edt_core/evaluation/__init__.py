"""How samples are judged: the protocol, what was published, networks of features, metrics."""
