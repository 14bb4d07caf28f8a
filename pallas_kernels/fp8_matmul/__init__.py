"""Products of matrices in e4m3 whose scales belong to blocks of 128."""
