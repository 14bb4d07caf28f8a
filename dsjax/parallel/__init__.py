"""Where arrays lie on many devices, and what the devices say to each other."""
