"""Folders and object stores, digests, manifests, and the artifacts made of them."""
