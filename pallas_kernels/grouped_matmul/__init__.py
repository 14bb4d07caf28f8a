"""Products of sorted rows with the matrix of their group."""
