"""The images that a training holds out, as a job finds them."""
