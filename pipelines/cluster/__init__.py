"""Commands that talk to a cluster or a server from outside."""
