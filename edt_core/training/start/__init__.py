"""What a training starts from, when that is not random weights."""
