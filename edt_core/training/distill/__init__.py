"""Distillation: a student that learns the sampling of a trained model in fewer steps."""
