"""The mathematics of the model, written for one device.

Dimension letters: B batch, T queries, S keys, D model width, H heads, C key-value latent, R rotary, K selected
keys, N index heads, J index head width, E experts, F expert width, V vocabulary, L layers.
"""
