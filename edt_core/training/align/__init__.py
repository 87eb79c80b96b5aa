"""Alignment of representations: an additional loss on hidden states, through a head that only the training has."""
