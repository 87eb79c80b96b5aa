"""Parts of the stage train: its ranks on Ray Train, the model that it starts from, the training that it continues."""
