"""The built-in world of drawn things, and the small CLIP that is pretrained on it."""
