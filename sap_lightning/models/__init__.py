"""What is changed and asked: CLIP taken apart, its layers, base + ΔW, and what anchors say of it."""
